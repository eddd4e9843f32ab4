"""The folder that a command writes: what was run, with what, how far it came, and proof that it is whole."""
