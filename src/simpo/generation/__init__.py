"""Sampling engines, reproducible chunks of responses, and the workflow of simpo sample."""
