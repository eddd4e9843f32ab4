"""How good a model is: benchmarks, comparisons of two models, and evaluation during training."""
