"""Assigning trials to processes: each runs once, and one left by a killed process is taken again."""

from __future__ import annotations

import threading

import pytest

from simpo.errors import SimpoError
from simpo.workflows.sweep_study import Axis, Study, combinations, values_of

GRID = (Axis("learning_rate", ("3e-7", "1e-6")), Axis("objective", ("simpo", "dpo")))


@pytest.fixture
def open_study(tmp_path):
    """``open_study(axes, sampler, trials)``: a study in one folder, opened as by each of several processes."""

    def make(axes=GRID, sampler="grid", trials=4) -> Study:
        return Study(tmp_path, axes, sampler, trials, smaller_is_better=False)

    return make


def test_a_grid_is_divided_and_every_combination_runs_once(open_study):
    processes = [open_study(), open_study()]
    taken = [processes[turn % 2].take() for turn in range(4)]
    assert [trial.number for trial in taken] == [0, 1, 2, 3]
    assert [values_of(trial) for trial in taken] == list(combinations(GRID))
    assert processes[0].take() is None
    for turn, trial in enumerate(taken):
        processes[turn % 2].end(trial, turn / 10)
    assert [trial.value for trial in open_study().trials()] == [0.0, 0.1, 0.2, 0.3]
    assert open_study().take() is None


def test_a_trial_that_ends_while_another_process_looks_is_not_taken_again(open_study):
    """Its lock is only released once it is no longer marked as running."""
    first, second = open_study(), open_study()
    trial = first.take()
    with second.lock:
        ending = threading.Thread(target=first.end, args=(trial, 0.5))
        ending.start()
        ending.join(timeout=0.3)
        assert ending.is_alive() and first._locks[0].is_locked  # waits for the study's lock
    ending.join()
    assert second.take().number == 1
    assert [trial.value for trial in second.trials()][:2] == [0.5, None]


def test_the_outcome_of_each_trial_is_stored(open_study):
    study = open_study()
    study.end(study.take(), 0.5)
    study.end(study.take(), None, "PRUNED")
    study.end(study.take(), None, "FAIL", reason="the loss is not finite")
    trials = open_study().trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert trials[2].user_attrs == {"reason": "the loss is not finite"}
    assert values_of(trials[0]) == {"learning_rate": "3e-7", "objective": "simpo"}


def test_an_abandoned_trial_is_taken_before_a_new_one(open_study):
    study = open_study()
    left = study.take()
    assert open_study().take().number == 1  # while it is locked, nobody else gets it
    study._locks[left.number].release()  # as the kernel does when a process is killed
    again = open_study().take()
    assert (again.number, values_of(again)) == (left.number, values_of(left))
    assert len(study.trials()) == 4


def test_tpe_samples_within_its_ranges_and_differently_in_each_process(open_study):
    axes = (Axis("learning_rate", ("1e-7", "1e-5"), float), Axis("seed", ("1", "9"), int))
    processes = [open_study(axes, "tpe", 6), open_study(axes, "tpe", 6)]
    taken = [processes[turn % 2].take() for turn in range(6)]
    drawn = [values_of(trial) for trial in taken]
    rates = [float(values["learning_rate"]) for values in drawn]
    assert len(set(rates)) == 6
    assert all(1e-7 <= rate <= 1e-5 for rate in rates)
    assert all(1 <= int(values["seed"]) <= 9 for values in drawn)
    assert processes[1].take() is None
    for turn, (trial, rate) in enumerate(zip(taken, rates, strict=True)):
        processes[turn % 2].end(trial, rate)
    assert [values_of(trial) for trial in open_study(axes, "tpe", 6).trials()] == drawn


@pytest.mark.parametrize("content", [b"", b"x" * 5000, None])
def test_a_damaged_database_gives_a_one_line_error(open_study, tmp_path, content):
    open_study()
    path = tmp_path / "study.db"
    if content is None:
        whole = path.read_bytes()
        content = whole[: len(whole) // 2]
    if not content:
        path.unlink()  # its trials are enqueued again
        assert len(open_study().trials()) == 4
        return
    path.write_bytes(content)
    with pytest.raises(SimpoError, match=r"study\.db is damaged \(remove it"):
        open_study()
