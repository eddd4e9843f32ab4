"""Fitting comparisons and conversations into ``max_length``; everything that is cut or dropped says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simpo.data.settings import TokenizeSettings

PROMPT_CUT = "prompt cut to max_prompt_length"
RESPONSE_CUT = "response cut to max_length - max_prompt_length, without its end"
TURNS_CUT = "last turns"
OVERLONG = "longer than max_length"
STILL_OVERLONG = "longer than max_length even if its prompt is cut"


@dataclass(frozen=True)
class Fitted:
    """A comparison within the limits.

    Attributes:
        prompt: its prompt's ids.
        responses: its responses' ids.
        cut: what was cut, one entry a kind.
        dropped: why it does not fit; its ids are then as they were.
    """

    prompt: list[int]
    responses: list[list[int]]
    cut: tuple[str, ...] = ()
    dropped: str | None = None

    @property
    def status(self) -> list[str]:
        """Status entries for the report (see :meth:`simpo.data.report.DataReport.of`)."""
        return [f"dropped: {self.dropped}"] if self.dropped else [f"cut: {what}" for what in self.cut]


def fit(prompt: list[int], responses: list[list[int]], settings: TokenizeSettings, bos: int | None) -> Fitted:
    """Cut or drop one comparison as the settings say.

    Args:
        prompt: ids, with BOS in front where the model has one.
        responses: ids of each response, its end-of-turn token included.
        settings: the limits.
        bos: id of the BOS, which ``keep_end`` leaves in front (the paper's code did not).
    """
    longest = max(map(len, responses))
    if len(prompt) + longest <= settings.max_length:
        return Fitted(prompt, responses)
    if settings.truncation == "drop":
        return Fitted(prompt, responses, dropped=OVERLONG)
    cut_prompt = _cut_prompt(prompt, settings, None if settings.truncation == "paper" else bos)
    cut = (PROMPT_CUT,) if len(cut_prompt) < len(prompt) else ()
    if len(cut_prompt) + longest <= settings.max_length:
        return Fitted(cut_prompt, responses, cut)
    if settings.truncation == "prompt":
        return Fitted(prompt, responses, dropped=STILL_OVERLONG)
    limit = settings.max_length - settings.prompt_limit
    if longest > limit:
        cut = (*cut, RESPONSE_CUT)
    return Fitted(cut_prompt, [response[:limit] for response in responses], cut)


def fit_turns(
    prompt: list[int], response: list[int], ends: Sequence[int], settings: TokenizeSettings, bos: int | None
) -> Fitted:
    """Cut or drop one conversation as the settings say.

    As many turns of the assistant as fit are kept, from the first on; if not even that one fits, it is fitted alone.

    Args:
        prompt: ids, with BOS in front where the model has one.
        response: ids of all that follows the prompt, up to the end of the last answer.
        ends: for every answer, how many of these ids there are up to its end.
        settings: the limits.
        bos: id of the BOS, which ``keep_end`` leaves in front.
    """
    if settings.truncation == "drop":
        return fit(prompt, [response], settings, bos)
    end = max((end for end in ends if len(prompt) + end <= settings.max_length), default=ends[0])
    fitted = fit(prompt, [response[:end]], settings, bos)
    if end == len(response) or fitted.dropped:
        return fitted
    return replace(fitted, cut=(TURNS_CUT, *fitted.cut))


def _cut_prompt(prompt: list[int], settings: TokenizeSettings, bos: int | None) -> list[int]:
    limit = settings.prompt_limit
    if len(prompt) <= limit:
        return prompt
    if settings.truncation_mode == "keep_start":
        return prompt[:limit]
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - limit + 1 :]]
    return prompt[-limit:]
