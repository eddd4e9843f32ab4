"""RunFolder: a command's output folder, from the first check to the manifest, and its ``run.json``."""

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
# Seconds to wait for the lock. If a process is killed while it forks, the child still holds the lock briefly; on a busy
# machine that can take a while.
_LOCK_TIMEOUT, _LOCK_TIMEOUT_AFTER_A_KILL = 0.5, 20
# Left out of the manifest: files that may change after the run, such as an edited model card or a regenerated report,
# and folders with their own manifest.
_NOT_IN_MANIFEST = ("checkpoint-*", "trials", FILE_NAME, "log.txt", "README.md", "report.html", "*/report.html", ".*")

_ABSENT = object()
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_SHOWN = 80  # characters of a value in a message


@dataclass
class RunRecord:
    """One run of a command. The fields, plus ``schema`` and ``fingerprint``, are the keys of ``run.json``."""

    command: str  # e.g. `train`
    identity: dict[str, Any]  # everything that determines the result: a flat mapping of JSON values
    status: Literal["running", "finished"] = "running"  # an interrupted run stays `running`
    starts: list[str] = field(default_factory=list)  # UTC times of the start and of every resume
    finished: str | None = None  # UTC time
    # How the identity changed between starts: `time`, old values (`there`) and new values (`now`).
    changes: list[dict[str, Any]] = field(default_factory=list)
    # Peak memory in bytes of the process that finished the run: `host` and, on a GPU, `device`.
    peak_memory: dict[str, int] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record in ``folder``.

        Raises:
            FileNotFoundError: the folder has no record.
            SimpoError: the record cannot be read.
        """
        path = folder / FILE_NAME
        if not path.exists():
            raise FileNotFoundError(path)
        with third_party(f"output_dir: {path} is not readable; use a new folder"):
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("schema") != SCHEMA:
                raise ValueError(f"schema: expected {SCHEMA}")
            stored = document.pop("fingerprint")
            record = cls(**document)
            if not isinstance(record.identity, dict) or record.status not in ("running", "finished"):
                raise ValueError("invalid status or identity")
            if stored != record.fingerprint:
                raise ValueError("the fingerprint does not match the identity")
        return record

    def write(self, folder: Path) -> None:
        """Write the record to ``folder``."""
        document = {"schema": SCHEMA, "fingerprint": self.fingerprint, **asdict(self)}
        write_text(folder / FILE_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Describe each key in which another identity differs, with both values."""
        return [_describe_change(key, old, new) for key, (old, new) in self._changed(identity).items()]

    def change(self, identity: dict[str, Any]) -> None:
        """Replace the identity and record the old values."""
        keys = self._changed(identity)
        old, new = ({key: values[key] for key in keys if key in values} for values in (self.identity, identity))
        self.changes.append({"time": utc_now(), "there": old, "now": new})
        self.identity = identity

    def _changed(self, identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        keys = sorted({*self.identity, *identity})
        pairs = {key: (self.identity.get(key, _ABSENT), identity.get(key, _ABSENT)) for key in keys}
        return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _describe_change(key: str, *values: Any) -> str:
    old, new = ("not set" if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in values)
    digests = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in values)
    if digests or max(len(old), len(new)) > _LONGEST_SHOWN:
        return f"{key}: contents changed"
    return f"{key}: was {old}, now {new}"


class FolderInUseError(SimpoError):
    """Another process is using the output folder."""


class DifferentRunError(SimpoError):
    """The output folder holds a run with different settings."""


