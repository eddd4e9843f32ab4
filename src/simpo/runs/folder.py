"""RunFolder: the output folder of one command, from the first check to the manifest, and its ``run.json``."""

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
from traceback import format_exception
from typing import Any, ClassVar, Literal, Self

import yaml
from filelock import FileLock, Timeout

from simpo.errors import InterruptedRun, SimpoError, third_party
from simpo.runs import manifest
from simpo.runs.files import JsonLines, disk_errors, remove_leftovers, write_text
from simpo.runs.log import EarlyNotices, LogFile, mask_secrets, redact, redact_arguments, redact_yaml, utc_now
from simpo.runs.results import FILE_NAME as RESULTS
from simpo.runs.results import Metric, fingerprint, write_results
from simpo.runs.terminal import output_is_closed, printable

FILE_NAME = "run.json"
SCHEMA = 1

_ENVIRONMENT = "environment.json"
_LOCK, _HOLDER = ".lock", ".lock.pid"
# Seconds to wait for the lock. A child that was just being forked when its parent was killed holds it for a moment,
# which is long on a busy machine.
_PATIENCE, _PATIENCE_AFTER_A_KILL = 0.5, 20
# Not in the manifest: what changes after the run has finished, such as a model card that somebody edits or a report
# that is written again, and what has a manifest of its own.
_UNLISTED = ("checkpoint-*", "trials", FILE_NAME, "log.txt", "README.md", "report.html", "*/report.html", ".*")

_ABSENT = object()
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_SHOWN = 80  # characters of a value in a message


