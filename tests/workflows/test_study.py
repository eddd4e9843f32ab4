"""Who takes which trial: every one once, and one that a killed process left is taken again."""

from __future__ import annotations

import threading

import pytest

from simpo.workflows.sweep.space import Choices, Range, combinations
from simpo.workflows.sweep.study import Study

GRID = (Choices("learning_rate", ("3e-7", "1e-6")), Choices("objective", ("simpo", "dpo")))


@pytest.fixture
def open_study(tmp_path):
    """``open_study(axes, sampler, trials)``: a study in one folder, as each of several processes opens it."""

    def make(axes=GRID, sampler="grid", trials=4) -> Study:
        return Study(tmp_path, axes, sampler, trials, smaller_is_better=False)

    return make


def test_a_grid_is_shared_out_and_every_combination_comes_once(open_study):
    processes = [open_study(), open_study()]
    claims = [processes[turn % 2].claim() for turn in range(4)]
    assert [claim.number for claim in claims] == [0, 1, 2, 3]
    assert [claim.values for claim in claims] == list(combinations(GRID))
    assert processes[0].claim() is None
    for turn, claim in enumerate(claims):
        processes[turn % 2].finish(claim, turn / 10)
    assert [trial.value for trial in open_study().tried()] == [0.0, 0.1, 0.2, 0.3]
    assert open_study().claim() is None


def test_a_trial_that_is_settled_while_another_process_looks_is_not_taken_again(open_study, monkeypatch):
    first, second = open_study(), open_study()
    settling = threading.Thread(target=first.finish, args=(first.claim(), 0.5))
    census = second._census

    def while_the_other_settles():
        found = census()
        settling.start()
        settling.join(timeout=0.3)
        return found

    monkeypatch.setattr(second, "_census", while_the_other_settles)
    assert second.claim().number == 1
    settling.join()
    assert [trial.value for trial in second.tried()][:2] == [0.5, None]


def test_what_became_of_trials_is_kept(open_study):
    study = open_study()
    study.finish(study.claim(), 0.5)
    study.prune(study.claim())
    study.fail(study.claim(), "the loss is not finite")
    tried = open_study().tried()
    assert [trial.state for trial in tried] == ["finished", "pruned", "failed", "waiting"]
    assert tried[2].reason == "the loss is not finite"
    assert tried[0].values == {"learning_rate": "3e-7", "objective": "simpo"}


def test_a_trial_that_was_left_is_taken_again_before_a_new_one(open_study):
    study = open_study()
    left = study.claim()
    assert open_study().claim().number == 1  # while it is held, nobody else has it
    left.release()  # as the kernel does for a killed process
    again = open_study().claim()
    assert (again.number, again.values) == (left.number, left.values)
    assert len(study.tried()) == 4


def test_tpe_draws_within_its_ranges_and_no_two_processes_the_same(open_study):
    axes = (Range("learning_rate", "1e-7", "1e-5", whole=False), Range("seed", "1", "9", whole=True))
    processes = [open_study(axes, "tpe", 6), open_study(axes, "tpe", 6)]
    claims = [processes[turn % 2].claim() for turn in range(6)]
    rates = [float(claim.values["learning_rate"]) for claim in claims]
    assert len(set(rates)) == 6
    assert all(1e-7 <= rate <= 1e-5 for rate in rates)
    assert all(1 <= int(claim.values["seed"]) <= 9 for claim in claims)
    assert processes[1].claim() is None
    for claim, rate in zip(claims, rates, strict=True):
        processes[0].finish(claim, rate)
    assert [trial.values for trial in open_study(axes, "tpe", 6).tried()] == [claim.values for claim in claims]
