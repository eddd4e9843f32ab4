"""Recipes: a YAML file and the command line become instances of dataclasses.

Every value travels as the text that the user wrote, whichever place it comes from, and one reader fits it
to the annotation of its field. So ``1e-6`` is a number and ``no`` a strategy, in the file as on the command
line, and every mistake can say where it was made.
"""

from simpo.config.fields import annotations_of, fields_of
from simpo.config.foreign import Alias
from simpo.config.parse import parse_recipe

__all__ = ["Alias", "annotations_of", "fields_of", "parse_recipe"]
