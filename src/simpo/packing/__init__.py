"""Packs each micro-batch into one flat sequence, and runs the model on it."""
