"""Make preference pairs of scored responses.

examples:
  simpo pair outputs/scores --output_dir outputs/pairs
  simpo pair outputs/scores/annotated.jsonl --pairs all --min_gap 0.5 --output_dir outputs/pairs
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from simpo.cli._shared import require_single_process
from simpo.config import parse_settings, required
from simpo.runs.results import print_results
from simpo.workflows.pair import FILE_NAME, PairSettings, pair_annotated


@dataclass(kw_only=True)
class PairCommand:
    """The run."""

    annotated: Path = required("annotated.jsonl of simpo annotate, or its folder.", positional="ANNOTATED")
    output_dir: Path = required("Folder of the run.")
    pairs: PairSettings


def main(argv: list[str]) -> int:
    """Pair, print the table of results and what to do next."""
    (settings,) = parse_settings(argv, (PairCommand,), command="pair", about=__doc__)
    require_single_process("pair", "start it without torchrun")
    print_results(pair_annotated(settings.annotated, settings.pairs, settings.output_dir, argv=argv))
    following = "reward" if settings.pairs.pairs == "ranking" else "train"
    path = settings.output_dir / FILE_NAME
    print(f"pairs: {path}")
    print(f"next:  simpo {following} --dataset_name {shlex.quote(str(path))} ...")
    return 0
