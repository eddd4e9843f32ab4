"""The SimPO paper's claims in miniature: studies, their trials on the tiny world, and verdicts by a fixed rule."""
