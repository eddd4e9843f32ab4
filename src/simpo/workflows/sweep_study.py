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

from simpo.config.fields import describe, nearest
from simpo.errors import SimpoError, third_party

# ---- The search space: keys of a recipe, each with values to try or a range to draw from.

# One value for every axis, as it is written on the command line.
Values = dict[str, str]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_LOGARITHMIC_FROM = 10  # ratio of a range's ends
_EDGE = 0.1  # share of a range that counts as its end, which draws hardly ever hit


@dataclass(frozen=True)
class Axis:
    """A key with values to try, or with numbers to draw from a range."""

    key: str
    values: tuple[str, ...]  # all that are tried, or both ends of the range
    range_of: type[int] | type[float] | None = None  # what is drawn from the range; None for values to try

    @property
    def logarithmic(self) -> bool:
        """Whether it is a range on a logarithmic scale: its ends are positive and a factor of ten apart."""
        if self.range_of is None:
            return False
        low, high = map(float, self.values)
        return low > 0 and high / low >= _LOGARITHMIC_FROM

    def suggest(self, trial: Any) -> None:
        """Give an Optuna trial its value."""
        if self.range_of is None:
            trial.suggest_categorical(self.key, list(self.values))
        else:
            suggest = trial.suggest_int if self.range_of is int else trial.suggest_float
            suggest(self.key, *map(self.range_of, self.values), log=self.logarithmic)

    def end(self, value: str) -> str | None:
        """Whether ``value`` is ``smallest`` or ``largest`` of the axis, in a range within a tenth; None for neither.

        Values without an order have no ends.
        """
        numbers = [_number(one) for one in self.values]
        if len(numbers) < 2 or any(map(math.isnan, numbers)):
            return None
        scale = math.log if self.logarithmic else float
        low, high, found = map(scale, (min(numbers), max(numbers), float(value)))
        share, margin = (found - low) / (high - low), 0.0 if self.range_of is None else _EDGE
        if share <= margin:
            return "smallest"
        return "largest" if share >= 1 - margin else None

    def __str__(self) -> str:
        scale = " (logarithmic)" if self.logarithmic else ""
        return f"{self.key} {(', ' if self.range_of is None else ' to ').join(self.values)}{scale}"


