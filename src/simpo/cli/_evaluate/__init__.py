"""Benchmarks of simpo evaluate; one file a benchmark."""
