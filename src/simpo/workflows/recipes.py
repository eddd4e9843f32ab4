"""A complete recipe for any objective in any of the paper's settings, and the published values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from simpo.config.fields import nearest
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES

_TEMPLATES = Path(__file__).parent / "templates"  # a whole recipe each, with gaps
_TABLES = yaml.safe_load((_TEMPLATES / "settings.yaml").read_text(encoding="utf-8"))  # which explains its keys
_TINY = "tiny"


@dataclass(frozen=True)
class Setting:
    """A start model with its preference data."""

    stem: str
    title: str  # model and data in a few words
    model: str  # hub name or folder
    data: str
    max_length: int = 2048
    max_prompt_length: int | None = 1800


@dataclass(frozen=True)
class Searched:
    """Values that were tried, and the one to start from."""

    values: tuple[float, ...]
    start: float

    def __str__(self) -> str:
        return f"{{{', '.join(map(_number, self.values))}}}"


SETTINGS = {name: Setting(**fields) for name, fields in _TABLES["settings"].items()}
PAPER_SETTINGS = {name: setting for name, setting in SETTINGS.items() if name != _TINY}
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = _TABLES["published"]  # by objective and setting
SEARCHED: Mapping[str, Mapping[str, Searched]] = {
    objective: {name: Searched(**values) for name, values in hyperparameters.items()}
    for objective, hyperparameters in _TABLES["searched"].items()
}
LEARNING_RATE = Searched(**_TABLES["learning_rate"])

_OPTIONS = ("label_smoothing", "link", "length_normalized")  # variants of a loss, not written into recipes


def compose_recipe(objective: str, setting: str) -> str:
    """The recipe, as YAML text with comments.

    ``setting`` is one of :data:`~simpo.workflows.recipes.SETTINGS`.
    """
    for option, name, known in (("objective", objective, OBJECTIVES), ("setting", setting, SETTINGS)):
        if name not in known:
            hint = nearest(name, known) or f"; there are {', '.join(known)}"
            raise SimpoError(f"--{option}: {name!r} is unknown{hint}")
    chosen = SETTINGS[setting]
    template = _TEMPLATES / ("tiny.yaml" if setting == _TINY else "paper.yaml")
    gaps = vars(chosen) | {"objective": objective, "setting": setting, "paper": OBJECTIVES[objective].paper}
    gaps["name"] = chosen.stem.format(objective)
    gaps["hyperparameters"] = "\n".join(_hyperparameters(objective, setting))
    return Template(template.read_text(encoding="utf-8")).substitute(gaps)


def _hyperparameters(objective: str, setting: str) -> Iterator[str]:
    """A line for each of the objective's hyperparameters and for the learning rate, with the source of its value."""
    published = PUBLISHED.get(objective, {}).get(setting, {})
    searched = {} if setting == _TINY else SEARCHED.get(objective, {})  # for models of 7 to 9 billion weights
    defaults = {name: known.default for name, known in OBJECTIVES[objective].hyperparameters.items()}
    for name in (*defaults, "learning_rate"):
        if name in published:
            yield f"{name}: {_number(published[name])}  # published: github.com/princeton-nlp/SimPO, README"
        elif name in searched:
            start = _number(searched[name].start)
            yield f"{name}: {start}  # searched over {searched[name]} in the paper; start here and use simpo sweep"
        elif name in defaults and name not in _OPTIONS:
            yield f"{name}: {_number(defaults[name])}  # the objective's default; try others with simpo sweep"
    if setting == _TINY:
        rate = _number(_TABLES["tiny_learning_rate"])
        yield f"learning_rate: {rate}  # for a model this small; try others with simpo sweep"
    elif "learning_rate" not in published:
        yield (
            f"learning_rate: {_number(LEARNING_RATE.start)}  # of {LEARNING_RATE}, the grid that the README "
            "of github.com/princeton-nlp/SimPO advises; start here and use simpo sweep"
        )


def _number(value: float | str) -> str:
    """A number as YAML reads it, with a decimal point even before an exponent; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 and value else repr(float(value))
