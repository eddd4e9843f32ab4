"""``run.json``: which command ran here, what determines its result, when it started and whether it finished."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.results import fingerprint
from simpo.runs.log import now

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
        """Of the identity; see :func:`simpo.results.fingerprint`."""
        return fingerprint(self.identity)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """The keys in which another identity differs, each with both values, in words."""
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
