"""One comparison as token ids: a prompt and its K responses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizedComparison:
    """One prompt with K responses, stored and computed once.

    A preference pair has K = 2 (chosen first), a ranking K > 2 (best first), a demonstration K = 1.

    Attributes:
        prompt_ids: at least one token; what generation would be fed.
        response_ids: K lists of at least one token each.
        scored: for each response which of its tokens are scored, at least one; ``None`` is all. In a conversation of
            several turns the response is all that follows the prompt, later turns of the user included.

    Raises:
        ValueError: an empty prompt, no response, an empty response, or ``scored`` of another shape or without a token.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    scored: list[list[bool]] | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: a response's first token needs a token before it")
        if not self.response_ids:
            raise ValueError("response_ids is empty: a comparison has at least one response")
        for k, response in enumerate(self.response_ids):
            if not response:
                raise ValueError(f"response_ids[{k}] is empty: its average log-probability would be 0 / 0")
        if self.scored is not None:
            self._check_scored(self.scored)

    def _check_scored(self, scored: list[list[bool]]) -> None:
        if len(scored) != len(self.response_ids):
            raise ValueError(f"scored: {len(scored)} masks for {len(self.response_ids)} responses")
        for k, (mask, response) in enumerate(zip(scored, self.response_ids, strict=True)):
            if len(mask) != len(response):
                raise ValueError(f"scored[{k}] has {len(mask)} entries for {len(response)} tokens")
            if not any(mask):
                raise ValueError(f"scored[{k}] leaves no token: its average log-probability would be 0 / 0")

    @property
    def packed_length(self) -> int:
        """Tokens of the comparison when the prompt is stored once."""
        return len(self.prompt_ids) + sum(map(len, self.response_ids))

    @property
    def padded_length(self) -> int:
        """Tokens of the comparison as K padded rows, each with a prompt of its own."""
        return len(self.response_ids) * (len(self.prompt_ids) + max(map(len, self.response_ids)))
