"""A built-in tiny world: questions with an exact judge, preference pairs, a tokenizer and a model; works offline."""
