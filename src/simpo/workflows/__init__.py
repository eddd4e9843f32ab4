"""Workflows behind the commands simpo pair, loop, sweep, recipe and reproduce."""
