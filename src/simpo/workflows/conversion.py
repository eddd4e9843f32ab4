"""``simpo recipe --from``: recipes of LLaMA-Factory, Axolotl, alignment-handbook and open-instruct as ours.

What a key means is in :mod:`simpo.config.foreign`, which ``simpo train`` uses as well, and in
:mod:`simpo.workflows.toolkits`. What has no counterpart becomes a comment with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simpo.config.fields import Key, Setting, fit, keys_of
from simpo.config.foreign import is_off, known_spellings
from simpo.config.parse import read_file
from simpo.errors import CombinedError, SimpoError
from simpo.judging.settings import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.objectives import OBJECTIVES
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import UNSUPPORTED, DataArguments
from simpo.workflows.toolkits import NOTE, TOOLKITS, Toolkit, implied_objective

CONFIGS = {"train": PreferenceConfig, "sft": SFTConfig, "reward": RewardConfig}
_DATA = ("dataset_name", "dataset_mixer", "dataset_mixture")
_PLAIN = re.compile(r"[\w./][\w./+\-]*")  # text that needs no quotes in YAML


@dataclass
class Conversion:
    """A converted recipe."""

    toolkit: str  # whose recipe it was
    command: str  # that trains it: `train`, `sft` or `reward`
    values: dict[str, tuple[Any, str]]  # keys of ours, as text or nested values, each with a comment
    gaps: list[str]  # what has no counterpart, with the line and the reason

    def text(self, source: str) -> str:
        """The recipe as YAML, its comments included."""
        head = [f"# Converted from {source} ({self.toolkit}). Start it with: simpo {self.command} THIS_FILE"]
        if self.gaps:
            head += ["#", "# Without counterpart; change what matters to you:", *(f"#   {gap}" for gap in self.gaps)]
        lines = [
            f"{key}: {_written(value)}" + (f"  # {comment}" if comment else "")
            for key, (value, comment) in self.values.items()
        ]
        return "\n".join([*head, "", *lines, ""])


def convert(path: Path) -> Conversion:
    """Convert a recipe."""
    mistakes: list[str] = []
    settings = read_file(str(path), mistakes)
    if mistakes:
        raise CombinedError(*mistakes)
    recipe = {setting.key: setting.value for setting in settings}
    toolkit = next((toolkit for toolkit in TOOLKITS if toolkit.marks & recipe.keys()), None)
    if toolkit is None:
        names = ", ".join(toolkit.name for toolkit in TOOLKITS)
        raise SimpoError(f"--from: {path} has no key that identifies a recipe of {names}")
    try:
        command = toolkit.command(recipe, path)
    except ValueError as error:
        raise SimpoError(f"--from: {path}: {error}") from error
    keys = keys_of((ModelArguments, DataArguments, CONFIGS[command], GenerationArguments))
    found = Conversion(toolkit.name, command, {}, [])
    for setting in settings:
        line = setting.place.rpartition(":")[2] if setting.place else "?"
        written = f"{setting.key}: {_written(setting.value)}"
        try:
            for name, value in _translated(setting, recipe, toolkit, keys):
                if name == NOTE:
                    found.gaps.append(f"line {line}: {setting.key}: {value}")
                    continue
                renamed = "" if name == setting.key else setting.key
                comment = renamed if value == setting.value else written
                if name in found.values and str(found.values[name][0]) != str(value):
                    raise ValueError(f"{name} is {found.values[name][0]} by {found.values[name][1] or 'its own key'}")
                found.values.setdefault(name, (value, comment if len(comment) < 80 else setting.key))
        except ValueError as error:
            found.gaps.append(f"line {line}: {written if len(written) < 80 else setting.key}: {error}")
    _complete(found, toolkit, path, keys, lost="objective" not in found.values and _names_a_loss(recipe))
    return found


def _translated(
    setting: Setting, recipe: Mapping[str, Any], toolkit: Toolkit, keys: Mapping[str, Key]
) -> Iterator[tuple[str, Any]]:
    """Keys of ours with their values, checked one by one; raises ValueError where there is no counterpart."""
    key, value = setting.key, setting.value
    if value is None:
        return
    alias = known_spellings(keys.keys()).get(key)
    if key in toolkit.rules:
        found = toolkit.rules[key](value, recipe)
    elif isinstance(alias, str) or (alias is None and key in keys):
        found = {alias or key: value}
    elif alias is not None:
        found = alias(value, recipe.keys())
    elif is_off(value):
        return
    else:
        raise ValueError("unknown here")
    for name, own in found.items():
        if name == NOTE:
            yield name, own
            continue
        if name not in keys:
            raise ValueError(f"means {name}, which this command does not have")
        fitting = fit(Setting(name, own, None, name), keys[name].annotation)
        only, why = UNSUPPORTED.get(name, (fitting, ""))
        if fitting != only and (fitting or only is True):
            raise ValueError(f"not supported ({why})")
        if name not in UNSUPPORTED:
            yield name, own


def _names_a_loss(recipe: Mapping[str, Any]) -> bool:
    return any(recipe.get(key) is not None for key in ("loss_type", "dpo_loss_type", "pref_loss"))


def _complete(found: Conversion, toolkit: Toolkit, path: Path, keys: Mapping[str, Key], *, lost: bool) -> None:
    """Add what the recipe leaves to the toolkit's defaults, and what it lacks.

    ``lost`` means that its loss has no counterpart, so that no default objective takes its place.
    """
    values, default = found.values, f"default of {toolkit.name}"
    if found.command == "train" and lost:
        found.gaps.append("objective is missing: add it")
    elif found.command == "train" and "objective" not in values:
        implied = implied_objective(toolkit, path)
        if implied is not None:
            values["objective"] = (implied, "by the recipe's folder" if implied in path.parts else default)
    defaults = dict(toolkit.defaults.get(found.command, {}))
    if "use_peft" in values:
        defaults |= toolkit.defaults.get("lora", {})
    if lost:
        defaults.pop("objective", None)
    hyperparameters = _hyperparameters(str(values.get("objective", (defaults.get("objective"),))[0]))
    for name, value in defaults.items():
        taken = name in values or (name == "gamma" and "gamma_beta_ratio" in values)
        if name in keys and not taken and (name in hyperparameters or name not in _ALL_HYPERPARAMETERS):
            values[name] = (value, default)
    if "beta" in values and "beta" not in hyperparameters and "objective" in values:
        weight = {"orpo": "lam", "ipo": "tau"}.get(str(values["objective"][0]))
        if weight is not None:  # TRL calls it beta
            values[weight] = (values.pop("beta")[0], "beta")
    for missing in ("model_name_or_path", "output_dir"):
        if missing not in values:
            found.gaps.append(f"{missing} is missing: add it")
    if not any(name in values for name in _DATA):
        found.gaps.append("dataset_name is missing: add a hub id, a file or a folder")


_ALL_HYPERPARAMETERS = {name for row in OBJECTIVES.values() for name in (*row.hyperparameters, *row.spellings)}


def _hyperparameters(objective: str) -> set[str]:
    row = OBJECTIVES.get(objective)
    return set() if row is None else {*row.hyperparameters, *row.spellings}


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.strip()
