"""Real runs, really killed (SIGKILL) and started again: the same bytes as of a run that is left alone.

A run is killed before a change of its folder (a file opened for writing, renamed, cut or removed, a folder made or
removed) that is drawn from all that it makes, so that every window between two of them is hit: start, first
checkpoint, rotation, end within an epoch, final scoring, saving, results. ``SIMPO_SOAK_KILLS`` says how often each kind
of run is killed before it may finish, every second time at a random moment instead; ``make soak`` asks for ten.
"""

from __future__ import annotations

import os
import random
import signal
import time

import datasets
import pytest
from tests.fuzz.kills import command_of, errors_of, result_of, run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SIMPO_SOAK_KILLS", "1"))


KINDS = ["train", "sample", "annotate"]
KINDS += ["sft", "dpo", "reward", "loop", "accumulation", "lora", "sweep", "online"] if KILLS > 1 else []


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_started_again_it_ends_with_the_same_bytes(kind, chat_world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seed = int(os.environ.get("SIMPO_SOAK_SEED", random.randrange(1 << 30)))
    moments = random.Random(seed)
    alone, output = tmp_path / "alone" / "run", tmp_path / "killed" / "run"
    begun = time.monotonic()
    code, changes = run(command_of(chat_world, kind, alone), alone)
    assert code == 0
    takes = time.monotonic() - begun
    argv, killed = command_of(chat_world, kind, output), []
    for number in range(KILLS):
        # A run that continues has fewer changes left, so that early ones are drawn more often.
        moment = {"kill_after": moments.uniform(0, takes)} if number % 2 else {"kill_at": moments.randint(1, changes)}
        if number and not number % 2:
            moment = {"kill_at": moments.randint(1, max(1, changes // 2))}
        code, _ = run(argv, output, **moment)
        killed += [moment] if code == -signal.SIGKILL else []
        assert code in (0, -signal.SIGKILL), f"seed {seed}, {killed}: {errors_of(output).read_text()}"
    assert run(argv, output)[0] == 0, f"seed {seed}, {killed}: {errors_of(output).read_text()}"
    print(f"{kind}: {len(killed)} kills, {changes} changes, seed {seed}")
    assert result_of(output) == result_of(alone), f"seed {seed}, {killed}"
    checksums = {f".held_out_{stage}.jsonl.sha256" for stage in ("before", "after")}  # of the stored scores
    left = [path.name for path in output.rglob(".*") if "lock" not in path.name and path.name not in checksums]
    assert not left, f"seed {seed}, {killed}: left behind"
