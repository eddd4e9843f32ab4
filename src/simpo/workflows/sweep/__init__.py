"""The search for good hyperparameters: published values, and sweeps over any key of a recipe."""
