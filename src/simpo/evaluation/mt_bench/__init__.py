"""MT-Bench: a judge rates both turns of 80 conversations."""
