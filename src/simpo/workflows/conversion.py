"""``simpo recipe --from``: recipes of LLaMA-Factory, Axolotl, alignment-handbook and open-instruct as ours.

What a key means is in :mod:`simpo.config.foreign`, which ``simpo train`` uses as well; the rules of each
toolkit are below. What has no counterpart becomes a comment with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import yaml

from simpo.config.fields import Key, Setting, coerce, fit, keys_of
from simpo.config.foreign import is_off, known_spellings, reject
from simpo.config.parse import read_file
from simpo.errors import CombinedError, SimpoError
from simpo.judging.settings import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.objectives import OBJECTIVES
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import UNSUPPORTED, DataArguments

# A key's value and all keys with their values to keys of ours; raises ValueError where there is no counterpart.
Rule = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
Recipe = Mapping[str, Any]  # all keys with their values
NOTE = "note"  # among a rule's results, a remark about what is left out


_TOOLKITS = yaml.safe_load((Path(__file__).parent / "templates/toolkits.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Toolkit:
    """A toolkit whose recipes are converted; its other properties are in ``templates/toolkits.yaml``."""

    name: str  # what it is called
    # The command that trains with a recipe, from its keys and path; ValueError if there is none.
    command: Callable[[Recipe, PurePath], str]
    rules: Mapping[str, Rule]  # by their key

    @property
    def marks(self) -> Set[str]:
        """Keys that identify a recipe of this toolkit."""
        return set(_TOOLKITS[self.name]["marks"])

    @property
    def defaults(self) -> Mapping[str, Mapping[str, Any]]:
        """The toolkit's defaults where they differ from ours, by command and for adapters (``lora``)."""
        return _TOOLKITS[self.name]["defaults"]


def _nothing(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {}


def _beta_of(loss_key: str) -> Rule:
    """A key for beta, which ORPO and IPO call by another name here."""
    return lambda value, recipe: {{"orpo": "lam", "ipo": "tau"}.get(str(recipe.get(loss_key)), "beta"): value}


# ---- LLaMA-Factory.


def _llama_factory_command(recipe: Recipe, path: PurePath) -> str:
    commands = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}
    stage = str(recipe.get("stage", "sft"))
    if stage not in commands:
        raise ValueError(f"stage: {stage} has no counterpart here; there are {', '.join(commands)}")
    return commands[stage]


_registered = partial(
    reject, "names of LLaMA-Factory's dataset_info.json; write dataset_name with the hub id, file or folder"
)
_template = partial(
    reject,
    "the model's own chat template is used; if it has none, write chat_template with a template or a file of one",
)


