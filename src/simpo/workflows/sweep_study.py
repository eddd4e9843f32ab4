"""The trials of a sweep in SQLite, through Optuna: which process runs which, and how each ended."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from simpo.errors import SimpoError, third_party
from simpo.workflows.sweep_space import Axis, Values, combinations

Sampler = Literal["grid", "tpe"]
State = Literal["waiting", "running", "finished", "pruned", "failed"]

_DATABASE, _LOCK = "study.db", ".study.lock"
_TIMEOUT = 60  # seconds to wait for another process to finish writing
_STATES: dict[str, State] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
}


def load_optuna() -> Any:
    """The package."""
    try:
        import optuna  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError("simpo sweep needs Optuna: pip install 'simpo[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check_database(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=_TIMEOUT)) as database:
        (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise ValueError(found)


@dataclass(frozen=True)
class TrialResult:
    """A trial and how it ended."""

    number: int  # from 0 on; its folder is named after it
    state: State  # whether it has finished, and how
    values: Values  # its value for every axis; empty until a process has taken it
    value: float | None = None  # the metric of a finished trial
    reason: str | None = None  # why it failed
    same_as: int | None = None  # the trial with the same values whose metric it took over, instead of training again


@dataclass
class TrialLease:
    """A trial that this process runs; its lock keeps other processes away, and the kernel frees it if this one dies."""

    number: int
    values: Values
    trial: Any
    lock: FileLock


class Study:
    """The trials of one sweep, shared by any number of processes.

    The trials of a grid are all created with the study. TPE draws a trial's values when it is taken. A trial that is
    marked as running but not locked belonged to a process that was killed; it is taken before any new one.
    """

    def __init__(
        self, folder: Path, axes: Sequence[Axis], sampler: Sampler, trials: int, *, smaller_is_better: bool
    ) -> None:
        """Open the study in an existing folder, or create it."""
        self._optuna = load_optuna()
        self._folder, self._axes, self._sampler, self._trials = folder, axes, sampler, trials
        (folder / "trials").mkdir(exist_ok=True)
        self.lock = FileLock(folder / _LOCK, thread_local=False)
        advice = "remove it to start over: trials that have finished are not trained again"
        with self.lock, third_party(f"{folder / _DATABASE} is damaged ({advice})"):
            _check_database(folder / _DATABASE)
            self._study = self._optuna.create_study(
                storage=self._optuna.storages.RDBStorage(
                    f"sqlite:///{folder / _DATABASE}", {"connect_args": {"timeout": _TIMEOUT}}
                ),
                study_name="sweep",
                load_if_exists=True,
                direction="minimize" if smaller_is_better else "maximize",
                pruner=self._optuna.pruners.MedianPruner(),
            )
            if sampler == "grid":
                existing = len(self._study.get_trials(deepcopy=False))  # fewer than all if a process was killed here
                for values in list(combinations(axes))[existing:]:
                    self._study.enqueue_trial(values)
            self.results()  # reads everything once

    def trial_folder(self, number: int) -> Path:
        """The folder in which a trial trains."""
        return self._folder / "trials" / f"{number:03d}"

    def take(self) -> TrialLease | None:
        """Take a trial that a killed process left, or else the next one; None if there is none left."""
        states = self._optuna.trial.TrialState
        with self.lock:
            existing = self._study.get_trials(deepcopy=False)
            for frozen in existing:
                if frozen.state == states.RUNNING and (lock := self._lock_trial(frozen.number)) is not None:
                    return self._lease(self._optuna.trial.Trial(self._study, frozen._trial_id), lock)
            if len(existing) >= self._trials and not any(trial.state == states.WAITING for trial in existing):
                return None
            if self._sampler == "tpe":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                    # Seeded by the trial's number, so that processes and restarts do not repeat each other's draws.
                    sampler = self._optuna.samplers.TPESampler(seed=len(existing), constant_liar=True)
                self._study.sampler = sampler
            trial = self._study.ask()
            lock = self._lock_trial(trial.number)
            assert lock is not None, "a trial's lock is only taken under the study's"
            return self._lease(trial, lock)

    def _lock_trial(self, number: int) -> FileLock | None:
        lock = FileLock(self._folder / "trials" / f".{number:03d}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _lease(self, trial: Any, lock: FileLock) -> TrialLease:
        return TrialLease(trial.number, {axis.key: axis.suggest(trial) for axis in self._axes}, trial, lock)

    def report(self, lease: TrialLease, value: float, step: int) -> bool:
        """Record the metric after ``step``; returns whether the trial should be pruned."""
        with self.lock:
            lease.trial.report(value, step)
            return lease.trial.should_prune()

    def finish(self, lease: TrialLease, value: float, *, same_as: int | None = None) -> None:
        """Record a trial's metric, which may be that of another trial with the same values."""
        self._end(lease, value, None, same_as=same_as)

    def prune(self, lease: TrialLease) -> None:
        """Record that a trial was stopped because others were better at the same step."""
        self._end(lease, None, self._optuna.trial.TrialState.PRUNED)

    def fail(self, lease: TrialLease, reason: str) -> None:
        """Record that a trial cannot be finished."""
        self._end(lease, None, self._optuna.trial.TrialState.FAIL, reason=reason)

    def _end(self, lease: TrialLease, value: float | None, state: Any, **notes: Any) -> None:
        with self.lock:  # no other process may see the trial as running once its own lock is free
            for name, note in notes.items():
                lease.trial.set_user_attr(name, note)
            self._study.tell(lease.trial, value, state)
            lease.lock.release()

    def results(self) -> list[TrialResult]:
        """All trials by their numbers."""
        return [
            TrialResult(
                trial.number,
                _STATES[trial.state.name],
                {key: str(value) for key, value in trial.params.items()},
                trial.value if trial.state.name == "COMPLETE" else None,
                trial.user_attrs.get("reason"),
                trial.user_attrs.get("same_as"),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]
