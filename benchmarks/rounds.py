"""Every entrant in a process of its own, in turns over several rounds, within a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.entrants import Entrant
from benchmarks.measurement import Measurement
from benchmarks.setting import Setting

ROOT = Path(__file__).parents[1]


def rounds(
    entrants: list[Entrant], setting: Setting, repeats: int, *, products: bool, time_limit: float | None
) -> Iterator[tuple[Entrant, Measurement | str]]:
    """Measure every entrant ``repeats`` times; yields each measurement, or why there is none, as it is made.

    An entrant that failed once does not run again. After ``time_limit`` seconds nothing is started any more, and what
    runs is ended.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    failed: set[str] = set()
    for number in range(repeats):
        for entrant in entrants:
            if entrant.name in failed:
                continue
            print(f"round {number + 1}/{repeats}: {entrant.name}", file=sys.stderr, flush=True)
            left = None if end is None else end - time.monotonic()
            found = "no time was left" if left is not None and left < 1 else _run(entrant, setting, products, left)
            if isinstance(found, str):
                failed.add(entrant.name)
                print(f"{entrant.name}: {found}", file=sys.stderr, flush=True)
            yield entrant, found


def _run(entrant: Entrant, setting: Setting, products: bool, time_limit: float | None) -> Measurement | str:
    """One measurement in a new process, or the end of its output."""
    output = Path(setting.folder) / "measurement.json"
    output.unlink(missing_ok=True)
    order = {"entrant": asdict(entrant), "setting": asdict(setting), "output": str(output), "products": products}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.workers", json.dumps(order)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(setting.threads), "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=time_limit,
        )
    except subprocess.TimeoutExpired:
        return "stopped by the time limit"
    if done.returncode or not output.exists():
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]
    return Measurement(**json.loads(output.read_text()))