def _held_out_share(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    raise ValueError(f"write dataset_mixture with the data set and test_split_size: {value}")


_LLAMA_FACTORY = Toolkit(
    "LLaMA-Factory",
    _llama_factory_command,
    {
        "pref_beta": _beta_of("pref_loss"),
        "dataset": _registered,
        "eval_dataset": _registered,
        "template": _template,
        "val_size": _held_out_share,
    },
)

# ---- Axolotl.


def _axolotl_command(recipe: Recipe, path: PurePath) -> str:
    rl = recipe.get("rl")
    if not is_off(rl):
        if rl not in ("dpo", "ipo", "simpo", "orpo", "kto"):
            raise ValueError(f"rl: {rl} has no counterpart in these commands")
        return "train"
    return "sft" if is_off(recipe.get("reward_model")) else "reward"


def _entry(source: Any) -> dict[str, Any]:
    """One of Axolotl's data sets as one of ``dataset_mixture``."""
    if not isinstance(source, Mapping) or not source.get("path"):
        raise ValueError("a data set without path; write dataset_name")
    path = source["path"]
    if path in ("json", "csv", "parquet", "arrow") and source.get("data_files"):
        files = source["data_files"]
        path = files if isinstance(files, str) else files[0] if len(files) == 1 else None
    if path is None:
        raise ValueError("several data_files; write dataset_mixture with an entry for each")
    return {"id": path, "config": source.get("name"), "split": source.get("split")}


def _entries(sources: Any) -> list[dict[str, Any]]:
    if sources and not isinstance(sources, list):
        raise ValueError("not a list of data sets")
    return [_entry(source) for source in sources or ()]


def _left_out(sources: Any) -> dict[str, str]:
    """A remark about keys of Axolotl's data sets that have no counterpart."""
    kept = {"path", "name", "split", "data_files", "ds_type", "type", "revision", "trust_remote_code"}
    others = sorted({key for source in sources for key, value in source.items() if key not in kept and value})
    kinds = [str(source.get("type")) for source in sources]
    others += [f"type {kind}" for kind in kinds if not kind.startswith(("chat_template", "chatml", "llama3", "None"))]
    if not others:
        return {}
    return {
        NOTE: f"{', '.join(others)}: rows are recognized by their columns (column_mapping renames them) and rendered "
        "with the chat template"
    }


def _datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _entries(value)
    if not entries:
        return {}
    note = _left_out(value)
    size = recipe.get("val_set_size")
    if len(entries) == 1 and is_off(size):
        own = dict(zip(("dataset_name", "dataset_config", "dataset_train_split"), entries[0].values(), strict=True))
        return note | {key: item for key, item in own.items() if item is not None}
    mixture: dict[str, Any] = {
        "datasets": [{key: item for key, item in entry.items() if item is not None} for entry in entries]
    }
    if not is_off(size):
        mixture["test_split_size"] = coerce(str(size), int | float)
    return note | {"dataset_mixture": mixture}


def _test_datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _entries(value)
    if not entries:
        return {}
    if len(entries) > 1:
        raise ValueError("write eval_dataset_name with one data set")
    entry = entries[0]
    split = {"dataset_test_split": entry["split"]} if entry["split"] else {}
    note = {NOTE: f"name {entry['config']}: a held-out data set has no configuration here"} if entry["config"] else {}
    return {"eval_dataset_name": entry["id"], **split, **note}


def _per_epoch(name: str) -> Rule:
    """A number of times per epoch as a share of all steps."""

    def rule(value: Any, recipe: Recipe) -> Mapping[str, Any]:
        if is_off(value):
            return {f"{name}_strategy": "no"}
        times = coerce(str(value), float) * coerce(str(recipe.get("num_epochs", 1)), float)
        if times <= 1:
            return {f"{name}_strategy": "epoch"}
        return {f"{name}_strategy": "steps", f"{name}_steps": f"{1 / times:.6g}"}

    return rule


def _axolotl_template(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value == "tokenizer_default":
        return {}
    if value == "jinja" or is_off(value):
        return {"chat_template": recipe["chat_template_jinja"]} if recipe.get("chat_template_jinja") else {}
    return _template(value, recipe)


def _special_tokens(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("not tokens by name")
    others = [str(name) for name in value or {} if name != "pad_token"]  # padding is never scored
    if others:
        raise ValueError(f"{', '.join(others)}: change the tokenizer in the model's folder")
    return {}


def _precision(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"bf16": "true" if str(value).lower() in ("auto", "full") else value}


def _fsdp(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"fsdp": " ".join(map(str, value)) if isinstance(value, list) else value} if value else {}


_cpo_alpha = partial(reject, "write sft_weight, which is averaged within a response and then over pairs")

_AXOLOTL = Toolkit(
    "Axolotl",
    _axolotl_command,
    {
        "datasets": _datasets, "test_datasets": _test_datasets, "val_set_size": _nothing, "rl_beta": _beta_of("rl"),
        "evals_per_epoch": _per_epoch("eval"), "saves_per_epoch": _per_epoch("save"),
        "chat_template": _axolotl_template, "chat_template_jinja": _nothing, "special_tokens": _special_tokens,
        "bf16": _precision, "reward_model": _nothing, "cpo_alpha": _cpo_alpha, "fsdp": _fsdp, "strict": _nothing,
        "shuffle_merged_datasets": _nothing, "remove_unused_columns": _nothing,
    },
)  # fmt: skip

# ---- open-instruct.


def _open_instruct_command(recipe: Recipe, path: PurePath) -> str:
    preference = {"beta", "loss_type", "dpo_beta", "dpo_loss_type"} & recipe.keys()
    return "train" if preference or any("dpo" in part for part in path.parts) else "sft"


def _mixer_list(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) % 2:
        raise ValueError("not a list of data sets and fractions")
    return _mixer(dict(zip(value[::2], value[1::2], strict=True)), recipe)


def _mixer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("not data sets with their fractions")
    shares = {name: coerce(str(share), float) for name, share in (value or {}).items()}
    if not any(share > 1 for share in shares.values()):
        return {"dataset_mixer": shares, "dataset_splits": ["train"]} if shares else {}
    # A whole number above 1 is a number of rows there.
    entries = [
        {"id": name, "split": f"train[:{share:.0f}]"} if share > 1 else {"id": name, "weight": share}
        for name, share in shares.items()
    ]
    return {
        "dataset_mixture": {"datasets": entries},
        NOTE: "where a number of rows is given, the first ones are taken instead of a random sample",
    }


def _same_tokenizer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value != recipe.get("model_name_or_path"):
        raise ValueError("the tokenizer is the model's own; put it into the model's folder")
    return {}


def _checkpointing_steps(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    return {"save_strategy": "epoch"} if value == "epoch" else {"save_strategy": "steps", "save_steps": value}


def _tracking(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {} if is_off(value) or "report_to" in recipe else {"report_to": "wandb"}


def _trained_by_dpo(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = str(value)
    if name not in ("dpo", "dpo_norm", "simpo"):
        raise ValueError(f"{name} has no counterpart here")
    return {"objective": name}


_OPEN_INSTRUCT = Toolkit(
    "open-instruct",
    _open_instruct_command,
    {
        "dataset_mixer": _mixer, "dataset_mixer_list": _mixer_list, "tokenizer_name": _same_tokenizer,
        "tokenizer_name_or_path": _same_tokenizer, "checkpointing_steps": _checkpointing_steps,
        "with_tracking": _tracking, "loss_type": _trained_by_dpo, "dpo_loss_type": _trained_by_dpo,
        "dataset_mixer_list_splits": lambda value, recipe: {"dataset_splits": value},
    },
)  # fmt: skip

# ---- alignment-handbook.


def _handbook_command(recipe: Recipe, path: PurePath) -> str:
    preference = {"beta", "loss_type", "gamma_beta_ratio", "max_prompt_length"} & recipe.keys()
    return "train" if preference or _handbook_folder(path) in ("dpo", "orpo", "simpo") else "sft"


def _handbook_folder(path: PurePath) -> str:
    return next((part for part in path.parts if part in ("dpo", "orpo", "sft", "simpo")), "")


_TRL_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "apo_zero": "apo_zero", "apo_down": "apo_down"}


def _trl_loss(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    ours = _TRL_LOSSES.get(str(name))
    if ours is None:
        raise ValueError(f"{name} has no counterpart here")
    return {"objective": ours} | ({"length_normalized": "true"} if ours == "ipo" else {})


_HANDBOOK = Toolkit(
    "alignment-handbook",
    _handbook_command,
    {"loss_type": _trl_loss, "eos_token": lambda value, recipe: _special_tokens({"eos_token": value}, recipe)},
)

TOOLKITS = (_LLAMA_FACTORY, _AXOLOTL, _OPEN_INSTRUCT, _HANDBOOK)


# ---- The conversion.

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
    elif found.command == "train" and "objective" not in values and toolkit is _HANDBOOK:
        folder = _handbook_folder(path)  # whose script trains with its objective
        named = folder in ("dpo", "orpo", "simpo")
        values["objective"] = (folder, "by the recipe's folder") if named else ("dpo", default)
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
