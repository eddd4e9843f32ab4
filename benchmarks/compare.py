"""Compare simpo's speed, memory and losses with its peers, with its own variants, and with FLOP counts.

All entrants train the same model on the same token ids, in the same precision, with the same optimizer and the same
number of pairs per optimizer step. Every run is a separate process, and the entrants take turns over several rounds, so
that changes in the machine's speed affect all of them. Run from the repository root::

    python -m benchmarks.compare --profile ultrafeedback --families simpo padded trl-cpo trl-dpo
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

from benchmarks.entrants import FAMILIES, Entrant, add_training_options, entrants, unavailable_reason
from benchmarks.measurement import Measurement
from benchmarks.profiles import PROFILES, synthetic_rows
from benchmarks.report import print_report, summarize
from benchmarks.rounds import rounds
from benchmarks.rows import byte_pair_tokenizer, read_pairs, word_tokenizer
from benchmarks.setting import Setting, prepare


def main() -> int:
    """Run the comparison and return the exit code: 1 if one of simpo's entrants failed or losses differ."""
    options = _options()
    if problem := _usage_error(options):
        print(f"compare: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        named = {field.name: getattr(options, field.name) for field in fields(Setting) if hasattr(options, field.name)}
        setting = Setting(folder=folder, **named)
        counts = _prepare(options, setting)
        chosen, absent = _entrants(options, setting)
        runs: dict[str, list[Measurement]] = defaultdict(list)
        for entrant, found in rounds(
            chosen,
            setting,
            options.repeats,
            products=options.products,
            time_limit=options.time_limit,
            entrant_limit=options.entrant_limit,
        ):
            if isinstance(found, str):
                absent[entrant.name] = found
            else:
                runs[entrant.name].append(found)
            report = summarize(chosen, runs, setting, counts=counts, absent=absent)
            if options.output:  # after every run, so that an interrupted comparison keeps its results
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    tolerance = 1e-4 if setting.dtype == setting.weights == "fp32" else 3e-2
    differing = entrants_with_different_losses(chosen, runs, tolerance=tolerance)
    if differing:
        print(f"compare: the losses of the first step differ between {' and '.join(differing)}")
    return int(
        bool(differing) or any(entrant.kind in ("simpo", "loop") and not runs[entrant.name] for entrant in chosen)
    )


def _options() -> argparse.Namespace:
    families = "; ".join(f"{name}: {text}" for name, text in FAMILIES.items())
    parser = argparse.ArgumentParser(prog="compare", description="Compare simpo with its peers in one run.")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=["simpo", "padded", "trl-cpo"], help=families
    )
    parser.add_argument("--only", nargs="+", help="only the entrants with these names")
    add_training_options(parser)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the profile's lengths")
    parser.add_argument("--responses", type=int, default=2, help="responses per prompt, K")
    parser.add_argument("--data", type=Path, help="HH-style transcripts, .jsonl or .jsonl.gz, replacing the profile")
    parser.add_argument("--pairs", type=int, default=32, help="comparisons measured, after one warm-up step")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[], help="the peers' per-device batches")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing for everything but simpo's --variants"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, for busy machines")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds; each entrant runs once per round")
    parser.add_argument("--time-limit", type=float, help="seconds after which no run is started")
    parser.add_argument("--entrant-limit", type=float, help="seconds after which a single run is stopped")
    parser.add_argument("--products", action="store_true", help="also time the matrix products on their own")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    return parser.parse_args()


def _usage_error(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, or None."""
    if options.data and not options.data.exists():
        return f"--data: {options.data} does not exist; give a .jsonl[.gz] with 'chosen' and 'rejected' transcripts"
    if options.data and options.responses != 2:
        return "--responses: --data has pairs; leave it out to compare with more responses"
    if options.pairs < 1 or options.pairs % options.pairs_per_step:
        return f"--pairs: {options.pairs} is not a multiple of --pairs-per-step {options.pairs_per_step}"
    return None


def _prepare(options: argparse.Namespace, setting: Setting) -> dict[str, int]:
    if options.data:
        rows = read_pairs(options.data)
        return prepare(setting, rows, byte_pair_tokenizer(rows, setting.vocabulary))
    words = setting.vocabulary - 1
    profile = PROFILES[options.profile].scaled(options.scale)
    rows = synthetic_rows(profile, setting.steps * setting.pairs_per_step, options.responses, words)
    return prepare(setting, rows, word_tokenizer(words))


def _entrants(options: argparse.Namespace, setting: Setting) -> tuple[list[Entrant], dict[str, str]]:
    """Return the entrants that can run, and the reason for each family that cannot."""
    chosen, absent = [], {}
    for family in options.families:
        if reason := unavailable_reason(family, setting, options.responses):
            absent[family] = reason
        else:
            chosen += entrants(family, setting, options.variants, options.micro_batches)
    return [entrant for entrant in chosen if options.only is None or entrant.name in options.only], absent


def entrants_with_different_losses(
    chosen: list[Entrant], runs: dict[str, list[Measurement]], *, tolerance: float
) -> list[str]:
    """Return the names of two entrants with the same objective but different first losses, or an empty list."""
    first: dict[tuple[str, bool], tuple[str, float]] = {}
    for entrant in chosen:
        for run in runs[entrant.name]:
            loss = run.losses[0]
            name, expected = first.setdefault((entrant.objective, entrant.kind == "loop"), (entrant.name, loss))
            if not abs(loss - expected) <= tolerance:  # false for NaN
                return [name, entrant.name]
    return []


if __name__ == "__main__":
    sys.exit(main())
