"""Plots of what runs leave in their folders."""
