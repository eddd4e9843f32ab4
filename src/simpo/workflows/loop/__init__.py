"""Rounds of on-policy training: sample, annotate, pair, train again."""
