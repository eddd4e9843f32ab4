"""Predicts the memory, time and cost of a training run before anything is loaded."""
