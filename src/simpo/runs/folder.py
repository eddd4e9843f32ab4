"""RunFolder: the output folder of one command, from the first look to the manifest, and its ``run.json``."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from filelock import FileLock, Timeout

from simpo.errors import SimpoError
from simpo.runs import manifest
from simpo.runs.atomic import disk_errors, sweep, write_text
from simpo.runs.lines import JsonLines
from simpo.runs.log import LogFile, masked, now, redact, redact_arguments, redact_yaml
from simpo.runs.manifest import environment
from simpo.runs.results import FILE_NAME as RESULTS
from simpo.runs.results import Metric, fingerprint, write_results
from simpo.runs.terminal import printable

# ---- ``run.json``: which command ran here, what determines its result, when it started and whether it
# finished.


FILE_NAME = "run.json"


SCHEMA = 1


_ABSENT = object()


_DIGEST = re.compile(r"[0-9a-f]{64}")


_LONG = 80  # characters; a longer value is not shown


@dataclass
class RunRecord:
    """One command's run; the fields are the keys of ``run.json``, next to ``schema`` and ``fingerprint``.

    Attributes:
        command: what ran, e.g. ``train``.
        identity: what determines the result: flat, JSON values.
        status: whether it has finished.
        starts: when it was started and resumed, in UTC.
        finished: when it finished.
        changes: how the identity was changed on the way: ``time``, and the old and new values ``there`` and ``now``.
    """

    command: str
    identity: dict[str, Any]
    status: Literal["running", "finished"] = "running"
    starts: list[str] = field(default_factory=list)
    finished: str | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder.

        Raises:
            FileNotFoundError: there is none.
            SimpoError: it cannot be read.
        """
        path = folder / FILE_NAME
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("schema") != SCHEMA:
                raise ValueError(f"schema: expected {SCHEMA}")
            del document["fingerprint"]
            record = cls(**document)
            if not isinstance(record.identity, dict) or record.status not in ("running", "finished"):
                raise ValueError("neither running nor finished, or without identity")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SimpoError(f"output_dir: {path} is not readable ({error}); name a new folder") from error
        return record

    def write(self, folder: Path) -> None:
        """Write it to a folder.

        Raises:
            SimpoError: it cannot be written.
        """
        document = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(self)}
        write_text(folder / FILE_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the identity; see :func:`simpo.runs.results.fingerprint`."""
        return fingerprint(self.identity)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """The keys in which another identity differs, each with both values, as text."""
        return [_difference(key, there, here) for key, (there, here) in self._pairs(identity).items()]

    def change(self, identity: dict[str, Any]) -> None:
        """Take another identity and remember the former values."""
        keys = self._pairs(identity)
        there, here = ({key: known[key] for key in keys if key in known} for known in (self.identity, identity))
        self.changes.append({"time": now(), "there": there, "now": here})
        self.identity = identity

    def _pairs(self, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The keys in which another identity differs, with both values."""
        keys = sorted({*self.identity, *identity})
        pairs = {key: (self.identity.get(key, _ABSENT), identity.get(key, _ABSENT)) for key in keys}
        return {key: (there, here) for key, (there, here) in pairs.items() if there != here}


def _difference(key: str, *values: Any) -> str:
    there, here = map(_shown, values)
    digests = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in values)
    if digests or max(len(there), len(here)) > _LONG:
        return f"{key}: other contents"
    return f"{key}: {there} there, {here} now"


def _shown(value: Any) -> str:
    return "not given" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


_LOCK, _HOLDER = ".lock", ".lock.pid"


# Seconds to wait for the lock: a child that a process was starting when it was killed has its copy for a moment.
_PATIENCE = 0.5


# What changes after the run has finished, and checkpoints and a sweep's trials, which have manifests of their own.
_UNLISTED = ("checkpoint-*", "trials", FILE_NAME, "log.txt", ".*")


class FolderInUseError(SimpoError):
    """Another process is at work in the folder."""


