"""How long a text a model can read, and which token ids it knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a model's configuration allows.

    Attributes:
        positions: most tokens of a text; None if there is no bound (no positions, ALiBi, dynamic RoPE scaling).
        embeddings: number of token ids; None if the configuration does not say.
    """

    positions: int | None
    embeddings: int | None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """The limits of a model with this configuration."""
        text = config.get_text_config()
        return cls(_positions(text), getattr(text, "vocab_size", None))

    def fault(self, length: int, ids: Iterable[int] = ()) -> str | None:
        """Why a model cannot read a prompt and answer of ``length`` tokens with these ids, as text; None if it can."""
        if self.positions is not None and length > self.positions:
            return f"{length:,} tokens with its answer; the model has room for {self.positions:,}"
        if self.embeddings is not None:
            for token_id in ids:
                if not 0 <= token_id < self.embeddings:
                    return f"token id {token_id}; the model has embeddings for 0 to {self.embeddings - 1}"
        return None


def _positions(text: Any) -> int | None:
    """The number of positions in a language model's configuration; None if there is no limit."""
    limit = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [one for one in ropes.values() if isinstance(one, dict)]
    if limit is None or getattr(text, "alibi", False) or any(rope["rope_type"] == "dynamic" for rope in ropes):
        return None
    for rope in ropes:  # YaRN is switched on without raising max_position_embeddings
        if rope["rope_type"] == "yarn" and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit
