"""Recipes: a YAML file and the command line become instances of dataclasses.

Every value travels as the text that the user wrote, whichever place it comes from, and one reader fits it
to the annotation of its field. So ``1e-6`` is a number and ``no`` a strategy, in the file as on the command
line, and every mistake can say where it was made.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from simpo.coercion import coerce, describe, nearest
from simpo.errors import SimpoError

logger = logging.getLogger(__name__)

# How a key is read that is no field: the name of the field that it sets, or a function from its value (as
# written) and all keys that are given, in either place, to the fields that it sets: none to drop it.
Alias = str | Callable[[Any, Set[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class _Setting:
    """A value that was given for a field.

    Attributes:
        key: the field.
        value: text, None, a list of these or, from the file, a mapping; True for an option without a value.
        place: where in the file it was given, ``recipe.yaml:12``; None for the command line.
        label: place and key as written, in front of what is wrong: ``recipe.yaml:12: beta`` or ``--beta``.
    """

    key: str
    value: Any
    place: str | None
    label: str


def parse_recipe(
    argv: list[str],
    types: tuple[type, ...],
    *,
    aliases: Mapping[str, Alias] | None = None,
    replaces: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Any, ...]:
    """Read ``[RECIPE.yaml] [--key value ...]`` into one instance of each of ``types``.

    The keys are the fields of the dataclasses, and the command line wins over the file. On it ``--key value``
    and ``--key=value`` are the same, ``--flag`` is true, a list is several values or JSON, a mapping is JSON,
    and ``null`` is None. Older and foreign spellings are mapped; keys that mean nothing any more are dropped,
    and so are reporting integrations that are not installed. Each is said once, as a warning of this module's
    logger.

    Args:
        argv: the arguments; the recipe, if any, comes first. ``--help`` anywhere prints the keys.
        types: dataclasses; their fields' annotations say what fits.
        aliases: further spellings, see :data:`Alias`.
        replaces: keys that exclude one another: a key and the others that say the same. Given in one place,
            they are an error; given in both, those of the command line replace those of the file.

    Raises:
        SimpoError: a file that cannot be read, a key that is unknown, missing or given twice, a value that
            does not fit, or a ValueError of a dataclass's ``__post_init__``; names the key and the place.
        SystemExit: with code 0, after ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        print(_help(types))
        raise SystemExit(0)
    path = argv[0] if argv and not argv[0].startswith("-") else None
    file = _read_file(path) if path is not None else []
    line = _read_command_line(argv if path is None else argv[1:])

    annotations = annotations_of(types)
    spellings = {**_spellings(annotations.keys()), **(aliases or {})}
    given = {setting.key for setting in (*file, *line)}
    settings = _merge(
        _resolve(file, annotations.keys(), spellings, given),
        _resolve(line, annotations.keys(), spellings, given),
        replaces or {},
    )
    values = {key: _fit(setting, annotations[key]) for key, setting in settings.items()}
    if "report_to" in values:
        values["report_to"] = _installed(values["report_to"], settings["report_to"].label)
    return tuple(_build(cls, values, settings) for cls in types)


# --- The file -----------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no key twice, a key or a date is text, ``1e-6`` is a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SimpoError(f"{self.name}:{line}: a key must be text")
            if key.value in lines:
                raise SimpoError(f"{self.name}:{line}: {key.value}: already given on line {lines[key.value]}")
            lines[key.value] = line
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_file(path: str) -> list[_Setting]:
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        loader.name = path
        return list(_settings(loader, path))
    except OSError as error:
        raise SimpoError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SimpoError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}:{mark.line + 1}"
        raise SimpoError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error


def _settings(loader: _Loader, path: str) -> Iterator[_Setting]:
    node = loader.get_single_node()
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise SimpoError(f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of keys to values")
    loader.flatten_mapping(node)  # merge keys (<<); what they bring comes first, so that own keys win
    found = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        found[key.value] = _Setting(key.value, _plain(loader, value), place, f"{place}: {key.value}")
    yield from found.values()


def _plain(loader: _Loader, node: yaml.Node) -> Any:
    """A scalar as its text (None for null), a list of these, or a mapping, its values typed by YAML."""
    value = loader.construct_object(node, deep=True)  # in any case, because it refuses what is unsafe
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item) for item in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value


