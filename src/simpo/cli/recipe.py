"""Print a recipe for an objective in one of the paper's settings: simpo recipe --objective dpo --setting llama3-base"""

from __future__ import annotations

import shlex
from pathlib import Path

from simpo.config.arguments import ArgumentParser
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES
from simpo.runs.atomic import write_text
from simpo.workflows.sweep.recipes import SETTINGS, compose_recipe


def main(argv: list[str]) -> int:
    """Print the recipe, or write it where ``--output`` says."""
    parser = ArgumentParser("recipe", __doc__)
    parser.add_argument("--objective", required=True, metavar="NAME", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--setting", required=True, metavar="NAME", help=f"one of {', '.join(SETTINGS)}")
    parser.add_argument("--output", metavar="FILE", help="write it to a new file instead")
    arguments = parser.parse_args(argv)
    text = compose_recipe(arguments.objective, arguments.setting)
    if arguments.output is None:
        print(text, end="")
        return 0
    path = Path(arguments.output).expanduser()
    if path.exists():
        raise SimpoError(f"--output: {path} exists already; name a new file")
    write_text(path, text)
    print(f"recipe: {path}\nnext:   simpo train {shlex.quote(str(path))}")
    return 0
