"""Damage every file of finished and unfinished runs, and of their caches, data and models: cut, empty, flip, remove.

The same command must then end with a one-line error, or with the results of an undamaged run. With ``SIMPO_FUZZ``,
all files are damaged in all ways; otherwise a few.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from itertools import product
from pathlib import Path

import datasets
import pytest
from tests.fuzz.kills import command_of, result_of, run
from tests.fuzz.properties import CAMPAIGN, end

HARM = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "flipped": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "removed": None,
}
# The fraction of its changes after which a run is killed; None for a finished run.
STATES = [
    *((kind, None) for kind in ("train", "dpo", "sft", "reward", "sample", "annotate", "sweep", "loop", "online")),
    *(("online", 0.5), ("online", 0.9), ("sample", 0.5), ("annotate", 0.5), ("sweep", 0.5), ("sweep", 0.9)),
    *(("loop", 0.5), ("train", 0.5), ("train", 0.8), ("dpo", 0.5), ("dpo", 0.9), ("sft", 0.6), ("reward", 0.6)),
]
CHOSEN = [("train", 0.5)]  # without SIMPO_FUZZ


def damage_file(path: Path, kind: str, *, keep_time: bool) -> bool:
    """Damage a file; return whether it changed."""
    content, times = path.read_bytes(), path.stat()
    if HARM[kind] is None:
        path.unlink()
        return True
    if not content:
        return False
    path.write_bytes(HARM[kind](content))
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return True


@pytest.mark.parametrize(("kind", "share"), STATES if CAMPAIGN else CHOSEN)
def test_damaged_files_are_detected_rebuilt_or_rejected(kind, share, chat_world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    here, kept, output = tmp_path / "here", tmp_path / "kept", tmp_path / "here" / "run"
    world = shutil.copytree(chat_world, here / "world")
    argv = command_of(world, kind, output)
    code, changes = run(argv, output)
    assert code == 0
    expected = result_of(output)
    if share is not None:
        for path in here.glob("run*"):
            shutil.rmtree(path)
        assert run(argv, output, kill_at=int(share * changes))[0] == -signal.SIGKILL
    shutil.copytree(here, kept)
    names = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file() and "lock" not in path.name)
    cases = list(product(names, HARM))
    outcomes: Counter[str] = Counter()
    for number, (name, how) in enumerate(cases if CAMPAIGN else cases[:: len(cases) // 2 + 1]):
        shutil.rmtree(here)
        shutil.copytree(kept, here)
        verify = share is None and (number + number // len(HARM)) % 2 == 1
        if not damage_file(here / name, how, keep_time=verify):
            continue
        try:
            ended = end(*argv, *(["--verify"] if verify else []))
            if ended.code == 0:
                # The damaged checkpoint was rotated away like the others, or kept for inspection.
                ignored = {"folders"}
                if "its metrics are left out of the results" in (output / "log.txt").read_text():
                    ignored |= {"results.json", "rollouts/000000.jsonl"}
                found, known = (
                    {path: content for path, content in result.items() if path not in ignored}
                    for result in (result_of(output), expected)
                )
                assert found == known, f"{name} {how}: other results"
            outcomes["rejected" if ended.code else "same results"] += 1
        except (AssertionError, ValueError) as failure:  # ValueError: a damaged file is among the results
            if not CAMPAIGN:
                raise
            outcomes["WRONG"] += 1
            print(f"{kind} {share}: {name} {how}: {str(failure)[-600:]}")
    print(f"{kind} {share}: {len(names)} files, {dict(outcomes)}")
    assert not outcomes["WRONG"]
