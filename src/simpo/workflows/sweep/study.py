"""The trials of a sweep in SQLite, through Optuna: who runs which, and how it ended."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from simpo.errors import SimpoError
from simpo.workflows.sweep.space import Axis, Values, combinations

Sampler = Literal["grid", "tpe"]
State = Literal["waiting", "running", "finished", "pruned", "failed"]

_STUDY = "sweep"
_DATABASE, _LOCK = "study.db", ".study.lock"
_BUSY = 60  # seconds that a process waits for another one's write


def load_optuna() -> Any:
    """The package.

    Raises:
        SimpoError: it is not installed.
    """
    try:
        import optuna  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError("simpo sweep needs Optuna: pip install 'simpo[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class TrialResult:
    """A trial and how it ended.

    Attributes:
        number: from 0 on; its folder is named after it.
        state: whether it has finished, and how.
        values: its value of every axis; empty until it was taken.
        value: the metric's, of a finished trial.
        reason: why it failed.
        same_as: the trial with the same values that it took its value from, instead of training again.
    """

    number: int
    state: State
    values: Values
    value: float | None = None
    reason: str | None = None
    same_as: int | None = None


@dataclass
class TrialLease:
    """A trial that is this process's until it is released; the kernel releases what a killed process held.

    Attributes:
        number: the trial's.
        values: its value of every axis.
        trial: Optuna's.
    """

    number: int
    values: Values
    trial: Any
    _lock: FileLock = field(repr=False)
    _writing: FileLock = field(repr=False)  # the study's

    def report(self, value: float, step: int) -> bool:
        """Tell of an evaluation after ``step``; whether the trial should be broken off."""
        with self._writing:
            self.trial.report(value, step)
            return self.trial.should_prune()

    def release(self) -> None:
        """Let another process have it, if it has not been settled."""
        self._lock.release()


class Study:
    """The trials of one sweep, shared by any number of processes.

    A grid's trials are all laid down when the study is made, in the order of the combinations. TPE draws a trial's
    values when it is taken. A trial is taken under a lock of its own that the kernel gives free when its process ends:
    one that is running and unlocked was killed, and is taken again under its own number before any new one.
    """

    def __init__(
        self, folder: Path, axes: Sequence[Axis], sampler: Sampler, trials: int, *, smaller_is_better: bool
    ) -> None:
        """Open the study in ``folder``, or make it.

        Args:
            folder: of the sweep; there.
            axes: what is varied.
            sampler: ``grid`` for every combination, or ``tpe``.
            trials: how many there will be.
            smaller_is_better: whether the metric is to be small.
        """
        self._optuna = load_optuna()
        self._folder, self._axes, self._sampler, self._trials = folder, axes, sampler, trials
        (folder / "trials").mkdir(exist_ok=True)
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        storage_options = {"connect_args": {"timeout": _BUSY}}
        with self._lock:
            self._study = self._optuna.create_study(
                storage=self._optuna.storages.RDBStorage(f"sqlite:///{folder / _DATABASE}", storage_options),
                study_name=_STUDY,
                load_if_exists=True,
                direction="minimize" if smaller_is_better else "maximize",
                pruner=self._optuna.pruners.MedianPruner(),
            )
            if sampler == "grid":
                there = len(self._study.get_trials(deepcopy=False))  # fewer, if a process was killed here
                for values in list(combinations(axes))[there:]:
                    self._study.enqueue_trial(values)

    def trial_folder(self, number: int) -> Path:
        """Where a trial trains."""
        return self._folder / "trials" / f"{number:03d}"

    def claim(self) -> TrialLease | None:
        """Take a trial that a killed process left, or else the next; None if there is none to take."""
        with self._lock:
            running, waiting, count = self._census()
            for frozen in running:
                lock = self._try(frozen.number)
                if lock is not None:
                    return self._claim(self._optuna.trial.Trial(self._study, frozen._trial_id), lock)
            if not waiting and count >= self._trials:
                return None
            self._study.sampler = self._new_sampler(count)
            trial = self._study.ask()
            lock = self._try(trial.number)
            assert lock is not None, "a trial's lock is only taken under the study's"
            return self._claim(trial, lock)

    def _census(self) -> tuple[list[Any], bool, int]:
        """Trials that are running, whether some wait, and how many there are."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state == states.RUNNING]
        return running, any(trial.state == states.WAITING for trial in trials), len(trials)

    def _new_sampler(self, number: int) -> Any:
        """A trial's sampler, seeded by its number, so that processes and restarts do not repeat each other's draws."""
        if self._sampler == "grid":
            return self._optuna.samplers.RandomSampler()  # never asked: the values are laid down
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return self._optuna.samplers.TPESampler(seed=number, constant_liar=True)

    def _try(self, number: int) -> FileLock | None:
        lock = FileLock(self._folder / "trials" / f".{number:03d}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _claim(self, trial: Any, lock: FileLock) -> TrialLease:
        values = {axis.key: axis.suggest(trial) for axis in self._axes}
        return TrialLease(trial.number, values, trial, lock, self._lock)

    def finish(self, claim: TrialLease, value: float, *, same_as: int | None = None) -> None:
        """The trial has its value, if need be from another one."""
        self._settle(claim, value, same_as=same_as)

    def prune(self, claim: TrialLease) -> None:
        """The trial was broken off because others did better by then."""
        self._settle(claim, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, claim: TrialLease, reason: str) -> None:
        """The trial cannot be finished."""
        self._settle(claim, state=self._optuna.trial.TrialState.FAIL, reason=reason)

    def _settle(self, claim: TrialLease, value: float | None = None, state: Any = None, **notes: Any) -> None:
        # Under the study's lock, so that who looks for trials of killed processes sees this one taken or settled.
        with self._lock:
            for name, note in notes.items():
                claim.trial.set_user_attr(name, note)
            self._study.tell(claim.trial, value, state)
        claim.release()

    def tried(self) -> list[TrialResult]:
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


_STATES: dict[str, State] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
}