@dataclass
class RunRecord:
    """One command's run; the fields are the keys of ``run.json``, next to ``schema`` and ``fingerprint``."""

    command: str  # the command that ran, e.g. `train`
    identity: dict[str, Any]  # what determines the result: a flat mapping of JSON values
    status: Literal["running", "finished"] = "running"  # whether it has finished
    starts: list[str] = field(default_factory=list)  # when it was started and resumed, in UTC
    finished: str | None = None  # when it finished
    # Changes of the identity between starts: `time`, old values (`there`) and new ones (`now`).
    changes: list[dict[str, Any]] = field(default_factory=list)
    # Bytes that the process which finished held at most, of the machine (`host`) and of its GPU (`device`).
    peak_memory: dict[str, int] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder.

        Raises:
            FileNotFoundError: there is none.
            SimpoError: it cannot be read.
        """
        path = folder / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(path)
        with third_party(f"output_dir: {path} is not readable; name a new folder"):
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("schema") != SCHEMA:
                raise ValueError(f"schema: expected {SCHEMA}")
            stored = document.pop("fingerprint")
            record = cls(**document)
            if not isinstance(record.identity, dict) or record.status not in ("running", "finished"):
                raise ValueError("neither running nor finished, or without identity")
            if stored != record.fingerprint:
                raise ValueError("its fingerprint is not that of its identity")
        return record

    def write(self, folder: Path) -> None:
        """Write it to a folder."""
        document = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(self)}
        write_text(folder / FILE_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """The keys in which another identity differs, each with both values, as text."""
        return [_difference(key, old, new) for key, (old, new) in self._changed(identity).items()]

    def change(self, identity: dict[str, Any]) -> None:
        """Take another identity and remember the old values."""
        keys = self._changed(identity)
        old, new = ({key: known[key] for key in keys if key in known} for known in (self.identity, identity))
        self.changes.append({"time": utc_now(), "there": old, "now": new})
        self.identity = identity

    def _changed(self, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        keys = sorted({*self.identity, *identity})
        pairs = {key: (self.identity.get(key, _ABSENT), identity.get(key, _ABSENT)) for key in keys}
        return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _difference(key: str, *values: Any) -> str:
    old, new = ("not given" if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in values)
    digests = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in values)
    if digests or max(len(old), len(new)) > _LONGEST_SHOWN:
        return f"{key}: other contents"
    return f"{key}: {old} there, {new} now"


class FolderInUseError(SimpoError):
    """Another process is using the folder."""


class RunFolder:
    """One command's output folder; a context manager that releases the folder at its end.

    The folder is checked when this is created and written from :meth:`begin` on, so that input that is refused in
    between leaves no trace. While a run uses the folder no other process can. The lock is the kernel's and ends with
    the process however it ends, so that no stale lock remains. Forked children (data loaders, datasets' workers)
    release their copy of it at once, or, with filelock before 4, when they notice that their parent is gone.

    It holds ``run.json`` (:class:`RunRecord`), ``recipe.yaml`` (as given, below the command line),
    ``recipe.resolved.yaml`` (all keys), ``environment.json``, ``log.txt``, ``metrics.jsonl``, the command's own files,
    and at the end ``results.json`` and ``manifest.json``. Recipe and environment are those of the last start.

    Attributes:
        path: the folder.
        command: the command that it is for.
        writes: False in all processes of a run but the first; their RunFolder reads, locks, writes and logs nothing.
        resuming: whether it held an unfinished run of this command.
        changed: whether the run continues with another identity, from :meth:`begin` on.
        fingerprint: SHA-256 of the identity, from :meth:`begin` on.
        metrics: ``metrics.jsonl``, from :meth:`begin` on.
        hashes_all: whether every file of a finished run is hashed before it is reported as finished. Otherwise only
            files that were modified since are; the option ``--verify`` of all commands sets it.
        latest: the finished run that this process closed last; runs within a run are closed before it.
    """

    metrics: JsonLines
    hashes_all: ClassVar[bool] = False
    latest: ClassVar[Path | None] = None

    def __init__(self, path: Path | str, *, command: str, writes: bool = True) -> None:
        """Check the folder, and lock it if it holds a run.

        Raises:
            SimpoError: it cannot be used: it is a file, cannot be written, holds something else or another
                command's run, or is in use (:class:`FolderInUseError`).
        """
        self.path = Path(path)
        self.command = command
        self.writes = writes
        self.changed = False
        self.fingerprint = ""
        self._record: RunRecord | None = None
        self._absent = False
        self._lock: FileLock | None = None
        self._log: LogFile | None = None
        self._early_lines: list[str] = []  # logged before there is a log
        if writes:
            with disk_errors(f"output_dir: {self.path}"):
                _check_usable(self.path)
                self._absent = not self.path.exists()
                self._record = self._read()
            if self._record is not None:
                self._take()
                self._record = self._read()  # it may have finished while we waited for the lock
        self.resuming = self._record is not None and not self.finished

    @property
    def finished(self) -> bool:
        """Whether a finished run is in the folder."""
        return self._record is not None and self._record.status == "finished"

    def reopen(self) -> None:
        """Continue a finished run, from :meth:`begin` on, which has to follow."""
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
        """Record the start of the run, or compare it with the run in the folder; a finished run is only compared.

        Args:
            identity: what determines the result: flat, JSON values, such as a recipe's keys and digests of data.
            argv: the command line after the command's name.
            recipe: the file that the user gave.
            resolved: all keys of the recipe and their values.
            accept_changes: resume a run that has another identity, and record the change; None if the command has no
                such key, because its earlier and later output would not go together.

        Raises:
            SimpoError: the folder holds a run with another identity, cannot be written, or was taken in between
                (:class:`FolderInUseError`).
        """
        if not self.writes:
            return
        if self._lock is None:
            self._take()
            if self._read() is not None:
                raise FolderInUseError(f"output_dir: {self.path} was taken by another run just now; name a new folder")
        settled = json.loads(json.dumps(redact(identity)))  # as it will be read back from run.json
        differences = self._record.differences(settled) if self._record else []
        if differences and (self.finished or not accept_changes):
            kind, advice = ("a finished run", "") if self.finished else ("a run", "give the same ones or ")
            offered = accept_changes is not None and not self.finished
            last = ", or continue anyway with accept_changes: true" if offered else ""
            versions = self._other_versions()
            if versions and not self.finished:
                advice += f"continue with the versions that it was started with ({versions}), or "
            raise SimpoError(
                f"output_dir: {self.path} holds {kind} with other settings ({'; '.join(differences)}); "
                f"{advice}name a new folder{last}"
            )
        self.changed = bool(differences)
        self._check_whole()
        with disk_errors(self.path):
            remove_leftovers(self.path)
        if not self.finished:
            self._write_start(settled, argv, recipe, resolved)
        assert self._record is not None
        self.fingerprint = self._record.fingerprint
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self._open_log()
        if differences:
            self.log(f"continued with other settings: {'; '.join(differences)}")

    def _open_log(self) -> None:
        """Open the log, with everything in it that was logged before there was one."""
        self._log = LogFile(self.path / "log.txt")
        for handler in [one for one in logging.getLogger().handlers if isinstance(one, EarlyNotices)]:
            logging.getLogger().removeHandler(handler)
            handler.setTarget(self._log)
            handler.close()  # which writes what it has kept
        for line in self._early_lines:
            self._log.write(line)
        self._early_lines.clear()
        logging.getLogger().addHandler(self._log)

    def _other_versions(self) -> str:
        """The packages whose versions have changed since the last start, with their earlier versions.

        Another version may have other settings in a run's identity, and compute other numbers.
        """
        path, now = self.path / _ENVIRONMENT, manifest.versions()
        with suppress(SimpoError), third_party(path.name):  # without it, the message is less helpful
            then = json.loads(path.read_text(encoding="utf-8"))["packages"]
            return ", ".join(f"{name} {then[name]}" for name in now if then.get(name) != now[name])
        return ""

    def _check_whole(self) -> None:
        """Refuse finished runs whose files are not those that they wrote: this run, and those within it."""
        within = [path.parent for path in self.path.glob("*/**/" + FILE_NAME)]
        finished = [self.path] if self.finished else [run for run in within if RunRecord.read(run).status == "finished"]
        for run in finished:
            if damage := _find_damage(run, hashes_all=self.hashes_all):
                held = "this run" if run == self.path else "a run"
                raise SimpoError(
                    f"output_dir: {run} holds {held}, finished, but {damage}; restore the file, or name a new folder"
                )
        if self.hashes_all and self.finished:
            self.log(f"{self.path}: every file is as it was written (sha256)")

    def log(self, line: str) -> None:
        """Print a line and keep it in ``log.txt``, without access tokens; the run outlives a reader of its output."""
        if not self.writes:
            return
        try:
            print(printable(mask_secrets(line)))
        except BrokenPipeError:
            if self._log is None or not output_is_closed():
                raise
            self._log.write("note: nobody reads the output any longer; the run continues, with this log")
        if self._log is None:
            self._early_lines.append(line)
        else:
            self._log.write(line)

    def complete(self, compute: Callable[[], Sequence[Metric]]) -> Path:
        """Compute the metrics, write ``results.json`` and finish; a finished run is left as it is.

        Returns the path of ``results.json``. ``compute`` does the work of the run after :meth:`begin` and returns its
        metrics.
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
        """Write the manifest and, last of all, that the run has finished."""
        if not self.writes:
            return
        assert self._record is not None, "begin() comes first"
        manifest.write_manifest(self.path, exclude=_UNLISTED)
        self._record.status, self._record.finished = "finished", utc_now()
        self._record.peak_memory = manifest.peak_memory()
        self._record.write(self.path)

    def close(self) -> None:
        """Release the folder."""
        if self.writes and self.finished:
            RunFolder.latest = self.path
        if self._log is not None:
            logging.getLogger().removeHandler(self._log)
            self._log.close()
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._log is not None and error is not None:
            text = f"error: {error}" if isinstance(error, SimpoError | InterruptedRun) else "error"
            cause = isinstance(error, InterruptedRun) or (isinstance(error, SimpoError) and error.__cause__ is None)
            with suppress(SimpoError):  # the log may be what cannot be written
                self._log.write(text if cause else text + "\n" + "".join(format_exception(error)))
        if self._absent and self._lock is None:  # never begun, but transformers may have created the folder
            with suppress(OSError):
                self.path.rmdir()
        self.close()

    def _read(self) -> RunRecord | None:
        """The run that the folder holds; None if it is empty or does not exist."""
        try:
            found = RunRecord.read(self.path)
        except FileNotFoundError:
            for entry in self.path.iterdir() if self.path.is_dir() else ():
                # A hidden link could lead what is written, such as the lock, to a file outside.
                if not entry.name.startswith(".") or entry.is_symlink():
                    raise SimpoError(
                        f"output_dir: {self.path} is not empty ({entry.name[:80]}) and holds no run of simpo; "
                        "name a new folder"
                    ) from None
            return None
        if found.command != self.command:
            raise SimpoError(
                f"output_dir: {self.path} holds a run of {found.command!r}, not of {self.command!r}; name a new folder"
            )
        return found

    def _take(self) -> None:
        holder = self.path / _HOLDER  # a file of its own, because some versions of filelock empty the lock file
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock, process = FileLock(self.path / _LOCK, thread_local=False), ""
            try:
                with suppress(Timeout):
                    lock.acquire(timeout=_PATIENCE)
                if not lock.is_locked:
                    process = holder.read_text(encoding="utf-8").strip() if holder.exists() else ""
                    gone = Path("/proc/self").exists() and not Path("/proc", process).exists()
                    lock.acquire(timeout=_PATIENCE_AFTER_A_KILL if gone else 0)
            except Timeout:
                named = f" (process {process})" if process else ""
                raise FolderInUseError(
                    f"output_dir: {self.path} is in use by another run{named}; wait for it or name a new folder"
                ) from None
        self._lock = lock
        write_text(holder, f"{os.getpid()}\n")

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
        self._record.starts.append(utc_now())
        self._record.write(self.path)  # first, because without it the folder would hold no run
        command_line = shlex.join(["simpo", self.command, *redact_arguments(argv)])
        recipe_text = "" if recipe is None else redact_yaml(recipe.read_text(encoding="utf-8"))
        write_text(
            self.path / "recipe.yaml", textwrap.indent(command_line, "# ", lambda line: True) + "\n" + recipe_text
        )
        if resolved is not None:
            text = yaml.safe_dump(_plain(redact(resolved)), sort_keys=False, allow_unicode=True)
            write_text(self.path / "recipe.resolved.yaml", text)
        environment = json.dumps(manifest.environment(), indent=2, ensure_ascii=False)
        write_text(self.path / _ENVIRONMENT, environment + "\n")


def _find_damage(run: Path, *, hashes_all: bool) -> str | None:
    """A description of the first damaged file of a finished run; None if there is none.

    Without ``hashes_all``, only files that are newer than ``run.json``, which a run writes last, are read and compared.
    Runs and checkpoints within the run have manifests of their own.
    """
    since = None if hashes_all else (run / FILE_NAME).stat().st_mtime_ns
    for folder in [run, *(path.parent for path in run.glob("*/**/" + manifest.FILE_NAME))]:
        if fault := manifest.find_damage(folder, since=since):
            return f"{folder} is damaged ({fault})"
    return None


def _check_usable(path: Path) -> None:
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise SimpoError(f"output_dir: {existing} is a file; name a folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise SimpoError(
            f"output_dir: {existing} cannot be read and written (permissions, or a read-only disk); name another folder"
        )


def _plain(value: Any) -> Any:
    """The value in types that YAML can hold: enumerations by their value, and objects by their text."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)
