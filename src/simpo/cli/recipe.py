"""Print a recipe for an objective in one of the paper's settings.

examples:
  simpo recipe --objective dpo --setting llama3-base
  simpo recipe --objective simpo --setting mistral-instruct --output simpo.yaml
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from simpo.config import parse_settings
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES
from simpo.runs.atomic import write_text
from simpo.workflows.recipes import SETTINGS, compose_recipe


@dataclass
class RecipeSettings:
    """The recipe."""

    objective: str = field(metadata={"help": f"One of {', '.join(OBJECTIVES)}."})
    setting: str = field(metadata={"help": f"One of {', '.join(SETTINGS)}."})
    output: Path | None = field(default=None, metadata={"help": "Write it to this new file instead."})


def main(argv: list[str]) -> int:
    """Print the recipe, or write it to a file."""
    (settings,) = parse_settings(argv, (RecipeSettings,), command="recipe", about=__doc__)
    text = compose_recipe(settings.objective, settings.setting)
    path = settings.output
    if path is None:
        print(text, end="")
        return 0
    if path.exists():
        raise SimpoError(f"--output: {path} exists already; name a new file")
    write_text(path, text)
    print(f"recipe: {path}\nnext:   simpo train {shlex.quote(str(path))}")
    return 0
