"""Pairs per second, memory and losses of simpo beside TRL's CPO trainer with the SimPO loss.

Both train the same model on the same token ids in the same precision, with the same optimizer, eight pairs an
optimizer step. Every run has a process of its own, and the entrants take turns over several rounds, so that a change of
the machine's speed hits all of them. Run from the repository's root::

    python -m benchmarks.compare_trl --repeats 3 --output results.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.report import print_report, summarise
from benchmarks.setting import DEFAULT_DATA, Setting, make_up_pairs, prepare, read_pairs
from benchmarks.workers import Entrant, Measurement, work

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Entry point; returns the exit code."""
    options = _options()
    if options.worker:
        return _be_a_worker(options.worker)
    problem = _problem(options)
    if problem:
        print(f"compare_trl: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        setting = _setting(options, folder)
        pairs = make_up_pairs() if options.made_up else read_pairs(options.data)
        counts = prepare(setting, pairs)
        entrants = _entrants(options, setting)
        runs = _rounds(entrants, setting, options.repeats, products=options.products)
    setting = replace(setting, folder="")
    report = summarise(entrants, runs, setting, counts)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    return 1 if any(entrant.toolkit == "simpo" and not runs[entrant.name] for entrant in entrants) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_trl", description="simpo beside TRL, in one run.")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="HH-style transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--made-up", action="store_true", help="transcripts of random words instead of --data")
    parser.add_argument("--pairs", type=int, default=32, help="pairs measured; a step more comes first, as a warm-up")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which every entrant runs once")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast from fp32 weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch's pool")
    parser.add_argument("--hidden", type=int, default=384, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tied", action="store_true", help="the output layer is the embedding")
    parser.add_argument(
        "--max-batch-tokens", type=int, nargs="*", default=[], help="more entrants: simpo with these budgets"
    )
    parser.add_argument("--only", nargs="*", help="names of entrants, as the table shows them")
    parser.add_argument("--without-trl", action="store_true", help="simpo's paths among themselves")
    parser.add_argument("--products", action="store_true", help="also time the matrix products alone")
    parser.add_argument("--output", type=Path, help="write everything measured there, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _problem(options: argparse.Namespace) -> str | None:
    """Why the comparison cannot be made, or None."""
    if not options.made_up and not options.data.exists():
        return f"--data: there is no {options.data}; give a .jsonl[.gz] with 'chosen' and 'rejected' transcripts"
    if not options.without_trl and importlib.util.find_spec("trl") is None:
        return "trl is not installed: pip install 'simpo[benchmarks]', or give --without-trl"
    if options.pairs < 1 or options.pairs % options.pairs_per_step:
        return f"--pairs: {options.pairs} is not a multiple of --pairs-per-step {options.pairs_per_step}"
    if options.hidden % 64:
        return f"--hidden: {options.hidden} is not a multiple of 64"
    return None


def _setting(options: argparse.Namespace, folder: str) -> Setting:
    return Setting(
        folder=folder,
        pairs=options.pairs,
        pairs_per_step=options.pairs_per_step,
        dtype=options.dtype,
        threads=options.threads,
        device=options.device,
        hidden=options.hidden,
        layers=options.layers,
        tied=options.tied,
    )


def _entrants(options: argparse.Namespace, setting: Setting) -> list[Entrant]:
    """TRL's whole grid of batch and accumulation, and simpo's paths."""
    step = setting.pairs_per_step
    found = [
        Entrant(f"trl {size}x{step // size}", "trl", per_device=size)
        for size in range(1, step + 1)
        if step % size == 0 and not options.without_trl
    ]
    found += [Entrant("simpo", "simpo", path="auto"), Entrant("simpo padded", "simpo", path="padded")]
    found += [
        Entrant(f"simpo {budget}", "simpo", path="auto", max_batch_tokens=budget) for budget in options.max_batch_tokens
    ]
    return [entrant for entrant in found if options.only is None or entrant.name in options.only]


def _rounds(entrants: list[Entrant], setting: Setting, repeats: int, *, products: bool) -> dict[str, list[Measurement]]:
    runs: dict[str, list[Measurement]] = {entrant.name: [] for entrant in entrants}
    for number in range(repeats):
        for entrant in entrants:
            print(f"round {number + 1}/{repeats}: {entrant.name}", file=sys.stderr, flush=True)
            found = _run(entrant, setting, products=products)
            if found is not None:
                runs[entrant.name].append(found)
    return runs


def _run(entrant: Entrant, setting: Setting, *, products: bool) -> Measurement | None:
    """Measure ``entrant`` in a new process; None, and the end of its output, if that fails."""
    output = Path(setting.folder) / "measurement.json"
    output.unlink(missing_ok=True)
    order = {"entrant": asdict(entrant), "setting": asdict(setting), "output": str(output), "products": products}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare_trl", "--worker", json.dumps(order)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(setting.threads), "TRL_EXPERIMENTAL_SILENCE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not output.exists():
        print(f"{entrant.name} failed:\n" + "\n".join(done.stderr.splitlines()[-5:]), file=sys.stderr)
        return None
    return Measurement(**json.loads(output.read_text()))


def _be_a_worker(order: str) -> int:
    given = json.loads(order)
    work(Entrant(**given["entrant"]), Setting(**given["setting"]), Path(given["output"]), products=given["products"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
