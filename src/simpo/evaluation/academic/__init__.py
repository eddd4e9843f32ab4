"""Academic benchmarks by lm-eval: what alignment costs elsewhere."""
