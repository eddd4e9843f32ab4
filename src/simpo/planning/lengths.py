"""The lengths of rows that are not read, as settings; apart from what is slow to import."""

from __future__ import annotations

from dataclasses import dataclass

from simpo.config import setting
from simpo.errors import SimpoError


@dataclass
class Lengths:
    """The rows of a run, where the data is not read."""

    rows: int | None = setting(None, "Number of rows, where the data is not read.")
    prompt_tokens: int | None = setting(None, "Tokens of a prompt; with it the data is not read.")
    response_tokens: int | None = setting(None, "Tokens of a response, where the data is not read.")
    responses: int = setting(2, "Responses of a row, where the data is not read.")

    def __post_init__(self) -> None:
        for key in ("rows", "prompt_tokens", "response_tokens", "responses"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise SimpoError(f"{key}: must be at least 1, not {value}")
