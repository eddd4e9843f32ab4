"""Real runs, killed with SIGKILL and restarted, end with the same bytes as undisturbed runs.

A run is killed just before a random change to its folder (opening a file for writing, renaming, truncating or removing
a file, creating or removing a folder), so that every window between two changes can be hit: start, first checkpoint,
rotation, end within an epoch, final scoring, saving, results. ``SIMPO_SOAK_KILLS`` is the number of kills per kind of
run, every second one at a random time instead; ``make soak`` uses twenty. A run that ends before it is killed is
compared, and the next one starts in a new folder.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import datasets
import pytest
from tests.fuzz.kills import command_of, errors_of, result_of, run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SIMPO_SOAK_KILLS", "1"))


KINDS = ["train", "sample", "annotate"]
KINDS += ["sft", "dpo", "reward", "loop", "accumulation", "lora", "sweep", "online"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_restarted_run_ends_with_the_same_bytes(kind, chat_world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seed = int(os.environ.get("SIMPO_SOAK_SEED", random.randrange(1 << 30)))
    moments = random.Random(seed)
    alone, output = tmp_path / "alone" / "run", tmp_path / "killed" / "run"
    begun = time.monotonic()
    code, changes = run(command_of(chat_world, kind, alone), alone)
    assert code == 0, errors_of(alone).read_text()
    takes, expected = time.monotonic() - begun, result_of(alone)
    argv = command_of(chat_world, kind, output)
    killed: list[dict[str, float]] = []
    since: list[dict[str, float]] = []  # kills of the run in progress
    while len(killed) < KILLS or since:
        moment = {}
        if len(killed) < KILLS:
            # A continued run makes fewer changes.
            left = changes if not since else max(1, changes // 2)
            moment = (
                {"kill_after": moments.uniform(0, takes)} if len(killed) % 2 else {"kill_at": moments.randint(1, left)}
            )
        code, _ = run(argv, output, **moment)
        history = f"seed {seed}, {since}, {moment}"
        assert code in (0, -signal.SIGKILL), f"{history}: exit code {code}: {errors_of(output).read_text()}"
        if code:
            killed, since = [*killed, moment], [*since, moment]
            continue
        assert result_of(output) == expected, history
        left_behind = [path for path in output.rglob(".*") if "lock" not in path.name and path.suffix != ".sha256"]
        assert not left_behind, history
        since = []
        shutil.rmtree(output.parent)
    chosen = sum("kill_at" in moment for moment in killed)
    print(f"{kind}: {chosen} kills at chosen changes of {changes}, {len(killed) - chosen} at random, seed {seed}")
