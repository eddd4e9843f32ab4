"""One module a command; a module is a command by being in this folder."""
