"""Plots and reports made from the files in run folders."""
