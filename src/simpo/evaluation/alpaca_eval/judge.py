"""The pairwise judge: which answer is shown first, what is asked, and what the reply means."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from simpo.client import ChatReply, ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.alpaca_eval.files import Match
from simpo.judges.prompt_files import fill, read_prompt_file
from simpo.thinking import after_thinking

_SHIPPED = resources.files("simpo.evaluation") / "prompts" / "alpaca_eval.txt"
_PLACES = ("instruction", "output_1", "output_2")
_SECTION = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)

_FIRST, _SECOND = "m", "M"  # the names of the answers in the order in which they are shown
_TOP_LOGPROBS = 5
# Probability that the first token must have of being one of the names: more likely than not, the judge is answering.
LEAST_MASS = 0.5
_SEED = 0


def switched(instruction: str) -> bool:
    """Whether the model's answer is shown first; drawn from the instruction, as the benchmark draws it."""
    # The benchmark draws in exactly this way; nothing is guarded by it.
    return random.Random(f"is_switched_outputs{instruction}{_SEED}").choices([False, True])[0]  # noqa: S311


class PairwisePrompt:
    """A judge prompt with places ``{instruction}``, ``{output_1}`` and ``{output_2}``.

    Messages are marked ``<|im_start|>role ... <|im_end|>``, as in the benchmark's own file, which can be read; without
    marks the text is one user message.

    Attributes:
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the user's file or, for None, the one that comes with the package.

        Raises:
            SimpoError: it cannot be read, or lacks a place.
        """
        text, self.digest = read_prompt_file(path, _SHIPPED, _PLACES)
        marked = _SECTION.findall(text) or [("user", text.strip())]
        if _SECTION.search(text) and _SECTION.sub("", text).strip():
            raise SimpoError(
                f"{path}: the judge prompt has text outside its messages (<|im_start|>role ... <|im_end|>)"
            )
        for role, _ in marked:
            if role not in ("system", "user", "assistant"):
                raise SimpoError(f"{path}: {role!r} is not a role; use system, user or assistant")
        self._messages = [{"role": role, "content": content} for role, content in marked]

    def request(self, match: Match, *, weighted: bool) -> ChatRequest:
        """What the judge is asked about a match, in the order in which it is shown.

        The weighted judge writes one token, whose alternatives are weighed; the plain one is greedy.
        """
        shown = (match.output_2, match.output_1) if switched(match.instruction) else (match.output_1, match.output_2)
        values = {"instruction": match.instruction, "output_1": shown[0], "output_2": shown[1]}
        messages = [message | {"content": fill(message["content"], values)} for message in self._messages]
        if weighted:
            return ChatRequest(messages, max_tokens=1, temperature=1.0, top_logprobs=_TOP_LOGPROBS)
        return ChatRequest(messages, max_tokens=1)


def preferences(matches: Sequence[Match], replies: Sequence[ChatReply | None], *, weighted: bool) -> list[float]:
    """The preference in [1, 2] for each match, 2 where the model's answer wins; NaN where the judge gave none.

    Args:
        matches: what was judged.
        replies: the judge's; None where the answers are identical, which is a draw.
        weighted: whether the first token's log-probabilities are weighed.
    """
    found = []
    for match, reply in zip(matches, replies, strict=True):
        if reply is None:
            found.append(1.5)
            continue
        shown = weighed(reply.first_token_logprobs) if weighted else named(reply.text)
        found.append(3 - shown if switched(match.instruction) else shown)
    return found


def weighed(logprobs: dict[str, float] | None) -> float:
    """``2 - P(m) / (P(m) + P(M))`` over the first token; a name that is not among the likeliest counts 0.

    NaN where the two together have a probability below :data:`LEAST_MASS`: the judge was about to write something else.
    Where the names alone have less, they count with white space around them as well.
    """
    for strip in ("", None):  # nothing, then white space
        first, second = (
            sum(math.exp(logprob) for token, logprob in (logprobs or {}).items() if token.strip(strip) == name)
            for name in (_FIRST, _SECOND)
        )
        if first + second >= LEAST_MASS:
            return 2 - first / (first + second)
    return math.nan


def named(text: str) -> float:
    """1 or 2 for the name that the judge wrote after any thinking; NaN where it wrote neither."""
    return {_FIRST: 1.0, _SECOND: 2.0}.get((after_thinking(text) or "").strip(), math.nan)
