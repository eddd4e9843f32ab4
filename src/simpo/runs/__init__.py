"""Output folders of commands: what was run, with what settings, how far it got, and proof that it is intact."""
