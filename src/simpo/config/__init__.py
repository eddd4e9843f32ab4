"""Command settings: parses a YAML file and the command line into dataclass instances.

Wherever a value comes from, it stays the text that the user wrote until one function converts it to its field's type.
So ``1e-6`` is a number and ``no`` a strategy in the file and on the command line alike, and every error can name the
place of the value.
"""

from simpo.config.fields import Key, check_values, keys_of, required, setting, setting_of
from simpo.config.parse import parse_settings

__all__ = ["Key", "check_values", "keys_of", "parse_settings", "required", "setting", "setting_of"]
