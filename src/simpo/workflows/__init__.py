"""The work behind the commands: pair, loop, online, sweep, recipe."""
