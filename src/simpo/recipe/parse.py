"""From a file and a command line to dataclasses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any

from simpo.errors import CombinedError, SimpoError
from simpo.recipe.command_line import read_command_line
from simpo.recipe.fields import annotations_of, build, check_installed, fields_of, fit, is_required
from simpo.recipe.file import read_file
from simpo.recipe.foreign import paper_settings, unclear_objective
from simpo.recipe.help import help_text
from simpo.recipe.setting import Setting
from simpo.recipe.spellings import Alias, known_spellings, resolve

logger = logging.getLogger(__package__)


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
    and ``null`` is None. Older and foreign spellings are mapped, and keys that mean nothing here are dropped,
    each with a warning of the package's logger. All mistakes are reported together.

    Args:
        argv: the arguments; the recipe, if any, comes first. ``--help`` anywhere prints the keys.
        types: dataclasses; their fields' annotations say what fits.
        aliases: further spellings, see :data:`~simpo.recipe.spellings.Alias`.
        replaces: keys that exclude one another: a key and the others that say the same. Given in one place,
            they are an error; given in both, those of the command line replace those of the file.

    Raises:
        SimpoError: a file that cannot be read, keys that are unknown, missing or given twice, values that do not
            fit, an experiment tracker that is not installed, or a ValueError of a dataclass's ``__post_init__``;
            names every key with its place.
        SystemExit: with code 0, after ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(types))
        raise SystemExit(0)
    path = argv[0] if argv and not argv[0].startswith("-") else None
    mistakes: list[str] = []
    file = read_file(path, mistakes) if path is not None else []
    line = read_command_line(argv if path is None else argv[1:])

    annotations = annotations_of(types)
    spellings = {**known_spellings(annotations.keys()), **(aliases or {})}
    in_file = {setting.key for setting in file}
    given = in_file | {setting.key for setting in line}
    if "objective" in annotations:
        mistakes += unclear_objective({setting.key: setting.value for setting in (*file, *line)})
    settings = _merge(
        resolve(file, annotations.keys(), spellings, given, mistakes),
        resolve(line, annotations.keys(), spellings, given, mistakes),
        replaces or {},
    )
    settings |= _implied(path, in_file, given, annotations.keys())
    values = {}
    for key, setting in settings.items():
        try:
            values[key] = fit(setting, annotations[key])
            if key == "report_to":
                check_installed(values[key], setting.label)
        except SimpoError as error:
            mistakes.append(str(error))
            values.pop(key, None)
    return _build_all(types, values, settings, mistakes)


def _implied(path: str | None, in_file: Set[str], given: Set[str], known: Set[str]) -> dict[str, Setting]:
    """What the paper's own recipe leaves to the paper's code."""
    found = {key: value for key, value in paper_settings(in_file, given).items() if key in known}
    if found:
        shown = ", ".join(f"{key}: {value}" for key, value in found.items())
        logger.warning(
            "%s has the keys of the paper's own recipes: texts are tokenized and cut as by the paper's code (%s); set "
            "these keys to choose otherwise, and chat_template for another than the model's own (the paper's code has "
            "its own for models with 'mistral' in their name)",
            *(path, shown),
        )
    return {key: Setting(key, value, None, f"{path}: {key}") for key, value in found.items()}


def _build_all(
    types: tuple[type, ...], values: Mapping[str, Any], settings: Mapping[str, Setting], mistakes: list[str]
) -> tuple[Any, ...]:
    """An instance of each of ``types``; raises :class:`CombinedError` if there are ``mistakes``, with those found here.

    A required key whose value does not fit is already among the mistakes, and not also missing.
    """
    built = []
    for cls in types:
        if any(is_required(field) and field.name in settings.keys() - values.keys() for field in fields_of(cls)):
            continue
        try:
            built.append(build(cls, values, settings))
        except CombinedError as error:
            mistakes += error.args
        except SimpoError as error:
            mistakes.append(str(error))
    if mistakes:
        raise CombinedError(*dict.fromkeys(mistakes))
    return tuple(built)


def _merge(
    file: dict[str, Setting], line: dict[str, Setting], replaces: Mapping[str, tuple[str, ...]]
) -> dict[str, Setting]:
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
