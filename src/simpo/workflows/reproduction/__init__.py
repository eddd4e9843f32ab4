"""The claims of the SimPO paper in miniature: studies, their trials on the tiny world, and verdicts by rule."""
