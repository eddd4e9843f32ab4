"""``round.json``: what each stage of a round made, from what, and its figures; it is written when the round is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from simpo.runs.atomic import write_text
from simpo.runs.manifest import read_manifest
from simpo.runs.results import FILE_NAME as RESULTS
from simpo.runs.results import read_results

FILE_NAME = "round.json"
SCHEMA = 1

# What a stage is run for; the rest of its folder (logs, times, the machine) differs from run to run.
_PRODUCTS = ("responses.jsonl", "annotated.jsonl", "pairs.jsonl", "verdicts.jsonl", "*.safetensors")


@dataclass(frozen=True)
class Stage:
    """One stage of a round.

    Attributes:
        folder: of its run.
        inputs: what it was made from, by what the stage calls it: a folder or file, or a name as given.
    """

    folder: Path
    inputs: Mapping[str, str | Path]


def write_round(folder: Path, number: int, stages: Mapping[str, Stage]) -> None:
    """Write ``round.json``; paths in it are relative to the loop's folder, and no time or machine is in it.

    Args:
        folder: of the round.
        number: of the round.
        stages: finished ones by their names.
    """
    document = {
        "schema": SCHEMA,
        "round": number,
        "stages": {name: _described(stage, folder.parent) for name, stage in stages.items()},
    }
    write_text(folder / FILE_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _described(stage: Stage, root: Path) -> dict[str, Any]:
    results = read_results(stage.folder / RESULTS)
    return {
        "folder": _relative(stage.folder, root),
        "command": results.command,
        "fingerprint": results.fingerprint,
        "from": {name: _relative(given, root) for name, given in stage.inputs.items()},
        "files": [
            {"path": name, "bytes": size, "sha256": digest}
            for name, size, digest in read_manifest(stage.folder)
            if any(fnmatch(name, pattern) for pattern in _PRODUCTS)
        ],
        "figures": {"/".join(filter(None, (metric.name, metric.stage))): metric.value for metric in results.metrics},
    }


def _relative(given: str | Path, root: Path) -> str:
    return given.relative_to(root).as_posix() if isinstance(given, Path) else given
