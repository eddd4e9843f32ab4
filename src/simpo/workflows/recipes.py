"""Complete recipes for any objective in any of the paper's settings, with the published values behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from simpo.config.fields import nearest
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES

_TEMPLATES = Path(__file__).parent / "templates"  # complete recipes with $placeholders
_TABLES = yaml.safe_load((_TEMPLATES / "settings.yaml").read_text(encoding="utf-8"))  # keys are explained in the file
_TINY = "tiny"


@dataclass(frozen=True)
class Setting:
    """An initial model and its preference data."""

    stem: str
    title: str  # model and data in a few words
    model: str  # hub name or folder
    data: str
    max_length: int = 2048
    max_prompt_length: int | None = 1800


@dataclass(frozen=True)
class Searched:
    """The values of a published search, and the one to start from."""

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

_OPTIONS = ("label_smoothing", "link", "length_normalized")  # loss variants; not written into recipes
_ADVICE = "start here and tune with simpo sweep"


def compose_recipe(objective: str, setting: str) -> str:
    """Return a recipe as YAML text with comments; ``setting`` is a key of :data:`SETTINGS`."""
    for option, name, known in (("objective", objective, OBJECTIVES), ("setting", setting, SETTINGS)):
        if name not in known:
            hint = nearest(name, known) or f"; choose from {', '.join(known)}"
            raise SimpoError(f"--{option}: {name!r} is unknown{hint}")
    chosen = SETTINGS[setting]
    template = _TEMPLATES / ("tiny.yaml" if setting == _TINY else "paper.yaml")
    values = vars(chosen) | {"objective": objective, "setting": setting, "paper": OBJECTIVES[objective].paper}
    values["name"] = chosen.stem.format(objective)
    values["hyperparameters"] = "\n".join(_hyperparameters(objective, setting))
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _hyperparameters(objective: str, setting: str) -> Iterator[str]:
    """Yield a line for each hyperparameter and for the learning rate, with the source of its value as a comment."""
    published = PUBLISHED.get(objective, {}).get(setting, {})
    searched = {} if setting == _TINY else SEARCHED.get(objective, {})  # only apply to models with 7B to 9B parameters
    defaults = {name: known.default for name, known in OBJECTIVES[objective].hyperparameters.items()}
    for name in (*defaults, "learning_rate"):
        if name in published:
            yield f"{name}: {_number(published[name])}  # published: github.com/princeton-nlp/SimPO, README"
        elif name in searched:
            values = searched[name]
            yield f"{name}: {_number(values.start)}  # searched over {values} in the paper; {_ADVICE}"
        elif name in defaults and name not in _OPTIONS:
            yield f"{name}: {_number(defaults[name])}  # the objective's default; tune with simpo sweep"
    if setting == _TINY:
        rate = _number(_TABLES["tiny_learning_rate"])
        yield f"learning_rate: {rate}  # for a model this small; tune with simpo sweep"
    elif "learning_rate" not in published:
        yield (
            f"learning_rate: {_number(LEARNING_RATE.start)}  # from {LEARNING_RATE}, the grid recommended in "
            f"the README of github.com/princeton-nlp/SimPO; {_ADVICE}"
        )


def _number(value: float | str) -> str:
    """Format a number for YAML, which requires a decimal point before an exponent; return text unchanged."""
    if isinstance(value, str):
        return value
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 and value else repr(float(value))
