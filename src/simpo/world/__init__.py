"""A built-in tiny world: a tokenizer, a model and preference pairs that need no download."""
