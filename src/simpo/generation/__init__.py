"""Sampling engines, reproducible chunks of responses, and the ``simpo sample`` workflow."""
