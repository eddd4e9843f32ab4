"""Fitting a comparison into ``max_length``; everything that is cut or dropped says so."""

from __future__ import annotations

from dataclasses import dataclass

from simpo.data.settings import TokenizeSettings

PROMPT_CUT = "prompt cut to max_prompt_length"
RESPONSE_CUT = "response cut to max_length - max_prompt_length, without its end"
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


def _cut_prompt(prompt: list[int], settings: TokenizeSettings, bos: int | None) -> list[int]:
    limit = settings.prompt_limit
    if len(prompt) <= limit:
        return prompt
    if settings.truncation_mode == "keep_start":
        return prompt[:limit]
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - limit + 1 :]]
    return prompt[-limit:]
