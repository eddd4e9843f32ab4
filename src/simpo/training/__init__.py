"""Preference training on ``transformers.Trainer``."""
