"""The search space of a sweep, and its trials, which Optuna stores in SQLite."""

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

# ---- The search space: recipe keys, each with values to try or a range to sample from.

# One value per axis, as written on the command line.
Values = dict[str, str]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_MIN_LOG_RATIO = 10  # ranges whose ends differ by at least this factor are sampled on a logarithmic scale
_EDGE = 0.1  # fraction of a range that counts as its end: samples rarely hit the end exactly


@dataclass(frozen=True)
class Axis:
    """A key with a list of values to try or a range to sample from."""

    key: str
    values: tuple[str, ...]  # the values to try, or both ends of the range
    range_of: type[int] | type[float] | None = None  # type sampled from the range; None for a list of values

    @property
    def logarithmic(self) -> bool:
        """Whether this is a range sampled on a logarithmic scale: positive, with ends at least a factor of 10 apart."""
        if self.range_of is None:
            return False
        low, high = map(float, self.values)
        return low > 0 and high / low >= _MIN_LOG_RATIO

    def suggest(self, trial: Any) -> None:
        """Let an Optuna trial choose its value."""
        if self.range_of is None:
            trial.suggest_categorical(self.key, list(self.values))
        else:
            suggest = trial.suggest_int if self.range_of is int else trial.suggest_float
            suggest(self.key, *map(self.range_of, self.values), log=self.logarithmic)

    def end(self, value: str) -> str | None:
        """Return ``smallest`` or ``largest`` if ``value`` is at that end of the axis (for a range, within a tenth).

        Otherwise return None, as for values that are not numbers.
        """
        numbers = [_number(one) for one in self.values]
        if len(numbers) < 2 or any(map(math.isnan, numbers)):
            return None
        scale = math.log if self.logarithmic else float
        low, high, scaled = map(scale, (min(numbers), max(numbers), float(value)))
        position, margin = (scaled - low) / (high - low), 0.0 if self.range_of is None else _EDGE
        if position <= margin:
            return "smallest"
        return "largest" if position >= 1 - margin else None

    def __str__(self) -> str:
        scale = " (logarithmic)" if self.logarithmic else ""
        return f"{self.key} {(', ' if self.range_of is None else ' to ').join(self.values)}{scale}"


def read_axes(options: Mapping[str, Sequence[str]], annotations: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Find the axes among command-line options: ``A,B,C`` lists values to try, ``LOW..HIGH`` is a range.

    ``options`` maps each ``--key`` to its values; a value that starts with a bracket is JSON and not an axis.
    ``annotations`` maps recipe keys to their types.
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
            raise SimpoError("--output_dir: cannot vary; name one folder, in which every trial gets a subfolder")
        if match is None:
            axes.append(_choices(key, values[0]))
        else:
            axes.append(_range(key, match[1], match[2], describe(annotations[key])))
    return tuple(axes)


def _choices(key: str, text: str) -> Axis:
    values = tuple(value.strip() for value in text.split(","))
    for number, value in enumerate(values):
        if not value:
            raise SimpoError(f"--{key}: {text!r} has an empty value; write the values as A,B,C")
        if any(value == other or _number(value) == _number(other) for other in values[:number]):
            raise SimpoError(f"--{key}: {value} is given twice")
    return Axis(key, values)


def _range(key: str, low: str, high: str, kind: str) -> Axis:
    whole = "a whole number" in kind
    if not whole and "a number" not in kind:
        raise SimpoError(f"--{key}: takes {kind}, so it cannot be a range; write the values as A,B,C")
    if float(low) >= float(high):
        raise SimpoError(f"--{key}: {low} to {high} is empty; write the smaller number first")
    if whole and not (low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit()):
        raise SimpoError(f"--{key}: {low} to {high} are not whole numbers")
    return Axis(key, (low, high), int if whole else float)


def _number(value: str) -> float:
    """Return ``value`` as a number, or NaN, which equals nothing."""
    with suppress(ValueError):
        return float(value)
    return math.nan


def combinations(axes: Sequence[Axis]) -> Iterator[Values]:
    """Yield every combination of the axes' values, last axis fastest. These are the trials of a grid."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Values]:
    """Yield every value of each axis, combined with the first values of the other axes."""
    first = {axis.key: axis.values[0] for axis in axes}
    for axis in axes:
        for value in axis.values:
            yield first | {axis.key: value}


# ---- The trials: which process runs each one, and how it ended.

Sampler = Literal["grid", "tpe"]

_DATABASE, _LOCK = "study.db", ".study.lock"
_TIMEOUT = 60  # seconds to wait for another process to finish writing


def load_optuna() -> Any:
    """Import and return Optuna, with its log limited to warnings."""
    try:
        import optuna  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError("simpo sweep needs Optuna: pip install 'simpo[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check_database(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=_TIMEOUT)) as database:
        (result,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if result != "ok":
        raise ValueError(result)


def values_of(trial: Any) -> Values:
    """Return an Optuna trial's values as written on the command line; empty until a process has taken it."""
    return {key: str(value) for key, value in trial.params.items()}


class Study:
    """The Optuna trials of one sweep, shared by any number of processes.

    All trials of a grid are created with the study; TPE samples a trial's values when a process takes it. A process
    holds a lock on each trial it runs, and the kernel releases the lock if the process dies. So a trial that is marked
    as running but not locked was left by a killed process, and is taken before any new one.
    """

    def __init__(
        self, folder: Path, axes: Sequence[Axis], sampler: Sampler, trials: int, *, smaller_is_better: bool
    ) -> None:
        """Open the study in an existing folder, or create it."""
        self.optuna = load_optuna()
        self._folder, self._axes, self._sampler, self._trials = folder, axes, sampler, trials
        (folder / "trials").mkdir(exist_ok=True)
        self.lock = FileLock(folder / _LOCK, thread_local=False)
        self._locks: dict[int, FileLock] = {}  # for the trials that this process runs
        advice = "remove it to start over; finished trials are not trained again"
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
            existing = self.trials()  # can be incomplete for a grid, if a process was killed in the loop below
            if sampler == "grid":
                for values in list(combinations(axes))[len(existing) :]:
                    self._study.enqueue_trial(values)

    def trials(self) -> list[Any]:
        """Return all trials, ordered by number."""
        return self._study.get_trials(deepcopy=False)

    def folder_of(self, trial: Any) -> Path:
        """Return the folder in which a trial trains."""
        return self._folder / "trials" / f"{trial.number:03d}"

    def take(self) -> Any | None:
        """Take a trial that a killed process left, or the next one; return None if there are no more."""
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
                    # Seeded by the trial's number, so that processes and restarts do not repeat each other's samples.
                    sampler = self.optuna.samplers.TPESampler(seed=len(existing), constant_liar=True)
                self._study.sampler = sampler
            trial = self._study.ask()
            locked = self._lock_trial(trial.number)
            assert locked, "a trial's lock is only taken while holding the study's lock"
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
            trial: a trial returned by :meth:`take`.
            value: the metric of a finished trial.
            state: ``PRUNED`` or ``FAIL`` for a trial that did not finish.
            notes: ``reason``, why it failed; ``same_as``, the earlier trial whose values it repeats and whose metric it
                takes over.
        """
        with self.lock:  # so that no other process sees the trial as running with its lock free
            for name, note in notes.items():
                trial.set_user_attr(name, note)
            self._study.tell(trial, value, None if state is None else self.optuna.trial.TrialState[state])
            self.release(trial)

    def release(self, trial: Any) -> None:
        """Release this process's lock on a trial, so that others can take it unless it has ended."""
        if (lock := self._locks.pop(trial.number, None)) is not None:
            lock.release()
