"""Pairs per second, memory and losses of simpo compared with its peers, with itself, and with counted arithmetic.

All train the same model on the same token ids in the same precision, with the same optimizer, as many pairs an
optimizer step. Every run has a process of its own, and the entrants take turns over several rounds, so that a change of
the machine's speed hits all of them. Run from the repository's root::

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

from benchmarks.entrants import FAMILIES, Entrant, add_training_options, entrants, missing
from benchmarks.measurement import Measurement
from benchmarks.profiles import PROFILES, made_up_rows
from benchmarks.report import print_report, summarize
from benchmarks.rounds import rounds
from benchmarks.rows import byte_pair_tokenizer, read_pairs, word_tokenizer
from benchmarks.setting import Setting, prepare


def main() -> int:
    """Entry point; returns the exit code: 1 if an entrant of simpo failed or losses differ."""
    options = _options()
    if problem := _problem(options):
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
            if options.output:  # after every one, so that a run that is stopped leaves what it has
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    differing = disagreeing(chosen, runs, tolerance=1e-4 if setting.dtype == setting.weights == "fp32" else 3e-2)
    if differing:
        print(f"compare: the loss of the first step differs between {' and '.join(differing)}")
    return int(
        bool(differing) or any(entrant.kind in ("simpo", "loop") and not runs[entrant.name] for entrant in chosen)
    )


def _options() -> argparse.Namespace:
    families = "; ".join(f"{name}: {text}" for name, text in FAMILIES.items())
    parser = argparse.ArgumentParser(prog="compare", description="simpo compared with its peers, in one run.")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=["simpo", "padded", "trl-cpo"], help=families
    )
    parser.add_argument("--only", nargs="+", help="of these, the entrants of these names")
    add_training_options(parser)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on these lengths")
    parser.add_argument("--responses", type=int, default=2, help="responses to a prompt, K")
    parser.add_argument("--data", type=Path, help="instead: HH-style transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=32, help="comparisons measured; a step more comes first")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[], help="the peers' per-device batches")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing of all but simpo's --variants"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for busy machines"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which every entrant runs once")
    parser.add_argument("--time-limit", type=float, help="seconds, after which nothing is started")
    parser.add_argument("--entrant-limit", type=float, help="seconds, after which a measurement is given up")
    parser.add_argument("--products", action="store_true", help="also time the matrix products alone")
    parser.add_argument("--output", type=Path, help="write everything measured there, as JSON")
    return parser.parse_args()


def _problem(options: argparse.Namespace) -> str | None:
    """Why the comparison cannot be made, or None."""
    if options.data and not options.data.exists():
        return f"--data: there is no {options.data}; give a .jsonl[.gz] with 'chosen' and 'rejected' transcripts"
    if options.data and options.responses != 2:
        return "--responses: transcripts are pairs; leave out --data for other numbers"
    if options.pairs < 1 or options.pairs % options.pairs_per_step:
        return f"--pairs: {options.pairs} is not a multiple of --pairs-per-step {options.pairs_per_step}"
    return None


def _prepare(options: argparse.Namespace, setting: Setting) -> dict[str, int]:
    if options.data:
        rows = read_pairs(options.data)
        return prepare(setting, rows, byte_pair_tokenizer(rows, setting.vocabulary))
    words = setting.vocabulary - 1
    profile = PROFILES[options.profile].scaled(options.scale)
    rows = made_up_rows(profile, setting.steps * setting.pairs_per_step, options.responses, words)
    return prepare(setting, rows, word_tokenizer(words))


def _entrants(options: argparse.Namespace, setting: Setting) -> tuple[list[Entrant], dict[str, str]]:
    """Those that can be run, and why others cannot."""
    chosen, absent = [], {}
    for family in options.families:
        if reason := missing(family, setting, options.responses):
            absent[family] = reason
        else:
            chosen += entrants(family, setting, options.variants, options.micro_batches)
    return [entrant for entrant in chosen if options.only is None or entrant.name in options.only], absent


def disagreeing(chosen: list[Entrant], runs: dict[str, list[Measurement]], *, tolerance: float) -> list[str]:
    """Two entrants with the same objective whose first losses differ; empty if there are none."""
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
