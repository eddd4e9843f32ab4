"""From a file and a command line to dataclasses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from simpo.errors import SimpoError
from simpo.recipe.command_line import read_command_line
from simpo.recipe.fields import annotations_of, build, fit, installed
from simpo.recipe.file import read_file
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
    and ``null`` is None. Older and foreign spellings are mapped; keys that mean nothing any more are dropped,
    and so are reporting integrations that are not installed. Each is said once, as a warning of the package's
    logger.

    Args:
        argv: the arguments; the recipe, if any, comes first. ``--help`` anywhere prints the keys.
        types: dataclasses; their fields' annotations say what fits.
        aliases: further spellings, see :data:`~simpo.recipe.spellings.Alias`.
        replaces: keys that exclude one another: a key and the others that say the same. Given in one place,
            they are an error; given in both, those of the command line replace those of the file.

    Raises:
        SimpoError: a file that cannot be read, a key that is unknown, missing or given twice, a value that
            does not fit, or a ValueError of a dataclass's ``__post_init__``; names the key and the place.
        SystemExit: with code 0, after ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(types))
        raise SystemExit(0)
    path = argv[0] if argv and not argv[0].startswith("-") else None
    file = read_file(path) if path is not None else []
    line = read_command_line(argv if path is None else argv[1:])

    annotations = annotations_of(types)
    spellings = {**known_spellings(annotations.keys()), **(aliases or {})}
    given = {setting.key for setting in (*file, *line)}
    settings = _merge(
        resolve(file, annotations.keys(), spellings, given),
        resolve(line, annotations.keys(), spellings, given),
        replaces or {},
    )
    values = {key: fit(setting, annotations[key]) for key, setting in settings.items()}
    if "report_to" in values:
        values["report_to"] = installed(values["report_to"], settings["report_to"].label)
    return tuple(build(cls, values, settings) for cls in types)


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
