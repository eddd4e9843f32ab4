"""Benchmarks. Run them from the repository root with ``python -m benchmarks.NAME``."""