def read_axes(options: Mapping[str, Sequence[str]], annotations: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes among the options of a command line: ``A,B,C`` are values to try, ``LOW..HIGH`` is a range.

    ``options`` are the values after every ``--key``; a value that starts with a bracket is JSON and no axis.
    ``annotations`` are the keys of recipes with their types.
    """
    axes = []
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


def _choices(key: str, text: str) -> Axis:
    values = tuple(value.strip() for value in text.split(","))
    for number, value in enumerate(values):
        if not value:
            raise SimpoError(f"--{key}: {text!r} has an empty value; write {key} as A,B,C")
        if any(value == other or _number(value) == _number(other) for other in values[:number]):
            raise SimpoError(f"--{key}: {value} comes twice")
    return Axis(key, values)


def _range(key: str, low: str, high: str, kind: str) -> Axis:
    whole = "a whole number" in kind
    if not whole and "a number" not in kind:
        raise SimpoError(f"--{key}: takes {kind}, which has no ranges; write the values as A,B,C")
    if float(low) >= float(high):
        raise SimpoError(f"--{key}: {low} to {high} is empty; write the smaller number first")
    if whole and not (low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit()):
        raise SimpoError(f"--{key}: {low} to {high} are not whole numbers")
    return Axis(key, (low, high), int if whole else float)


def _number(value: str) -> float:
    """``value`` as a number, or NaN, which equals nothing."""
    with suppress(ValueError):
        return float(value)
    return math.nan


def combinations(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every combination of the axes' values; the last axis changes first. For a grid these are the trials."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every value of each axis, combined with the first values of the others."""
    first = {axis.key: axis.values[0] for axis in axes}
    for axis in axes:
        for value in axis.values:
            yield first | {axis.key: value}


# ---- The trials: which process runs which, and how each ended.

Sampler = Literal["grid", "tpe"]

_DATABASE, _LOCK = "study.db", ".study.lock"
_TIMEOUT = 60  # seconds to wait for another process to finish writing


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


def values_of(trial: Any) -> Values:
    """The values of an Optuna trial as they are written on the command line; empty until it has been taken."""
    return {key: str(value) for key, value in trial.params.items()}


class Study:
    """The trials of one sweep, which are Optuna's, shared by any number of processes.

    The trials of a grid are all created with the study. TPE draws a trial's values when it is taken. A process holds
    the lock of a trial that it runs, and the kernel frees it if the process dies: a trial that is marked as running but
    not locked was left by a killed process, and is taken before any new one.
    """

    def __init__(
        self, folder: Path, axes: Sequence[Axis], sampler: Sampler, trials: int, *, smaller_is_better: bool
    ) -> None:
        """Open the study in an existing folder, or create it."""
        self.optuna = load_optuna()
        self._folder, self._axes, self._sampler, self._trials = folder, axes, sampler, trials
        (folder / "trials").mkdir(exist_ok=True)
        self.lock = FileLock(folder / _LOCK, thread_local=False)
        self._locks: dict[int, FileLock] = {}  # of the trials that this process runs
        advice = "remove it to start over: trials that have finished are not trained again"
        with self.lock, third_party(f"{folder / _DATABASE} is damaged ({advice})"):
            _check_database(folder / _DATABASE)
            self._study = self.optuna.create_study(
                storage=self.optuna.storages.RDBStorage(
                    f"sqlite:///{folder / _DATABASE}", {"connect_args": {"timeout": _TIMEOUT}}
                ),
                study_name="sweep",
                load_if_exists=True,
                direction="minimize" if smaller_is_better else "maximize",
                pruner=self.optuna.pruners.MedianPruner(),
            )
            existing = self.trials()  # of a grid, fewer than all if a process was killed here
            if sampler == "grid":
                for values in list(combinations(axes))[len(existing) :]:
                    self._study.enqueue_trial(values)

    def trials(self) -> list[Any]:
        """All trials by their numbers."""
        return self._study.get_trials(deepcopy=False)

    def folder_of(self, trial: Any) -> Path:
        """The folder in which a trial trains."""
        return self._folder / "trials" / f"{trial.number:03d}"

    def take(self) -> Any | None:
        """Take a trial that a killed process left, or else the next one; None if there is none left."""
        states = self.optuna.trial.TrialState
        with self.lock:
            existing = self.trials()
            for frozen in existing:
                if frozen.state == states.RUNNING and self._lock_trial(frozen.number):
                    return self._suggest(self.optuna.trial.Trial(self._study, frozen._trial_id))
            if len(existing) >= self._trials and not any(trial.state == states.WAITING for trial in existing):
                return None
            if self._sampler == "tpe":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                    # Seeded by the trial's number, so that processes and restarts do not repeat each other's draws.
                    sampler = self.optuna.samplers.TPESampler(seed=len(existing), constant_liar=True)
                self._study.sampler = sampler
            trial = self._study.ask()
            locked = self._lock_trial(trial.number)
            assert locked, "a trial's lock is only taken under the study's"
            return self._suggest(trial)

    def _lock_trial(self, number: int) -> bool:
        lock = FileLock(self._folder / "trials" / f".{number:03d}.lock", timeout=0, thread_local=False)
        with suppress(Timeout):
            lock.acquire()
            self._locks[number] = lock
        return lock.is_locked

    def _suggest(self, trial: Any) -> Any:
        for axis in self._axes:
            axis.suggest(trial)
        return trial

    def end(self, trial: Any, value: float | None, state: str | None = None, **notes: Any) -> None:
        """Record how a trial ended, and release it.

        Args:
            trial: one that :meth:`take` returned.
            value: its metric, of a trial that has finished.
            state: ``PRUNED`` or ``FAIL`` of one that has not.
            notes: ``reason``, why it failed; ``same_as``, the trial with the same values whose metric it took over.
        """
        with self.lock:  # no other process may see the trial as running once its own lock is free
            for name, note in notes.items():
                trial.set_user_attr(name, note)
            self._study.tell(trial, value, None if state is None else self.optuna.trial.TrialState[state])
            self.release(trial)

    def release(self, trial: Any) -> None:
        """Let others take a trial, unless it has ended."""
        if (lock := self._locks.pop(trial.number, None)) is not None:
            lock.release()
