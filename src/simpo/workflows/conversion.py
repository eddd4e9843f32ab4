"""``simpo recipe --from``: convert recipes from LLaMA-Factory, Axolotl, alignment-handbook and open-instruct.

:mod:`simpo.config.foreign` maps the common keys, here and in ``simpo train``; the rules specific to each toolkit are
below. A key without a counterpart becomes a comment that says why.
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

from simpo.config.fields import Key, Setting, coerce, convert_setting, keys_of
from simpo.config.foreign import is_off, known_spellings, reject
from simpo.config.parse import read_file
from simpo.errors import CombinedError, SimpoError
from simpo.judging.settings import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.objectives import OBJECTIVES
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import UNSUPPORTED, DataArguments

Recipe = Mapping[str, Any]  # keys and values of the other toolkit's recipe
# Maps a key's value and the whole recipe to our keys; raises ValueError if there is no counterpart.
Rule = Callable[[Any, Recipe], Mapping[str, Any]]
NOTE = "note"  # key in a rule's result for a remark about something left out

_TOOLKITS = yaml.safe_load((Path(__file__).parent / "templates/toolkits.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Toolkit:
    """A toolkit whose recipes can be converted; ``templates/toolkits.yaml`` has its marks and defaults."""

    name: str  # as printed, and as in toolkits.yaml
    # Maps a recipe and its path to the command that trains with it; raises ValueError if there is none.
    command: Callable[[Recipe, PurePath], str]
    rules: Mapping[str, Rule]  # by key

    @property
    def marks(self) -> Set[str]:
        """Keys that identify this toolkit's recipes."""
        return set(_TOOLKITS[self.name]["marks"])

    @property
    def defaults(self) -> Mapping[str, Mapping[str, Any]]:
        """Defaults that differ from ours, by command, and under ``lora`` for adapters."""
        return _TOOLKITS[self.name]["defaults"]