# --- The command line ---------------------------------------------------------------------------------------


def _read_command_line(arguments: list[str]) -> list[_Setting]:
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values = given.setdefault(name.replace("-", "_"), [])
            if equals:
                values.append(value)
        elif values is None:
            raise SimpoError(f"{argument}: expected [RECIPE.yaml] [--key value ...]")
        else:
            values.append(argument)
    return [_Setting(key, _option_value(values), None, f"--{key}") for key, values in given.items()]


def _option_value(values: list[str]) -> Any:
    if not values:
        return True
    plain = [None if value == "null" else value for value in values]
    return plain[0] if len(plain) == 1 else plain


# --- Spellings ----------------------------------------------------------------------------------------------

# Names of one setting, the newest first. The first that is a field is used, the others are mapped to it.
_SAME = (
    ("eval_strategy", "evaluation_strategy"),
    ("dtype", "torch_dtype"),
    ("dataset_num_proc", "preprocessing_num_workers"),
    ("max_length", "max_seq_length"),
    ("hub_revision", "hub_model_revision"),
    ("use_cpu", "no_cuda"),
    # transformers 5.23 has both pairs and lets the new name win, even over the old one on the command line.
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)

# Gone from transformers 5 (a run never refuses its folder, weights are always safetensors, TensorBoard's
# folder is an environment variable), or another trainer's name for what simpo always does.
_MEANINGLESS = ("overwrite_output_dir", "save_safetensors", "logging_dir", "padding_free")


def _spellings(known: Set[str]) -> dict[str, Alias]:
    spellings: dict[str, Alias] = {key: lambda value, given: {} for key in _MEANINGLESS}
    spellings |= {"warmup_ratio": _warmup_ratio, "use_flash_attention_2": _use_flash_attention_2}
    spellings = {key: alias for key, alias in spellings.items() if key not in known}
    for names in _SAME:
        current = next((name for name in names if name in known), None)
        if current is not None:
            spellings |= {name: current for name in names if name != current}
    return spellings


def _warmup_ratio(value: Any, given: Set[str]) -> dict[str, Any]:
    # In transformers 5 warmup_steps below 1 is a share of the steps; from 1 on it would be a count.
    if coerce(value, float) >= 1:
        raise ValueError(f"{value} is not a share of the steps, which is below 1")
    return {"warmup_steps": value}


