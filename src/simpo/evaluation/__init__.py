"""Benchmarks, comparison of two models, and evaluation during training."""
