"""The search space of a sweep, and its trials in SQLite, through Optuna."""

from __future__ import annotations

import itertools
import math
import re
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from simpo.config.coercion import describe, nearest
from simpo.errors import SimpoError, third_party

# ---- The search space: keys of a recipe, each with values to try or a range to draw from.

# One value for every axis, as it is written on the command line.
Values = dict[str, str]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_LOGARITHMIC_FROM = 10  # ratio of a range's ends
_EDGE = 0.1  # share of a range that counts as its end


@dataclass(frozen=True)
class Choices:
    """A key with values to try."""

    key: str
    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        return trial.suggest_categorical(self.key, list(self.values))

    @property
    def probes(self) -> tuple[str, ...]:
        """Values that are checked before anything runs: all of them."""
        return self.values

    def edge(self, value: str) -> str | None:
        """Whether ``value`` is the ``smallest`` or ``largest`` of several numbers; None for neither."""
        numbers = {_number(choice) for choice in self.values}
        if len(numbers) < 2 or any(map(math.isnan, numbers)):
            return None
        return {min(numbers): "smallest", max(numbers): "largest"}.get(float(value))

    def __str__(self) -> str:
        return f"{self.key} {', '.join(self.values)}"


@dataclass(frozen=True)
class Range:
    """A key with numbers between two ends, on a logarithmic scale if they are positive and a factor of ten apart."""

    key: str
    low: str
    high: str
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Whether the scale is logarithmic."""
        return float(self.low) > 0 and float(self.high) / float(self.low) >= _LOGARITHMIC_FROM

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.logarithmic))
        return repr(trial.suggest_float(self.key, float(self.low), float(self.high), log=self.logarithmic))

    @property
    def probes(self) -> tuple[str, ...]:
        """Values that are checked before anything runs: both ends."""
        return self.low, self.high

    def edge(self, value: str) -> str | None:
        """Whether ``value`` is within a tenth of the ``smallest`` or ``largest`` end; None for neither."""
        scale = math.log if self.logarithmic else float
        low, high, found = (scale(float(number)) for number in (self.low, self.high, value))
        share = (found - low) / (high - low)
        if share <= _EDGE:
            return "smallest"
        return "largest" if share >= 1 - _EDGE else None

    def __str__(self) -> str:
        return f"{self.key} {self.low} to {self.high}{' (logarithmic)' if self.logarithmic else ''}"


Axis = Choices | Range


def read_axes(options: Mapping[str, Sequence[str]], annotations: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes among the options of a command line: ``A,B,C`` are values to try, ``LOW..HIGH`` is a range.

    ``options`` are the values after every ``--key``; a value that starts with a bracket is JSON and no axis.
    ``annotations`` are the keys of recipes with their types.
    """
    axes: list[Axis] = []
    for key, values in options.items():
        if len(values) != 1 or values[0].startswith(("[", "{")):
            continue
        match = _RANGE.fullmatch(values[0])
        if match is None and "," not in values[0]:
            continue
        if key not in annotations:
            raise SimpoError(f"--{key}: unknown key{nearest(key, annotations)}")
        if key == "output_dir":
            raise SimpoError("--output_dir: the sweep has one folder, with a folder for every trial in it; name one")
        if match is None:
            axes.append(_choices(key, values[0]))
        else:
            axes.append(_range(key, match[1], match[2], describe(annotations[key])))
    return tuple(axes)


def _choices(key: str, text: str) -> Choices:
    values = tuple(value.strip() for value in text.split(","))
    for number, value in enumerate(values):
        if not value:
            raise SimpoError(f"--{key}: {text!r} has an empty value; write {key} as A,B,C")
        if any(value == other or _number(value) == _number(other) for other in values[:number]):
            raise SimpoError(f"--{key}: {value} comes twice")
    return Choices(key, values)


def _range(key: str, low: str, high: str, kind: str) -> Range:
    whole = "a whole number" in kind
    if not whole and "a number" not in kind:
        raise SimpoError(f"--{key}: takes {kind}, which has no ranges; write the values as A,B,C")
    if float(low) >= float(high):
        raise SimpoError(f"--{key}: {low} to {high} is empty; write the smaller number first")
    if whole and not (low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit()):
        raise SimpoError(f"--{key}: {low} to {high} are not whole numbers")
    return Range(key, low, high, whole)


def _number(value: str) -> float:
    """``value`` as a number, or NaN, which equals nothing."""
    with suppress(ValueError):
        return float(value)
    return math.nan


def combinations(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every combination of the axes' probes; the last axis changes first. For a grid these are the trials."""
    for values in itertools.product(*(axis.probes for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every probe of each axis, combined with the first probes of the others."""
    first = {axis.key: axis.probes[0] for axis in axes}
    for axis in axes:
        for value in axis.probes:
            yield first | {axis.key: value}


def format_values(values: Mapping[str, str]) -> str:
    """``learning_rate 3e-7, beta 2``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


# ---- The trials: which process runs which, and how each ended.

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
