"""Scorers of single answers and judges of pairs: how good an answer is."""
