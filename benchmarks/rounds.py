"""Measure every entrant in its own process, in turns over several rounds, within a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.entrants import Entrant
from benchmarks.measurement import Measurement
from benchmarks.setting import Setting

ROOT = Path(__file__).parents[1]
# How many processes may import ahead and wait for their turn. Imports take longer than most GPU measurements and do not
# disturb them; on a CPU they would.
WAITING = {"cuda": 5, "cpu": 0}


def rounds(
    entrants: list[Entrant],
    setting: Setting,
    repeats: int,
    *,
    products: bool,
    time_limit: float | None,
    entrant_limit: float | None = None,
) -> Iterator[tuple[Entrant, Measurement | str]]:
    """Measure every entrant ``repeats`` times, yielding each measurement (or why there is none) as it is made.

    An entrant that has failed does not run again. After ``time_limit`` seconds the current run is stopped and no other
    is started; a single run is stopped after ``entrant_limit`` seconds.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    turns = [(number, entrant) for number in range(repeats) for entrant in entrants]
    failed: set[str] = set()
    workers: dict[int, _Worker] = {}
    try:
        for turn, (number, entrant) in enumerate(turns):
            for later in range(turn, min(turn + 1 + WAITING[setting.device], len(turns))):
                if later not in workers and turns[later][1].name not in failed:
                    workers[later] = _Worker.start(turns[later][1], setting, products, later)
            if entrant.name in failed:
                continue
            print(f"round {number + 1}/{repeats}: {entrant.name}", file=sys.stderr, flush=True)
            left = None if end is None else end - time.monotonic()
            if left is not None and left < 1:
                found: Measurement | str = "no time was left"
            else:
                limits = [limit for limit in (left, entrant_limit) if limit is not None]
                found = workers[turn].measure(min(limits, default=None))
            if isinstance(found, str):
                failed.add(entrant.name)
                print(f"{entrant.name}: {found}", file=sys.stderr, flush=True)
            yield entrant, found
    finally:
        for worker in workers.values():
            worker.stop()


@dataclass
class _Worker:
    """A process that imports what it needs and then waits for the signal to measure."""

    process: subprocess.Popen[str]
    output: Path
    log: Path

    @classmethod
    def start(cls, entrant: Entrant, setting: Setting, products: bool, turn: int) -> _Worker:
        output, log = (Path(setting.folder) / f"measurement-{turn}.{ending}" for ending in ("json", "log"))
        order = {"entrant": asdict(entrant), "setting": asdict(setting), "output": str(output), "products": products}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.workers", json.dumps(order)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(setting.threads), "TRL_EXPERIMENTAL_SILENCE": "1"},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
            )
        return cls(process, output, log)

    def measure(self, time_limit: float | None) -> Measurement | str:
        """Return the measurement or, if there is none, the reason: the last line of the process's output."""
        try:
            self.process.communicate("go\n", timeout=time_limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return "stopped by the time limit"
        if self.process.returncode or not self.output.exists():
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return (lines or [f"exited with {self.process.returncode}"])[-1][:300]
        return Measurement(**json.loads(self.output.read_text()))

    def stop(self) -> None:
        """Kill the process if it is still running."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
