"""A Python function of the user's as a scorer."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simpo.data.messages import Message
from simpo.errors import SimpoError
from simpo.judges.protocol import Answers


class FunctionScorer:
    """Scores with ``function(prompt, response) -> float``, named ``module:function``."""

    def __init__(self, name: str, *, trust_remote_code: bool) -> None:
        """Import the module, from the working directory too.

        Raises:
            SimpoError: running code was not allowed, or there is no such function.
        """
        self._name = name
        if not trust_remote_code:
            raise SimpoError(f"function:{name}: this runs code; allow it with --trust_remote_code")
        self._function = _import(name)

    @property
    def identity(self) -> dict[str, Any]:
        """The name, and the SHA-256 of the file that the function is in."""
        try:
            source = Path(inspect.getfile(inspect.unwrap(self._function))).read_bytes()
        except (TypeError, OSError):  # a function without a file, such as one of C
            source = b""
        return {"judge": f"function:{self._name}", "code": hashlib.sha256(source).hexdigest()}

    def score(self, rows: Sequence[Answers]) -> list[list[float]]:
        """The function's values.

        Raises:
            SimpoError: the function raised, or gave something else than a number.
        """
        return [[self._call(row, response) for response in row.responses] for row in rows]

    def _call(self, row: Answers, response: str) -> float:
        try:
            return float(self._function(row.prompt, response))
        except Exception as error:
            raise SimpoError(f"function:{self._name}: prompt {row.id}: {type(error).__name__}: {error}") from error


def _import(name: str) -> Callable[[str | list[Message], str], Any]:
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing installed is hidden by it
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise SimpoError(f"function:{name}: {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise SimpoError(f"function:{name}: {module} has no function {function!r}; give function:MODULE:NAME")
    return found
