"""Checkpoints written by several processes into one folder."""

from __future__ import annotations

import threading
import time

from simpo.runs.manifest import find_damage
from simpo.training.checkpoints import staged_checkpoint


def test_the_main_process_waits_for_late_writers(tmp_path):
    final, barrier = tmp_path / "checkpoint-5", threading.Barrier(2, timeout=20)
    found = []

    def process(name: str, *, main: bool, delay: float) -> None:
        with staged_checkpoint(final, main=main, wait=barrier.wait) as staging:
            time.sleep(delay)
            (staging / final.name).mkdir(exist_ok=True)
            (staging / final.name / name).write_text(name)
        found.append(name)

    late = threading.Thread(target=process, args=("late",), kwargs={"main": False, "delay": 0.3})
    late.start()
    process("main", main=True, delay=0)
    late.join()
    assert sorted(found) == ["late", "main"]
    assert {path.name for path in final.iterdir()} == {"late", "main", "manifest.json"}
    assert find_damage(final) is None