def _use_flash_attention_2(value: Any, given: Set[str]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if coerce(value, bool) else {}


def _resolve(
    settings: Iterable[_Setting], known: Set[str], spellings: Mapping[str, Alias], given: Set[str]
) -> dict[str, _Setting]:
    """The settings of one place by field, in today's spelling."""
    resolved: dict[str, _Setting] = {}
    for written in settings:
        for setting in _respell(written, spellings, given):
            if setting.key not in known:
                raise SimpoError(f"{setting.label}: unknown key{nearest(setting.key, {*known, *spellings})}")
            if setting.key in resolved:
                raise SimpoError(f"{setting.label}: the same as {resolved[setting.key].label}")
            resolved[setting.key] = setting
    return resolved


def _respell(setting: _Setting, spellings: Mapping[str, Alias], given: Set[str]) -> list[_Setting]:
    alias = spellings.get(setting.key)
    if alias is None:
        return [setting]
    if isinstance(alias, str):
        logger.warning("%s is read as %s", setting.label, alias)
        return [dataclasses.replace(setting, key=alias)]
    try:
        replacement = alias(setting.value, given)
    except ValueError as error:
        raise SimpoError(f"{setting.label}: {error}") from error
    if replacement:
        read_as = ", ".join(f"{key}: {value}" for key, value in replacement.items())
        logger.warning("%s is read as %s", setting.label, read_as)
    else:
        logger.warning("%s means nothing here and is dropped", setting.label)
    return [dataclasses.replace(setting, key=key, value=value) for key, value in replacement.items()]


def _merge(
    file: dict[str, _Setting], line: dict[str, _Setting], replaces: Mapping[str, tuple[str, ...]]
) -> dict[str, _Setting]:
    """The command line over the file, without those of the file that it replaces."""
    replaced: dict[str, str] = {}
    for one, other in ((key, other) for key, others in replaces.items() for other in others):
        for place in (file, line):
            if one in place and other in place:
                raise SimpoError(f"{place[one].label}: cannot be given together with {place[other].label}")
        if one in line:
            replaced[other] = one
        if other in line:
            replaced[one] = other
    for key, by in replaced.items():
        if key in file:
            logger.warning("%s is replaced by %s", file[key].label, line[by].label)
    return {key: setting for key, setting in file.items() if key not in replaced} | line


# --- The fields -------------------------------------------------------------------------------------------------


def annotations_of(classes: Iterable[type]) -> dict[str, Any]:
    """The type of every key of dataclasses, as values are fitted to it."""
    annotations = {}
    for cls in classes:
        hints = get_type_hints(cls)
        for field in fields_of(cls):
            # transformers annotates fsdp as text and says in argparse's words that it may be a flag as well.
            flag = field.metadata.get("const") is True
            annotations[field.name] = hints[field.name] | bool if flag else hints[field.name]
    return annotations


def fields_of(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that a recipe can set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def _fit(setting: _Setting, annotation: Any) -> Any:
    try:
        return coerce(setting.value, annotation)
    except ValueError as error:
        problem = "a value is missing" if setting.value is True else str(error)
        raise SimpoError(f"{setting.label}: {problem}") from error


def _installed(report_to: str | list[str] | None, label: str) -> str | list[str] | None:
    """The reporting integrations without those that are not installed, which the Trainer would refuse."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not names or names in (["all"], ["none"]):
        return report_to
    from transformers import integrations  # noqa: PLC0415  (slow: it looks for every integration)

    available = set(integrations.get_available_reporting_integrations())
    if integrations.is_flytekit_available():  # the one that get_available_reporting_integrations leaves out
        available.add("flyte")
    for name in names:
        if name not in integrations.INTEGRATION_TO_CALLBACK:
            hint = nearest(name, integrations.INTEGRATION_TO_CALLBACK)
            raise SimpoError(f"{label}: {name!r} is not a reporting integration of transformers{hint}")
        if name not in available:
            logger.warning("%s: %s is not installed and is dropped", label, name)
    return [name for name in names if name in available]


# --- The dataclasses ----------------------------------------------------------------------------------------


def _build(cls: type, values: Mapping[str, Any], settings: Mapping[str, _Setting]) -> Any:
    fields = fields_of(cls)
    for field in fields:
        if _is_required(field) and field.name not in values:
            raise SimpoError(f"{field.name} is missing: give it in the recipe or as --{field.name}")
    try:
        return cls(**{field.name: values[field.name] for field in fields if field.name in values})
    except ValueError as error:
        raise SimpoError(_located(str(error), settings)) from error


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _located(message: str, settings: Mapping[str, _Setting]) -> str:
    """The message in one line, after the place of the first setting that it names, if that is in the file."""
    named = (settings[word] for word in re.findall(r"\w+", message) if word in settings)
    first = next(named, None)
    text = " ".join(message.split())
    return text if first is None or first.place is None else f"{first.place}: {text}"


def _help(classes: Iterable[type]) -> str:
    """A line a field, under the class that declares it."""
    width = shutil.get_terminal_size((140, 24)).columns
    lines = ["arguments: [RECIPE.yaml] [--key value ...]   (the recipe has the same keys)"]
    for cls in classes:
        annotations = annotations_of([cls])
        remaining = {field.name: field for field in fields_of(cls)}
        for base in cls.__mro__:
            own = [remaining.pop(name) for name in inspect.get_annotations(base) if name in remaining]
            lines += ["", base.__name__] if own else []
            lines += [_help_line(field, annotations[field.name])[:width].rstrip() for field in own]
    return "\n".join(lines)


def _help_line(field: dataclasses.Field, annotation: Any) -> str:
    sentence = " ".join(field.metadata.get("help", "").split()).split(". ")[0]
    return f"  {field.name:<30}  {describe(annotation):<24.24}  {_default(field):<16.16}  {sentence}"


def _default(field: dataclasses.Field) -> str:
    if _is_required(field):
        return "required"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return str(default.value if isinstance(default, Enum) else default)