def _ignore(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {}


def _beta_rule(loss_key: str) -> Rule:
    """Return the rule for a beta key, which becomes ``lam`` for ORPO and ``tau`` for IPO."""
    return lambda value, recipe: {{"orpo": "lam", "ipo": "tau"}.get(str(recipe.get(loss_key)), "beta"): value}


# ---- LLaMA-Factory.


def _llama_factory_command(recipe: Recipe, path: PurePath) -> str:
    commands = {"dpo": "train", "kto": "train", "sft": "sft", "rm": "reward"}
    stage = str(recipe.get("stage", "sft"))
    if stage not in commands:
        raise ValueError(f"stage: {stage} has no counterpart; only {', '.join(commands)} can be converted")
    return commands[stage]


_registered_dataset = partial(
    reject, "names an entry of LLaMA-Factory's dataset_info.json; set dataset_name to a hub id, file or folder"
)
_named_template = partial(
    reject, "the model's own chat template is used; if it has none, set chat_template to a template or a file with one"
)


def _validation_size(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    raise ValueError(f"set dataset_mixture to the dataset with test_split_size: {value}")


_LLAMA_FACTORY = Toolkit(
    "LLaMA-Factory",
    _llama_factory_command,
    {
        "pref_beta": _beta_rule("pref_loss"),
        "dataset": _registered_dataset,
        "eval_dataset": _registered_dataset,
        "template": _named_template,
        "val_size": _validation_size,
    },
)

# ---- Axolotl.


def _axolotl_command(recipe: Recipe, path: PurePath) -> str:
    rl = recipe.get("rl")
    if not is_off(rl):
        if rl not in ("dpo", "ipo", "simpo", "orpo", "kto"):
            raise ValueError(f"rl: {rl} has no counterpart")
        return "train"
    return "sft" if is_off(recipe.get("reward_model")) else "reward"


def _mixture_entry(source: Any) -> dict[str, Any]:
    """Convert one of Axolotl's datasets to an entry of ``dataset_mixture``."""
    if not isinstance(source, Mapping) or not source.get("path"):
        raise ValueError("a dataset has no path; set dataset_name")
    path = source["path"]
    if path in ("json", "csv", "parquet", "arrow") and source.get("data_files"):
        files = source["data_files"]
        path = files if isinstance(files, str) else files[0] if len(files) == 1 else None
    if path is None:
        raise ValueError("several data_files; set dataset_mixture with one entry per file")
    return {"id": path, "config": source.get("name"), "split": source.get("split")}


def _mixture_entries(sources: Any) -> list[dict[str, Any]]:
    if sources and not isinstance(sources, list):
        raise ValueError("expected a list of datasets")
    return [_mixture_entry(source) for source in sources or ()]


def _dropped_keys_note(sources: Any) -> dict[str, str]:
    """Return a note on keys of Axolotl's datasets that have no counterpart."""
    supported = {"path", "name", "split", "data_files", "ds_type", "type", "revision", "trust_remote_code"}
    dropped = sorted({key for source in sources for key, value in source.items() if key not in supported and value})
    kinds = [str(source.get("type")) for source in sources]
    dropped += [f"type {kind}" for kind in kinds if not kind.startswith(("chat_template", "chatml", "llama3", "None"))]
    if not dropped:
        return {}
    return {
        NOTE: f"{', '.join(dropped)}: rows are recognized by their columns (rename them with column_mapping) and "
        "rendered with the chat template"
    }


def _datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _mixture_entries(value)
    if not entries:
        return {}
    note = _dropped_keys_note(value)
    size = recipe.get("val_set_size")
    if len(entries) == 1 and is_off(size):
        names = ("dataset_name", "dataset_config", "dataset_train_split")
        return note | {key: item for key, item in zip(names, entries[0].values(), strict=True) if item is not None}
    mixture: dict[str, Any] = {
        "datasets": [{key: item for key, item in entry.items() if item is not None} for entry in entries]
    }
    if not is_off(size):
        mixture["test_split_size"] = coerce(str(size), int | float)
    return note | {"dataset_mixture": mixture}


def _test_datasets(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    entries = _mixture_entries(value)
    if not entries:
        return {}
    if len(entries) > 1:
        raise ValueError("only one held-out dataset is supported; set eval_dataset_name to it")
    entry = entries[0]
    split = {"dataset_test_split": entry["split"]} if entry["split"] else {}
    note = {NOTE: f"name {entry['config']}: not supported for held-out datasets"} if entry["config"] else {}
    return {"eval_dataset_name": entry["id"], **split, **note}


def _per_epoch(name: str) -> Rule:
    """Return the rule that converts a number of times per epoch to a fraction of all steps."""

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
    return _named_template(value, recipe)


def _special_tokens(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("expected a mapping of names to tokens")
    unsupported = [str(name) for name in value or {} if name != "pad_token"]  # padding is never scored
    if unsupported:
        raise ValueError(f"{', '.join(unsupported)}: change the tokenizer in the model's folder instead")
    return {}


def _precision(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"bf16": "true" if str(value).lower() in ("auto", "full") else value}


def _fsdp(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {"fsdp": " ".join(map(str, value)) if isinstance(value, list) else value} if value else {}


_cpo_alpha = partial(reject, "set sft_weight, which averages within each response and then over pairs")

_AXOLOTL = Toolkit(
    "Axolotl",
    _axolotl_command,
    {
        "datasets": _datasets, "test_datasets": _test_datasets, "val_set_size": _ignore, "rl_beta": _beta_rule("rl"),
        "evals_per_epoch": _per_epoch("eval"), "saves_per_epoch": _per_epoch("save"),
        "chat_template": _axolotl_template, "chat_template_jinja": _ignore, "special_tokens": _special_tokens,
        "bf16": _precision, "reward_model": _ignore, "cpo_alpha": _cpo_alpha, "fsdp": _fsdp, "strict": _ignore,
        "shuffle_merged_datasets": _ignore, "remove_unused_columns": _ignore,
    },
)  # fmt: skip

# ---- open-instruct.


def _open_instruct_command(recipe: Recipe, path: PurePath) -> str:
    has_preference_key = bool({"beta", "loss_type", "dpo_beta", "dpo_loss_type"} & recipe.keys())
    return "train" if has_preference_key or any("dpo" in part for part in path.parts) else "sft"


def _mixer_list(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if not isinstance(value, list) or len(value) % 2:
        raise ValueError("expected a list that alternates datasets and fractions")
    return _mixer(dict(zip(value[::2], value[1::2], strict=True)), recipe)


def _mixer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value and not isinstance(value, Mapping):
        raise ValueError("expected a mapping of datasets to fractions")
    shares = {name: coerce(str(share), float) for name, share in (value or {}).items()}
    if not any(share > 1 for share in shares.values()):
        return {"dataset_mixer": shares, "dataset_splits": ["train"]} if shares else {}
    # open-instruct reads a whole number above 1 as a number of rows.
    entries = [
        {"id": name, "split": f"train[:{share:.0f}]"} if share > 1 else {"id": name, "weight": share}
        for name, share in shares.items()
    ]
    return {
        "dataset_mixture": {"datasets": entries},
        NOTE: "a number of rows selects the first rows instead of a random sample",
    }


def _same_tokenizer(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if value != recipe.get("model_name_or_path"):
        raise ValueError("the tokenizer is loaded with the model; put it into the model's folder")
    return {}


def _checkpointing_steps(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    if is_off(value):
        return {}
    return {"save_strategy": "epoch"} if value == "epoch" else {"save_strategy": "steps", "save_steps": value}


def _tracking(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    return {} if is_off(value) or "report_to" in recipe else {"report_to": "wandb"}


def _open_instruct_loss(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = str(value)
    if name not in ("dpo", "dpo_norm", "simpo"):
        raise ValueError(f"{name} has no counterpart")
    return {"objective": name}


_OPEN_INSTRUCT = Toolkit(
    "open-instruct",
    _open_instruct_command,
    {
        "dataset_mixer": _mixer, "dataset_mixer_list": _mixer_list, "tokenizer_name": _same_tokenizer,
        "tokenizer_name_or_path": _same_tokenizer, "checkpointing_steps": _checkpointing_steps,
        "with_tracking": _tracking, "loss_type": _open_instruct_loss, "dpo_loss_type": _open_instruct_loss,
        "dataset_mixer_list_splits": lambda value, recipe: {"dataset_splits": value},
    },
)  # fmt: skip

# ---- alignment-handbook.


def _handbook_command(recipe: Recipe, path: PurePath) -> str:
    has_preference_key = bool({"beta", "loss_type", "gamma_beta_ratio", "max_prompt_length"} & recipe.keys())
    return "train" if has_preference_key or _handbook_folder(path) in ("dpo", "orpo", "simpo") else "sft"


def _handbook_folder(path: PurePath) -> str:
    return next((part for part in path.parts if part in ("dpo", "orpo", "sft", "simpo")), "")


_TRL_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "apo_zero": "apo_zero", "apo_down": "apo_down"}


def _trl_loss(value: Any, recipe: Recipe) -> Mapping[str, Any]:
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    objective = _TRL_LOSSES.get(str(name))
    if objective is None:
        raise ValueError(f"{name} has no counterpart")
    return {"objective": objective} | ({"length_normalized": "true"} if objective == "ipo" else {})


_HANDBOOK = Toolkit(
    "alignment-handbook",
    _handbook_command,
    {"loss_type": _trl_loss, "eos_token": lambda value, recipe: _special_tokens({"eos_token": value}, recipe)},
)

TOOLKITS = (_LLAMA_FACTORY, _AXOLOTL, _OPEN_INSTRUCT, _HANDBOOK)


# ---- The conversion.

CONFIGS = {"train": PreferenceConfig, "sft": SFTConfig, "reward": RewardConfig}
_DATA_KEYS = ("dataset_name", "dataset_mixer", "dataset_mixture")
_UNQUOTED = re.compile(r"[\w./][\w./+\-]*")  # text that needs no quotes in YAML


@dataclass
class Conversion:
    """A converted recipe."""

    toolkit: str  # the toolkit it was written for
    command: str  # the command that trains with it: `train`, `sft` or `reward`
    values: dict[str, tuple[Any, str]]  # our keys, each with a value (text or nested) and a comment
    gaps: list[str]  # settings without a counterpart, with line and reason

    def text(self, source: str) -> str:
        """Return the recipe as YAML with comments."""
        head = [f"# Converted from {source} ({self.toolkit}). Start it with: simpo {self.command} THIS_FILE"]
        if self.gaps:
            head += ["#", "# Not converted; set what matters to you by hand:", *(f"#   {gap}" for gap in self.gaps)]
        lines = [
            f"{key}: {_to_yaml(value)}" + (f"  # {comment}" if comment else "")
            for key, (value, comment) in self.values.items()
        ]
        return "\n".join([*head, "", *lines, ""])


def convert(path: Path) -> Conversion:
    """Convert the recipe in the file ``path``."""
    mistakes: list[str] = []
    settings = read_file(str(path), mistakes)
    if mistakes:
        raise CombinedError(*mistakes)
    recipe = {setting.key: setting.value for setting in settings}
    toolkit = next((toolkit for toolkit in TOOLKITS if toolkit.marks & recipe.keys()), None)
    if toolkit is None:
        names = ", ".join(toolkit.name for toolkit in TOOLKITS)
        raise SimpoError(f"--from: {path} has no key that identifies it as a recipe of {names}")
    try:
        command = toolkit.command(recipe, path)
    except ValueError as error:
        raise SimpoError(f"--from: {path}: {error}") from error
    keys = keys_of((ModelArguments, DataArguments, CONFIGS[command], GenerationArguments))
    conversion = Conversion(toolkit.name, command, {}, [])
    values, gaps = conversion.values, conversion.gaps
    for setting in settings:
        line = setting.place.rpartition(":")[2] if setting.place else "?"
        original = f"{setting.key}: {_to_yaml(setting.value)}"
        try:
            for name, value in _translate(setting, recipe, toolkit, keys):
                if name == NOTE:
                    gaps.append(f"line {line}: {setting.key}: {value}")
                    continue
                renamed = "" if name == setting.key else setting.key
                comment = renamed if value == setting.value else original
                if name in values and str(values[name][0]) != str(value):
                    raise ValueError(f"{name} is already {values[name][0]}, set by {values[name][1] or 'its own key'}")
                values.setdefault(name, (value, comment if len(comment) < 80 else setting.key))
        except ValueError as error:
            gaps.append(f"line {line}: {original if len(original) < 80 else setting.key}: {error}")
    loss_lost = "objective" not in values and _names_a_loss(recipe)
    _add_defaults(conversion, toolkit, path, keys, loss_lost=loss_lost)
    return conversion


def _translate(
    setting: Setting, recipe: Recipe, toolkit: Toolkit, keys: Mapping[str, Key]
) -> Iterator[tuple[str, Any]]:
    """Yield our keys and validated values for a setting; raises ValueError if it has no counterpart."""
    key, value = setting.key, setting.value
    if value is None:
        return
    alias = known_spellings(keys.keys()).get(key)
    if key in toolkit.rules:
        translated = toolkit.rules[key](value, recipe)
    elif isinstance(alias, str) or (alias is None and key in keys):
        translated = {alias or key: value}
    elif alias is not None:
        translated = alias(value, recipe.keys())
    elif is_off(value):
        return
    else:
        raise ValueError("unknown key")
    for name, ours in translated.items():
        if name == NOTE:
            yield name, ours
            continue
        if name not in keys:
            raise ValueError(f"means {name}, which this command does not have")
        parsed = convert_setting(Setting(name, ours, None, name), keys[name].annotation)
        allowed, why = UNSUPPORTED.get(name, (parsed, ""))
        if parsed != allowed and (parsed or allowed is True):
            raise ValueError(f"not supported ({why})")
        if name not in UNSUPPORTED:
            yield name, ours


def _names_a_loss(recipe: Recipe) -> bool:
    return any(recipe.get(key) is not None for key in ("loss_type", "dpo_loss_type", "pref_loss"))


def _add_defaults(
    conversion: Conversion, toolkit: Toolkit, path: Path, keys: Mapping[str, Key], *, loss_lost: bool
) -> None:
    """Fill in the toolkit's defaults, and note required keys that are missing.

    ``loss_lost`` means that the recipe's loss has no counterpart; it is not replaced by a default objective.
    """
    values, gaps, default = conversion.values, conversion.gaps, f"{toolkit.name}'s default"
    if conversion.command == "train" and loss_lost:
        gaps.append("objective is missing: add it")
    elif conversion.command == "train" and "objective" not in values and toolkit is _HANDBOOK:
        folder = _handbook_folder(path)  # the handbook's training script depends on the folder
        is_objective = folder in ("dpo", "orpo", "simpo")
        values["objective"] = (folder, "from the recipe's folder") if is_objective else ("dpo", default)
    defaults = dict(toolkit.defaults.get(conversion.command, {}))
    if "use_peft" in values:
        defaults |= toolkit.defaults.get("lora", {})
    if loss_lost:
        defaults.pop("objective", None)
    hyperparameters = _hyperparameters(str(values.get("objective", (defaults.get("objective"),))[0]))
    for name, value in defaults.items():
        is_set = name in values or (name == "gamma" and "gamma_beta_ratio" in values)
        if name in keys and not is_set and (name in hyperparameters or name not in _ALL_HYPERPARAMETERS):
            values[name] = (value, default)
    if "beta" in values and "beta" not in hyperparameters and "objective" in values:
        weight = {"orpo": "lam", "ipo": "tau"}.get(str(values["objective"][0]))
        if weight is not None:  # TRL calls this weight beta
            values[weight] = (values.pop("beta")[0], "beta")
    for missing in ("model_name_or_path", "output_dir"):
        if missing not in values:
            gaps.append(f"{missing} is missing: add it")
    if not any(name in values for name in _DATA_KEYS):
        gaps.append("dataset_name is missing: add a hub id, a file or a folder")


def _hyperparameters(objective: str) -> set[str]:
    row = OBJECTIVES.get(objective)
    return set() if row is None else {*row.hyperparameters, *row.aliases}


_ALL_HYPERPARAMETERS = set().union(*map(_hyperparameters, OBJECTIVES))


def _to_yaml(value: Any) -> str:
    """Format a value as YAML on one line."""
    if isinstance(value, str):
        return value if _UNQUOTED.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.strip()
