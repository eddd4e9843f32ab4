"""Replies on the disk, found by what was asked: a request that was answered once is not sent again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from simpo.client.chat import ChatReply
from simpo.runs.atomic import disk_errors

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """The user's own folder of replies, ``~/.cache/simpo/replies`` unless ``XDG_CACHE_HOME`` says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - needs no home
    return Path(home) / "simpo" / "replies"


class ReplyCache:
    """One model's replies in a folder, as JSON lines that are only ever appended.

    Several processes may share it: each line is written whole under a lock, and what others wrote is read before
    anything is sent or written. A line that a killed process left torn is dropped; a damaged one counts as absent.

    Attributes:
        path: the file.
        damaged: lines that could not be read.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """Open the file of ``model``, or make it and its folder.

        Raises:
            SimpoError: it cannot be read or written.
        """
        name = re.sub(r"[^A-Za-z0-9.]+", "-", model)[-60:].strip("-.")
        self.path = folder / f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.jsonl"
        self.damaged = 0
        self._places: dict[str, int] = {}  # key -> where its line starts, in bytes
        self._end = 0  # of the whole lines that were read
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._lock = FileLock(self.path.with_suffix(".lock"))
            with self._lock:
                self._read_on()
                self._drop_torn()
        if self.damaged:
            logger.warning("%s: %d damaged lines are ignored", self.path, self.damaged)

    def get(self, key: str) -> ChatReply | None:
        """The reply to a request, whoever of those that share the cache received it."""
        with disk_errors(self.path):
            if key not in self._places:
                self._read_on()
            if key not in self._places:
                return None
            with self.path.open("rb") as file:
                file.seek(self._places[key])
                return ChatReply(**json.loads(file.readline())["reply"])

    def put(self, key: str, reply: ChatReply) -> ChatReply:
        """Keep a reply and return when it is on the disk.

        Returns:
            What is kept: the earlier reply, if another process received one in the meantime.

        Raises:
            SimpoError: the disk is full or the file cannot be written; it holds what it held before.
        """
        with disk_errors(self.path), self._lock:
            self._read_on()
            self._drop_torn()
            if key not in self._places:
                self._append(json.dumps({"key": key, "reply": dataclasses.asdict(reply)}).encode() + b"\n")
                self._read_on()
        kept = self.get(key)
        assert kept is not None
        return kept

    def _read_on(self) -> None:
        """Note the lines that were appended since the last look; a last one without its end is not there yet."""
        if self.path.stat().st_size == self._end:
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._note(line)
                self._end += len(line)

    def _note(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            ChatReply(**record["reply"])
            self._places.setdefault(record["key"], self._end)
        except (ValueError, KeyError, TypeError):
            self.damaged += 1

    def _drop_torn(self) -> None:
        """Under the lock, what follows the last whole line is nobody's work in progress."""
        if self.path.stat().st_size > self._end:
            os.truncate(self.path, self._end)
            self.damaged += 1

    def _append(self, line: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):  # the first error says more
                os.truncate(self.path, self._end)
            raise
