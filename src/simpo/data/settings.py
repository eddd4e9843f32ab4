"""Settings for rendering and tokenization, and the truncation of overlong rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from simpo.config import check_values, setting
from simpo.errors import SimpoError

# Parameters of apply_chat_template in transformers that are not passed on to the template.
RESERVED_KWARGS = frozenset(
    (
        "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
        "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    )
)  # fmt: skip


@dataclass(frozen=True)
class RenderSettings:
    """Settings for rendering conversations with a chat template."""

    chat_template_kwargs: Mapping[str, Any] = setting(
        {}, 'Variables for the chat template, e.g. {"enable_thinking": false}; a row can override them.'
    )
    system_message: Literal["template", "fold"] = setting(
        "template",
        "template leaves system messages to the chat template; fold merges them into the first user "
        "message, for templates without a system role.",
    )

    def __post_init__(self) -> None:
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise SimpoError(f"chat_template_kwargs: {kwargs!r} is not a mapping of names to values")
        if reserved := sorted(RESERVED_KWARGS & set(kwargs)):
            raise SimpoError(f"chat_template_kwargs: {reserved[0]!r} is not a variable of the template; leave it out")
        check_values(self)


@dataclass(frozen=True)
class TokenizeSettings:
    """Settings for tokenizing comparisons and conversations."""

    max_length: int = setting(2048, "Maximum length of prompt plus response, in tokens.", least=2)
    max_prompt_length: int | None = setting(
        None,
        "Truncate the prompt of an overlong row to this many tokens (default: max_length * 1800 / 2048, as in the "
        "paper).",
        least=1,
    )
    truncation_mode: Literal["keep_end", "keep_start"] = setting("keep_end", "Which end of an overlong prompt to keep.")
    truncation: Literal["prompt", "drop", "paper"] = setting(
        "prompt",
        "How to treat overlong rows: prompt truncates prompts and drops rows that still do not fit; drop drops every "
        "overlong row; paper also truncates responses, which then lack an end-of-turn token.",
    )
    paper_tokenization: bool = setting(
        False, "Also score the assistant header and the text after the end-of-turn token, like the paper's code."
    )
    auto_insert_empty_system_msg: bool = setting(
        False, "Start conversations with an empty system message if the chat template supports one."
    )
    on_bad_row: Literal["skip", "error"] = setting(
        "skip", "Skip and count bad rows (more than 1% is an error), or stop at the first one."
    )
    image_folder: str | None = setting(None, "Base folder of relative image paths (default: the working directory).")
    num_proc: int | None = setting(
        None, "Number of processes for tokenization (default: one per core, fewer for small datasets).", least=1
    )
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def __post_init__(self) -> None:
        check_values(self)
        if self.prompt_limit >= self.max_length:
            raise SimpoError(
                f"max_prompt_length: {self.prompt_limit} leaves no room for a response in max_length "
                f"{self.max_length}; make it smaller"
            )
        for key in ("paper_tokenization", "auto_insert_empty_system_msg"):
            if not isinstance(getattr(self, key), bool):
                raise SimpoError(f"{key}: {getattr(self, key)!r} is not true or false")

    @property
    def prompt_limit(self) -> int:
        """Number of tokens that the prompt of an overlong comparison is cut to."""
        if self.max_prompt_length is None:
            return self.max_length * 1800 // 2048
        return self.max_prompt_length


# ---- Truncating comparisons and conversations to ``max_length``; everything that is cut or dropped is reported.

PROMPT_CUT = "prompt cut to max_prompt_length"
RESPONSE_CUT = "response cut to max_length - max_prompt_length, without its end"
TURNS_CUT = "last turns"
OVERLONG = "longer than max_length"
STILL_OVERLONG = "longer than max_length even after its prompt is cut"


def truncate(
    prompt: list[int], responses: list[list[int]], settings: TokenizeSettings, bos: int | None
) -> tuple[list[int], list[list[int]], list[str]]:
    """Truncate or drop one comparison according to the settings.

    Args:
        prompt: ids, starting with BOS if the model has one.
        responses: ids of each response, including its end-of-turn token.
        settings: the limits.
        bos: id of BOS, which ``keep_end`` preserves at the front (unlike the paper's code).

    Returns:
        Prompt, responses, and status entries for the report (:meth:`simpo.data.rows.DataReport.of`). A dropped
        comparison's ids are unchanged.
    """
    longest = max(map(len, responses))
    if len(prompt) + longest <= settings.max_length:
        return prompt, responses, []
    if settings.truncation == "drop":
        return prompt, responses, [f"dropped: {OVERLONG}"]
    limit = settings.prompt_limit
    shortened = prompt
    if len(prompt) > limit:
        if settings.truncation_mode == "keep_start":
            shortened = prompt[:limit]
        elif settings.truncation != "paper" and bos is not None and prompt[0] == bos:
            shortened = [bos, *prompt[len(prompt) - limit + 1 :]]
        else:
            shortened = prompt[-limit:]
    cut = [f"cut: {PROMPT_CUT}"] if len(shortened) < len(prompt) else []
    if len(shortened) + longest <= settings.max_length:
        return shortened, responses, cut
    if settings.truncation == "prompt":
        return prompt, responses, [f"dropped: {STILL_OVERLONG}"]
    room = settings.max_length - limit  # shorter than the longest response
    return shortened, [response[:room] for response in responses], [*cut, f"cut: {RESPONSE_CUT}"]


def truncate_turns(
    prompt: list[int], response: list[int], ends: Sequence[int], settings: TokenizeSettings, bos: int | None
) -> tuple[list[int], list[list[int]], list[str]]:
    """Truncate or drop one conversation according to the settings.

    Keeps as many of the assistant's turns as fit, from the first one on. If not even the first one fits, it is
    truncated or dropped like a response in :func:`truncate`.

    ``response`` holds the ids of everything after the prompt up to the end of the last answer, ``ends`` the position in
    it where each answer ends. Everything else is as in :func:`truncate`, with a single response.
    """
    if settings.truncation == "drop":
        return truncate(prompt, [response], settings, bos)
    end = max((end for end in ends if len(prompt) + end <= settings.max_length), default=ends[0])
    shortened, responses, status = truncate(prompt, [response[:end]], settings, bos)
    if end < len(response) and not any(entry.startswith("dropped: ") for entry in status):
        status = [f"cut: {TURNS_CUT}", *status]
    return shortened, responses, status
