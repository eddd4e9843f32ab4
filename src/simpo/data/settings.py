"""What the user sets about tokenization, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simpo.errors import SimpoError

# What transformers' apply_chat_template takes by these names itself, so that a template never gets them.
RESERVED_KWARGS = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


@dataclass(frozen=True)
class RenderSettings:
    """How conversations are rendered with a chat template.

    Attributes:
        chat_template_kwargs: variables that the chat template gets, e.g. ``{"enable_thinking": False}``; those of a
            row take precedence.
        system_message: ``template`` leaves the system message to the chat template, ``fold`` writes it into the first
            user message, for templates without a system role.

    Raises:
        SimpoError: a value that is not allowed, named by its key.
    """

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_message: str = "template"

    def __post_init__(self) -> None:
        given = self.chat_template_kwargs
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise SimpoError(f"chat_template_kwargs: {given!r} is not a mapping of names to values")
        if reserved := sorted(RESERVED_KWARGS & set(given)):
            raise SimpoError(f"chat_template_kwargs: {reserved[0]!r} is not a variable of the template; leave it out")
        _check_choice("system_message", self.system_message, ("template", "fold"))


@dataclass(frozen=True)
class TokenizeSettings:
    """How comparisons become ids.

    Attributes:
        max_length: most tokens of a prompt and its longest response together.
        max_prompt_length: what an overlong comparison's prompt is cut to; ``None`` is
            ``max_length * 1800 // 2048``, the paper's ratio.
        truncation_mode: which end of a cut prompt stays.
        truncation: ``prompt`` cuts prompts and drops comparisons whose responses still do not fit, ``drop``
            drops every overlong comparison, ``paper`` also cuts responses, which lose their EOS.
        paper_tokenization: score the assistant header and what follows the end-of-turn token, as the
            paper's code did.
        auto_insert_empty_system_msg: start conversations with an empty system message where the chat
            template knows one.
        on_bad_row: ``skip`` and count bad rows (an error above 1%), or make the first an ``error``.
        num_proc: processes that tokenize; ``None`` is one per core, never more than the data is worth.
        rendering: how conversations are rendered.

    Raises:
        SimpoError: a value that is not allowed, named by its key.
    """

    max_length: int = 2048
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"
    truncation: str = "prompt"
    paper_tokenization: bool = False
    auto_insert_empty_system_msg: bool = False
    on_bad_row: str = "skip"
    num_proc: int | None = None
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def __post_init__(self) -> None:
        _check_number("max_length", self.max_length, least=2)
        if self.max_prompt_length is not None:
            _check_number("max_prompt_length", self.max_prompt_length, least=1)
        if self.prompt_limit >= self.max_length:
            raise SimpoError(
                f"max_prompt_length: {self.prompt_limit} leaves no room for a response in max_length "
                f"{self.max_length}; make it smaller"
            )
        if self.num_proc is not None:
            _check_number("num_proc", self.num_proc, least=1)
        _check_choice("truncation_mode", self.truncation_mode, ("keep_end", "keep_start"))
        _check_choice("truncation", self.truncation, ("prompt", "drop", "paper"))
        _check_choice("on_bad_row", self.on_bad_row, ("skip", "error"))
        for key in ("paper_tokenization", "auto_insert_empty_system_msg"):
            if not isinstance(getattr(self, key), bool):
                raise SimpoError(f"{key}: {getattr(self, key)!r} is not true or false")

    @property
    def prompt_limit(self) -> int:
        """Tokens that an overlong comparison's prompt is cut to."""
        if self.max_prompt_length is None:
            return self.max_length * 1800 // 2048
        return self.max_prompt_length


def _check_number(key: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SimpoError(f"{key}: {value!r} is not a whole number of at least {least}")


def _check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SimpoError(f"{key}: {value!r} is not one of {', '.join(choices)}")
