"""Benchmarks, comparisons of two models, and evaluation during training."""
