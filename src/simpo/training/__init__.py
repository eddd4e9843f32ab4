"""Preference training, built on ``transformers.Trainer``."""
