"""``simpo recipe``, in a module of its own because other commands take seconds to import."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from simpo.config import parse_settings, setting
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES
from simpo.runs.files import write_text
from simpo.workflows.recipes import SETTINGS, compose_recipe


@dataclass
class RecipeSettings:
    """Recipe."""

    objective: str | None = setting(None, f"One of {', '.join(OBJECTIVES)}.")
    from_file: Path | None = setting(
        None, "Or --from: recipe of LLaMA-Factory, Axolotl, alignment-handbook or open-instruct to convert."
    )
    output: Path | None = setting(None, "New file to write the recipe to (default: print it).")
    setting: str | None = setting(None, f"One of {', '.join(SETTINGS)}.")


def recipe(argv: list[str]) -> None:
    """Print a recipe for an objective in one of the paper's settings, or convert another toolkit's recipe.

    examples:
      simpo recipe --objective dpo --setting llama3-base
      simpo recipe --from axolotl.yaml --output simpo.yaml
    """
    argv = [re.sub(r"^--from(?==|$)", "--from_file", argument) for argument in argv]  # "from" is a Python keyword
    (settings,) = parse_settings(argv, (RecipeSettings,), command="recipe", about=recipe.__doc__)
    command = "train"
    if settings.from_file is not None:
        if settings.objective is not None or settings.setting is not None:
            raise SimpoError("--from: the file sets the objective; leave --objective and --setting out")
        from simpo.workflows.conversion import convert  # noqa: PLC0415 - slow, and only --from needs it

        conversion = convert(settings.from_file)
        command, text = conversion.command, conversion.text(settings.from_file.name)
    else:
        for option in ("objective", "setting"):
            if getattr(settings, option) is None:
                raise SimpoError(f"--{option}: missing; give both --objective and --setting, or --from FILE")
        text = compose_recipe(settings.objective, settings.setting)
    path = settings.output
    if path is None:
        print(text, end="")
        return
    if path.exists():
        raise SimpoError(f"--output: {path} already exists; name a new file")
    write_text(path, text)
    print(f"recipe: {path}\nnext:   simpo {command} {shlex.quote(str(path))}")
