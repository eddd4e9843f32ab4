"""Prompts to responses: engines, reproducible chunks, and the workflow of simpo sample."""
