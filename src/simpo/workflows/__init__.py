"""What a command does: sample, annotate, pair, loop, sweep."""
