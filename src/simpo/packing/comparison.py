"""One comparison as token ids: a prompt and its K responses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizedComparison:
    """One prompt with K responses, stored and computed once.

    A preference pair has K = 2 (chosen first), a ranking K > 2 (best first), a demonstration K = 1.

    Attributes:
        prompt_ids: at least one token; what generation would be fed.
        response_ids: K lists of at least one token each, all of them scored.

    Raises:
        ValueError: an empty prompt, no response, or an empty response.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: a response's first token needs a token before it")
        if not self.response_ids:
            raise ValueError("response_ids is empty: a comparison has at least one response")
        for k, response in enumerate(self.response_ids):
            if not response:
                raise ValueError(f"response_ids[{k}] is empty: its average log-probability would be 0 / 0")

    @property
    def packed_length(self) -> int:
        """Tokens of the comparison when the prompt is stored once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))

    @property
    def padded_length(self) -> int:
        """Tokens of the comparison as K padded rows, each with a prompt of its own."""
        return len(self.response_ids) * (len(self.prompt_ids) + max(map(len, self.response_ids)))
