"""Arena-Hard v0.1 and v2: two games a prompt against a baseline, the positions exchanged."""