class RunFolder:
    """The output folder of one command; a context manager that releases the folder on exit.

    The constructor only checks the folder; nothing is written before :meth:`begin`, so that input rejected in between
    leaves no trace. Only one process can use the folder at a time. The lock is held by the kernel and ends with the
    process, so it never goes stale. Forked children (data loaders, ``datasets`` workers) release their copy of the lock
    at once or, with filelock < 4, when they notice that their parent is gone.

    The folder holds ``run.json`` (:class:`RunRecord`), ``recipe.yaml`` (the command line as a comment, then the recipe
    as given), ``recipe.resolved.yaml`` (all keys), ``environment.json``, ``log.txt``, ``metrics.jsonl``, the command's
    own files and, at the end, ``results.json`` and ``manifest.json``. Recipe and environment describe the last start.

    Attributes:
        path: the folder.
        command: the command that owns the run.
        writes: False on all processes of a run except the first; on them, this object does nothing.
        resuming: whether the folder held an unfinished run of this command.
        changed: whether the run continues with another identity; set by :meth:`begin`.
        fingerprint: SHA-256 of the identity; set by :meth:`begin`.
        metrics: ``metrics.jsonl``; set by :meth:`begin`.
        verify_hashes: whether to hash every file of a finished run before reporting it as finished, instead of only the
            files modified since then; set by the option ``--verify``.
        latest: the finished run that this process closed last; nested runs close before the run that contains them.
    """

    metrics: JsonLines
    verify_hashes: ClassVar[bool] = False
    latest: ClassVar[Path | None] = None

    def __init__(self, path: Path | str, *, command: str, writes: bool = True) -> None:
        """Check the folder, and lock it if it holds a run.

        Raises:
            SimpoError: the path is a file, cannot be written, holds other files or another command's run, or is in use
                (:class:`FolderInUseError`).
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
        self._early_lines: list[str] = []  # logged before log.txt was opened
        if writes:
            with disk_errors(f"output_dir: {self.path}"):
                _check_usable(self.path)
                self._absent = not self.path.exists()
                self._record = self._read()
            if self._record is not None:
                self._acquire_lock()
                self._record = self._read()  # the run may have finished while we waited for the lock
        self.resuming = self._record is not None and not self.finished

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return self._record is not None and self._record.status == "finished"

    def reopen(self) -> None:
        """Continue a finished run. Call this before :meth:`begin`."""
        assert self._record is not None, "only a finished run can be reopened"
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
            identity: everything that determines the result, such as recipe keys and digests of data; flat JSON values.
            argv: the command line after the command's name.
            recipe: the recipe file given by the user.
            resolved: all recipe keys with their values.
            accept_changes: resume even if the identity differs, and record the change. None if the command has no such
                key because it could not combine old and new output.

        Raises:
            SimpoError: the folder holds a run with another identity, cannot be written, or was taken by another run in
                the meantime (:class:`FolderInUseError`).
        """
        if not self.writes:
            return
        if self._lock is None:
            self._acquire_lock()
            if self._read() is not None:
                raise FolderInUseError(f"output_dir: another run has just taken {self.path}; use a new folder")
        stored_form = json.loads(json.dumps(redact(identity)))  # as it will be read back from run.json
        differences = self._record.differences(stored_form) if self._record else []
        if differences and (self.finished or not accept_changes):
            kind, advice = ("a finished run", "") if self.finished else ("a run", "restore them or ")
            offered = accept_changes is not None and not self.finished
            last = ", or continue anyway with accept_changes: true" if offered else ""
            versions = self._changed_versions()
            if versions and not self.finished:
                advice += f"install the package versions it was started with ({versions}), or "
            raise DifferentRunError(
                f"output_dir: {self.path} holds {kind} with different settings ({'; '.join(differences)}); "
                f"{advice}use a new folder{last}"
            )
        self.changed = bool(differences)
        self._check_integrity()
        with disk_errors(self.path):
            remove_leftovers(self.path)
        if not self.finished:
            self._write_start(stored_form, argv, recipe, resolved)
        assert self._record is not None
        self.fingerprint = self._record.fingerprint
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self._open_log()
        if differences:
            self.log(f"continued with different settings: {'; '.join(differences)}")

    def _open_log(self) -> None:
        """Open ``log.txt`` and write to it what was logged before it existed."""
        self._log = LogFile(self.path / "log.txt")
        for handler in [one for one in logging.getLogger().handlers if isinstance(one, EarlyNotices)]:
            logging.getLogger().removeHandler(handler)
            handler.setTarget(self._log)
            handler.close()  # flushes to the target
        for line in self._early_lines:
            self._log.write(line)
        self._early_lines.clear()
        logging.getLogger().addHandler(self._log)

    def _changed_versions(self) -> str:
        """List the old versions of packages that have changed since the last start.

        A different version may add settings to a run's identity or compute different numbers.
        """
        path, now = self.path / _ENVIRONMENT, manifest.versions()
        with suppress(SimpoError), third_party(path.name):  # if unreadable, the message is just less helpful
            then = json.loads(path.read_text(encoding="utf-8"))["packages"]
            return ", ".join(f"{name} {then[name]}" for name in now if then.get(name) != now[name])
        return ""

    def _check_integrity(self) -> None:
        """Raise if this run, or a run nested in it, is finished but its files have changed since."""
        nested = [path.parent for path in self.path.glob("*/**/" + FILE_NAME)]
        finished = [self.path] if self.finished else [run for run in nested if RunRecord.read(run).status == "finished"]
        for run in finished:
            if damage := _find_damage(run, verify_hashes=self.verify_hashes):
                raise SimpoError(
                    f"output_dir: the run in {run} is finished, but {damage}; restore the file or use a new folder"
                )
        if self.verify_hashes and self.finished:
            self.log(f"{self.path}: all files match their sha256")

    def log(self, line: str) -> None:
        """Print a line and append it to ``log.txt``, masking access tokens; a closed stdout does not end the run."""
        if not self.writes:
            return
        try:
            print(printable(mask_secrets(line)))
        except BrokenPipeError:
            if self._log is None or not output_is_closed():
                raise
            self._log.write("note: standard output was closed; the run continues and logs to this file only")
        if self._log is None:
            self._early_lines.append(line)
        else:
            self._log.write(line)

    def complete(self, compute: Callable[[], Sequence[Metric]]) -> Path:
        """Call ``compute``, write the metrics it returns to ``results.json``, and finish the run.

        A finished run is left unchanged, and ``compute`` is not called. Returns the path of ``results.json``.
        """
        if self.finished:
            self.log(f"{self.path} already holds the finished run: nothing to do")
            return self.path / RESULTS
        metrics = compute()
        if self.writes:
            write_results(self.path, command=self.command, fingerprint=self.fingerprint, metrics=metrics)
        self.finish()
        return self.path / RESULTS

    def finish(self) -> None:
        """Write the manifest and, last, mark the run as finished."""
        if not self.writes:
            return
        assert self._record is not None, "begin() was not called"
        manifest.write_manifest(self.path, exclude=_NOT_IN_MANIFEST)
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
            explained = isinstance(error, InterruptedRun) or (isinstance(error, SimpoError) and error.__cause__ is None)
            with suppress(SimpoError):  # the error may be that the log cannot be written
                self._log.write(text if explained else text + "\n" + "".join(format_exception(error)))
        if self._absent and self._lock is None:  # begin() was not reached, but transformers may have created the folder
            with suppress(OSError):
                self.path.rmdir()
        self.close()

    def _read(self) -> RunRecord | None:
        """Read the run in the folder; return None if the folder is empty or does not exist."""
        try:
            record = RunRecord.read(self.path)
        except FileNotFoundError:
            for entry in self.path.iterdir() if self.path.is_dir() else ():
                # Through a hidden symlink, a file such as the lock could be written outside the folder.
                if not entry.name.startswith(".") or entry.is_symlink():
                    raise SimpoError(
                        f"output_dir: {self.path} is not empty ({entry.name[:80]}) and is not a simpo run; "
                        "use a new folder"
                    ) from None
            return None
        if record.command != self.command:
            raise SimpoError(
                f"output_dir: {self.path} holds a run of {record.command!r}, not {self.command!r}; use a new folder"
            )
        return record

    def _acquire_lock(self) -> None:
        holder = self.path / _HOLDER  # a separate file, because some versions of filelock truncate the lock file
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock, pid = FileLock(self.path / _LOCK, thread_local=False), ""
            try:
                with suppress(Timeout):
                    lock.acquire(timeout=_LOCK_TIMEOUT)
                if not lock.is_locked:
                    pid = holder.read_text(encoding="utf-8").strip() if holder.exists() else ""
                    killed = Path("/proc/self").exists() and not Path("/proc", pid).exists()
                    lock.acquire(timeout=_LOCK_TIMEOUT_AFTER_A_KILL if killed else 0)
            except Timeout:
                owner = f" (process {pid})" if pid else ""
                raise FolderInUseError(
                    f"output_dir: {self.path} is in use by another run{owner}; wait for it or use a new folder"
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
        self._record.write(self.path)  # first: without it, the folder is not recognized as a run
        command_line = shlex.join(["simpo", self.command, *redact_arguments(argv)])
        recipe_text = "" if recipe is None else redact_yaml(recipe.read_text(encoding="utf-8"))
        write_text(
            self.path / "recipe.yaml", textwrap.indent(command_line, "# ", lambda line: True) + "\n" + recipe_text
        )
        if resolved is not None:
            text = yaml.safe_dump(_yaml_safe(redact(resolved)), sort_keys=False, allow_unicode=True)
            write_text(self.path / "recipe.resolved.yaml", text)
        environment = json.dumps(manifest.environment(), indent=2, ensure_ascii=False)
        write_text(self.path / _ENVIRONMENT, environment + "\n")


def _find_damage(run: Path, *, verify_hashes: bool) -> str | None:
    """Describe the first damaged file of a finished run; return None if all files are intact.

    Without ``verify_hashes``, only files newer than ``run.json``, which is written last, are hashed. Nested runs and
    checkpoints have their own manifests, which are checked as well.
    """
    since = None if verify_hashes else (run / FILE_NAME).stat().st_mtime_ns
    for folder in [run, *(path.parent for path in run.glob("*/**/" + manifest.FILE_NAME))]:
        if fault := manifest.find_damage(folder, since=since):
            return f"{folder} is damaged ({fault})"
    return None


def _check_usable(path: Path) -> None:
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise SimpoError(f"output_dir: {existing} is a file; use a folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise SimpoError(
            f"output_dir: {existing} cannot be read and written (permissions or a read-only disk); use another folder"
        )


def _yaml_safe(value: Any) -> Any:
    """Convert a value to types that YAML can hold: enums to their values, and other objects to strings."""
    if isinstance(value, Enum):
        return _yaml_safe(value.value)
    if isinstance(value, Mapping):
        return {str(key): _yaml_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_yaml_safe(item) for item in value]
    return value if type(value) in (str, int, float, bool, type(None)) else str(value)
