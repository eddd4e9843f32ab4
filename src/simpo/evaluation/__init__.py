"""How good a model is: figures with intervals."""