class RunFolder:
    """One command's output folder; a context manager that gives the folder free at its end.

    The folder is looked at when this is made and written from :meth:`begin` on, so that whatever is refused in
    between leaves no trace. While it is in use no other process can use it. The kernel holds that lock and gives it
    free when the process ends, however it does, so that no stale lock is ever left. Children that are forked (data
    loaders, datasets' workers) give up their copy of it at once, or, with a filelock before 4, when they notice that
    their parent is gone.

    It holds ``run.json`` (see :class:`~simpo.runs.folder.RunRecord`), ``recipe.yaml`` (as given, under the command
    line), ``recipe.resolved.yaml`` (all keys), ``environment.json``, ``log.txt``, ``metrics.jsonl``, what the command
    makes, and at the end ``manifest.json``. What was given and the environment are those of the last start.
    In a run of several processes only the first one writes.

    Attributes:
        path: the folder.
        command: the command that it is for.
        writes: False for the other processes of a run, whose RunFolder reads, locks, writes and logs nothing.
        resuming: whether it held an unfinished run of this command.
        changed: whether it goes on with another identity, from :meth:`begin` on.
        fingerprint: SHA-256 of the identity, from :meth:`begin` on.
        metrics: ``metrics.jsonl``, from :meth:`begin` on.
    """

    fingerprint = ""
    metrics: JsonLines

    def __init__(self, path: Path | str, *, command: str, writes: bool = True) -> None:
        """Look at the folder, and if it holds a run take it.

        Raises:
            SimpoError: it cannot be used: it is a file, cannot be written, holds something else or another
                command's run, or is in use (:class:`FolderInUseError`).
        """
        self.path = Path(path)
        self.command = command
        self.writes = writes
        self._lock: FileLock | None = None
        self._log: LogFile | None = None
        self._said: list[str] = []  # before there is a log
        self._record: RunRecord | None = None
        self._absent = False
        self.changed = False
        if writes:
            with disk_errors(f"output_dir: {self.path}"):
                _check_usable(self.path)
                self._absent = not self.path.exists()
                self._record = self._look()
            if self._record is not None:
                self._take()
                self._record = self._look()  # it may have been finished before it was free
        self.resuming = self._record is not None and not self.finished

    @property
    def finished(self) -> bool:
        """Whether a finished run is in the folder."""
        return self._record is not None and self._record.status == "finished"

    def reopen(self) -> None:
        """Take a finished run for one that goes on, from :meth:`begin` on, which comes next."""
        assert self._record is not None, "there is a finished run"
        self._record.status, self._record.finished = "running", None

    def begin(
        self,
        identity: Mapping[str, Any],
        *,
        argv: Sequence[str] = (),
        recipe: Path | None = None,
        resolved: Mapping[str, Any] | None = None,
        accept_changes: bool | None = None,
    ) -> None:
        """Write what the run is, or compare it with what is there; in a finished run only compare.

        Args:
            identity: what determines the result: flat, JSON values, such as a recipe's keys and digests of data.
            argv: the command line after the command's name.
            recipe: the file that the user gave.
            resolved: all keys of the recipe and their values.
            accept_changes: resume a run whose identity is another, and record that; None if the command has no
                such key, because what it has written would not go together with what it would write.

        Raises:
            SimpoError: the folder holds a run with another identity, cannot be written, or was taken in between
                (:class:`FolderInUseError`).
        """
        if not self.writes:
            return
        if self._lock is None:
            self._take()
            if self._look() is not None:
                raise FolderInUseError(f"output_dir: {self.path} was taken by another run just now; name a new folder")
        settled = json.loads(json.dumps(redact(identity)))  # as run.json will give it back
        changed = self._compare(settled, accept_changes)
        self.changed = bool(changed)
        with disk_errors(self.path):
            sweep(self.path)
        if not self.finished:
            self._write_start(settled, argv, recipe, resolved)
        assert self._record is not None
        self.fingerprint = self._record.fingerprint
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self._open_log()
        if changed:
            self.log(f"continued with other settings: {'; '.join(changed)}")

    def log(self, line: str) -> None:
        """Print a line and keep it in ``log.txt``, without access tokens."""
        if not self.writes:
            return
        print(printable(masked(line)))
        if self._log is None:
            self._said.append(line)
        else:
            self._log.write(line)

    def complete(self, compute: Callable[[], Sequence[Metric]]) -> Path:
        """Compute the metrics, write ``results.json`` and finish; a finished run is left as it is.

        Args:
            compute: does the work of the run and returns its metrics; called after :meth:`begin`.

        Returns:
            The path of ``results.json``.
        """
        if self.finished:
            self.log(f"{self.path} already holds this run, finished: nothing was computed")
            return self.path / RESULTS
        metrics = compute()
        if self.writes:
            write_results(self.path, command=self.command, fingerprint=self.fingerprint, metrics=metrics)
        self.finish()
        return self.path / RESULTS

    def finish(self) -> None:
        """Write the manifest and, last of all, that the run has finished.

        Raises:
            SimpoError: the folder cannot be written.
        """
        if not self.writes:
            return
        assert self._record is not None, "begin() comes first"
        manifest.write_manifest(self.path, exclude=_UNLISTED)
        self._record.status, self._record.finished = "finished", now()
        self._record.write(self.path)

    def close(self) -> None:
        """Give the folder free."""
        if self._log is not None:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._absent and self._lock is None:  # never begun; but transformers may have made the folder
            with suppress(OSError):
                self.path.rmdir()
        self.close()

    def _look(self) -> RunRecord | None:
        """The run that the folder holds; None if it is empty or not there."""
        try:
            found = RunRecord.read(self.path)
        except FileNotFoundError:
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise SimpoError(
                    f"output_dir: {self.path} is not empty and holds no run of simpo; name a new folder"
                ) from None
            return None
        if found.command != self.command:
            raise SimpoError(
                f"output_dir: {self.path} holds a run of {found.command!r}, not of {self.command!r}; name a new folder"
            )
        return found

    def _take(self) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, timeout=_PATIENCE, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                raise FolderInUseError(
                    f"output_dir: {self.path} is in use by another run{self._holder()}; "
                    "wait for it or name a new folder"
                ) from None
        self._lock = lock
        # Beside the lock, because some versions of filelock empty a lock file that they try to take.
        write_text(self.path / _HOLDER, f"{os.getpid()}\n")

    def _holder(self) -> str:
        try:
            return f" (process {(self.path / _HOLDER).read_text(encoding='utf-8').strip()})"
        except OSError:
            return ""

    def _compare(self, identity: dict[str, Any], accept_changes: bool | None) -> list[str]:
        """The differences from the run that is there, if they are accepted."""
        differences = self._record.differences(identity) if self._record else []
        if not differences or (accept_changes and not self.finished):
            return differences
        kind, way = ("a finished run", "") if self.finished else ("a run", "give the same ones or ")
        offered = accept_changes is not None and not self.finished
        last = ", or continue anyway with accept_changes: true" if offered else ""
        raise SimpoError(
            f"output_dir: {self.path} holds {kind} with other settings ({'; '.join(differences)}); "
            f"{way}name a new folder{last}"
        )

    def _write_start(
        self,
        identity: dict[str, Any],
        argv: Sequence[str],
        recipe: Path | None,
        resolved: Mapping[str, Any] | None,
    ) -> None:
        if self._record is None:
            self._record = RunRecord(self.command, identity)
        elif self._record.differences(identity):
            self._record.change(identity)
        self._record.starts.append(now())
        self._record.write(self.path)  # first, because without it the folder would hold no run
        write_text(self.path / "recipe.yaml", _given(self.command, argv, recipe))
        if resolved is not None:
            plain = _plain(redact(resolved))
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            write_text(self.path / "recipe.resolved.yaml", text)
        write_text(self.path / "environment.json", json.dumps(environment(), indent=2, ensure_ascii=False) + "\n")

    def _open_log(self) -> None:
        self._log = LogFile(self.path / "log.txt")
        for line in self._said:
            self._log.write(line)
        self._said.clear()
        logging.getLogger().addHandler(self._log)


def _check_usable(path: Path) -> None:
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise SimpoError(f"output_dir: {place} is a file; name a folder")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise SimpoError(
            f"output_dir: {place} cannot be read and written (permissions, or a read-only disk); name another folder"
        )


def _given(command: str, argv: Sequence[str], recipe: Path | None) -> str:
    line = shlex.join(["simpo", command, *redact_arguments(argv)])
    text = "" if recipe is None else recipe.read_text(encoding="utf-8")
    return textwrap.indent(line, "# ", lambda line: True) + "\n" + redact_yaml(text)


def _plain(value: Any) -> Any:
    """What YAML can hold: enumerations by their value, and objects by their text."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)
