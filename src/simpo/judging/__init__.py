"""Scorers of single answers and judges of pairs."""
