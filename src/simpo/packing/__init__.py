"""Comparisons to one flat sequence a micro-batch, and the model's log-probabilities for them."""
