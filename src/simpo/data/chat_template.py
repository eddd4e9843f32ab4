"""A tokenizer's chat template: rendering within limits, what it supports and expects, and how it ends a turn."""

from __future__ import annotations

import json
import operator
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, meta, nodes
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from simpo.data.messages import IMAGE, REASONING, Context, Message, reasoning_of
from simpo.data.rows import BadRow
from simpo.data.settings import RESERVED_KWARGS, RenderSettings
from simpo.errors import SimpoError, one_line, third_party

# ---- Limits on the time and memory that a template may use, because it may come from anyone.

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_MAX_SECONDS = 2.0  # CPU time for one conversation, which normally takes milliseconds
_MAX_MEMORY = 1 << 30  # bytes
_MAX_LENGTH = 1 << 26  # characters
_MAX_BITS = 64  # largest factor, in bits, and largest exponent


class _OverrunError(BaseException):
    """Rendering took too long. Not an ``Exception``, so that no library swallows it."""


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """Render messages with a tokenizer's chat template.

    Raises:
        BadRow: the template rejects the messages, with an error of its own or of Jinja.
        SimpoError: rendering takes too much time or memory, or the text is too long.
    """
    try:
        with _limits():
            text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except _OverrunError:
        raise SimpoError(f"chat_template: one conversation takes more than {_MAX_SECONDS:g} s to render") from None
    except MemoryError:
        raise SimpoError(f"chat_template: one conversation takes more than {_MAX_MEMORY >> 30} GiB to render") from None
    except Exception as error:
        raise BadRow(f"the chat template rejects it: {one_line(error)}") from error
    if len(text) > _MAX_LENGTH:
        raise SimpoError(f"chat_template: one conversation renders to {len(text):,} characters")
    return text


@contextmanager
def _limits() -> Iterator[None]:
    """Limit the CPU time and memory of the body, except on Windows and outside the main thread."""
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OverrunError

    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_SECONDS)
        _limit_memory(memory)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _limit_memory(current: tuple[int, int]) -> None:
    statistics = Path("/proc/self/statm")  # Linux only; elsewhere the limit has no effect anyway
    if statistics.exists():
        limit = int(statistics.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MAX_MEMORY
        if current[0] == resource.RLIM_INFINITY or limit < current[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, current[1]))


def _bounded(function: Callable[[Any, Any], Any], largest: int) -> Callable[[Any, Any], Any]:
    """Return the operation with an error for numbers so large that it could not be interrupted."""

    def apply(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > largest:
            raise OverflowError("the number is too large")
        return function(left, right)

    return apply


# transformers renders in Jinja's sandbox, which limits the length of ranges but not the size of numbers.
SandboxedEnvironment.intercepted_binops = frozenset(("*", "**"))
SandboxedEnvironment.default_binop_table |= {
    "*": _bounded(operator.mul, 1 << _MAX_BITS),
    "**": _bounded(operator.pow, _MAX_BITS),
}


# Content that no template trims, splits or rejects; it shows what a template writes around content.
SENTINEL = "\uf8ffresponse\uf8ff"
_SENTINELS = tuple(f"\uf8ff{name}\uf8ff" for name in ("first", "second", "third"))
NO_SYSTEM_ROLE = (
    "the chat template has no system role; set system_message: fold to merge the system message into the first user "
    "message"
)
_BLOCK_TAGS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# A role named in a template: a whole string, as in a comparison, or the word after the markup that starts a turn.
_NAMED_ROLE = re.compile(r"\A\s*(\w+)\s*\Z|[>|\]](\w+)")
_IF_DEFINED = ("defined", "undefined", "default", "d")  # tests and filters for undefined variables
_NO_CONTENT: tuple[dict[str, Any], ...] = ({"content": ""}, {"content": None}, {})


class ChatTemplate:
    """Converts messages to the format that the template expects, and renders them.

    The format is detected by rendering probe messages: templates differ in whether they take content as text or as
    parts, tool arguments as objects or as JSON text, absent content as ``""``, null or a missing key, and in the key
    that holds reasoning.

    Raises:
        SimpoError: ``chat_template_kwargs`` has a variable that the template never reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RenderSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.source = template_of(tokenizer)
        if unread := self.unread_variables(settings.chat_template_kwargs):
            known = ", ".join(sorted(self.variables)) or "none"
            raise SimpoError(f"chat_template_kwargs: the chat template never reads {unread[0]!r}; it reads {known}")

    def render(self, messages: Sequence[Message], context: Context, *, generation_prompt: bool = False) -> str:
        """Render messages as text."""
        try:
            return render_messages(
                self._tokenizer,
                [self._adapt_message(message, images=bool(context.images)) for message in messages],
                tools=context.tools,
                add_generation_prompt=generation_prompt,
                **{**self._settings.chat_template_kwargs, **context.kwargs},
            )
        except BadRow as refused:
            if messages[0]["role"] == "system" and not self.has_system_role:
                raise BadRow(NO_SYSTEM_ROLE) from refused
            raise

    def unread_variables(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Return the names of variables that the template never reads."""
        return [name for name in kwargs if name not in self.variables] if kwargs else []

    @cached_property
    def _syntax_tree(self) -> nodes.Template:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701 - no HTML
        with third_party("chat_template"):
            return environment.parse(_BLOCK_TAGS.sub("", self.source))

    @cached_property
    def variables(self) -> set[str]:
        """Names of the variables that it reads, except those that transformers always provides."""
        return meta.find_undeclared_variables(self._syntax_tree) - {*RESERVED_KWARGS, "raise_exception", "strftime_now"}

    @cached_property
    def options(self) -> set[str]:
        """Names of the variables that users may set, such as ``enable_thinking``.

        A name assigned in a branch counts as one of :attr:`variables` but is usually internal, such as ``content``; it
        is an option only if the template tests whether it is defined.
        """
        names = list(self._syntax_tree.find_all(nodes.Name))
        parameters = {name.name for name in names if name.ctx == "param"}
        assigned = {name.name for name in names if name.ctx == "store"}
        tests = [test for test in self._syntax_tree.find_all((nodes.Test, nodes.Filter)) if test.name in _IF_DEFINED]
        tested = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
        return self.variables - parameters - (assigned - tested)

    @cached_property
    def named_roles(self) -> frozenset[str]:
        """Words that the template compares roles with or writes at the start of a turn, such as Granite's ``document``.

        Many templates render any role, but the model has probably never seen one that its template does not name. Not
        all of these words are roles, which is harmless: a message that is not rendered is a bad row in any case.
        """
        texts = [node.value for node in self._syntax_tree.find_all(nodes.Const) if isinstance(node.value, str)]
        texts += [node.data for node in self._syntax_tree.find_all(nodes.TemplateData)]
        return frozenset("".join(role) for text in texts for role in _NAMED_ROLE.findall(text))

    def renders(self, messages: Sequence[Message], texts: Sequence[str], context: Context | None = None) -> bool:
        """Whether the template accepts the messages and its output contains all of the texts."""
        try:
            rendered = self.render(messages, context or Context())
        except BadRow:
            return False
        return all(text in rendered for text in texts)

    def notices(self, end: EndOfTurn) -> list[str]:
        """Return surprising properties of the template, one sentence each; ``end`` is how it ends a turn."""
        sentences, question = [], _user_turn(SENTINEL)
        with suppress(BadRow):  # a faulty template is reported when it is used
            prompt = self.render(question, Context(), generation_prompt=True)
            answered = self.render([*question, {"role": "assistant", "content": _SENTINELS[0]}], Context())
            header = answered.removeprefix(prompt).partition(_SENTINELS[0])[0]
            if prompt == self.render(question, Context()) and answered.startswith(prompt) and header.strip():
                sentences.append(
                    f"the chat template has no generation prompt: the header {header.strip()!r} is part of every "
                    "answer, so it is scored and has to be generated"
                )
            if self._writes_date(prompt):
                has_date = "date_string" in self.variables
                advice = "; set chat_template_kwargs: {date_string: ...} to pin the date" if has_date else ""
                sentences.append(f"the chat template writes the current date into prompts{advice}")
        if end.tail.strip() and end.text not in end.tail:
            sentences.append(
                f"the chat template ends turns with {end.tail.strip()!r}, which is not a token of this tokenizer; "
                f"answers end with {end.text!r} instead"
            )
        return sentences

    def _writes_date(self, prompt: str) -> bool:
        """Whether ``prompt``, a rendered user message, depends on the date (through transformers' strftime_now)."""
        without = Context(kwargs={"strftime_now": ""})  # overrides the function
        try:
            return self.render(_user_turn(SENTINEL), without, generation_prompt=True) != prompt
        except BadRow:
            return True

    @cached_property
    def has_system_role(self) -> bool:
        """Whether it renders a system message."""
        first, second, _ = _SENTINELS
        text = self._try_render([{"role": "system", "content": first}, *_user_turn(second)], parts=self._needs_parts)
        return first in text and second in text

    @cached_property
    def reads_tools(self) -> bool:
        """Whether it renders tools."""
        first, second, _ = _SENTINELS
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
        tool = {"type": "function", "function": {"name": first, "description": first, "parameters": parameters}}
        return self.renders(_user_turn(second), [first], Context([tool]))

    @cached_property
    def renders_tool_calls(self) -> bool:
        """Whether it renders tool calls."""
        return self._tool_call_format is not None

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key that it reads reasoning from; None if it reads none."""
        first, second, third = _SENTINELS
        for key in REASONING:
            text = self._try_render([*_user_turn(first), {"role": "assistant", "content": second, key: third}])
            if second in text and third in text:
                return key
        return None

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether it accepts content only as a list of parts, as the templates of some vision models do."""
        first, second, _ = _SENTINELS
        messages = [*_user_turn(first), {"role": "assistant", "content": second}]
        texts = [self._try_render(messages, parts=parts) for parts in (False, True)]
        return second not in texts[0] and second in texts[1]

    def _try_render(self, messages: list[Message], *, parts: bool = False) -> str:
        """Render messages, with content unchanged or as parts; return "" if the template rejects them."""
        messages = list(map(_as_parts, messages)) if parts else messages
        try:
            return render_messages(self._tokenizer, messages, **self._settings.chat_template_kwargs)
        except BadRow:
            return ""

    @cached_property
    def _tool_call_format(self) -> tuple[bool, dict[str, Any]] | None:
        """Whether tool arguments are JSON text, and what stands for absent content; None if calls are not rendered."""
        first, second, third = _SENTINELS
        for as_text in (False, True):
            for absent in _NO_CONTENT:
                arguments: Any = {"a": third}
                function = {"name": second, "arguments": json.dumps(arguments) if as_text else arguments}
                # Mistral's templates require ids of nine letters and digits.
                call = {"id": "call00000", "type": "function", "function": function}
                text = self._try_render([*_user_turn(first), {"role": "assistant", **absent, "tool_calls": [call]}])
                if second in text and (third in text or json.dumps(third)[1:-1] in text):
                    return as_text, absent
        return None

    def _adapt_message(self, message: Message, *, images: bool) -> Message:
        """Convert a message to the format that the template expects; with ``images`` it may contain :data:`IMAGE`."""
        reasoning = reasoning_of(message)
        if reasoning and self.reasoning_key is not None and self.reasoning_key not in message:
            rest = {key: value for key, value in message.items() if key not in REASONING}
            message = {**rest, self.reasoning_key: reasoning}
        message = self.adapt_arguments(message)
        if "tool_calls" in message and not message["content"] and self._tool_call_format is not None:
            rest = {key: value for key, value in message.items() if key != "content"}
            message = {**rest, **self._tool_call_format[1]}
        return _as_parts(message) if self._needs_parts or (images and IMAGE in message["content"]) else message

    def adapt_arguments(self, message: Message) -> Message:
        """Convert a message's tool arguments to objects or JSON text, whichever the template expects."""
        if "tool_calls" not in message or self._tool_call_format is None:
            return message
        as_text, _ = self._tool_call_format
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if not as_text:
                parsed = as_object(arguments)  # text that is not a JSON object is left alone
                arguments = arguments if parsed is None else parsed
            elif not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        return {**message, "tool_calls": calls}


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, or the default one of several; "" if there is none."""
    with third_party("chat_template"):  # raises if there are several templates without a default
        return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def _user_turn(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _as_parts(message: Message) -> Message:
    """Convert a message's content to a list of parts: text, and images where they belong."""
    first, *texts = (message.get("content") or "").split(IMAGE)
    parts = [{"type": "text", "text": first}] if first or not texts else []
    for text in texts:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return {**message, "content": parts}


def as_object(arguments: str | dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a tool call as an object; None if they are text that is not a JSON object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def user_turn_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return what a tokenizer's template writes before and after a user message in a generation prompt."""
    try:
        text = render_messages(tokenizer, _user_turn(SENTINEL), add_generation_prompt=True)
    except BadRow:
        return None
    before, sentinel, after = text.partition(SENTINEL)
    before = before.removeprefix(tokenizer.bos_token or "").strip()
    return (before, after.strip()) if sentinel and before and after.strip() else None


@dataclass(frozen=True)
class EndOfTurn:
    """How a template ends the assistant's turn."""

    token_id: int  # token that ends a response
    text: str  # text of this token
    tail: str = ""  # everything that the template writes after the content of a final assistant message

    @property
    def response_suffix(self) -> str:
        """The part of ``tail`` before the end-of-turn token; it belongs to the response."""
        return self.tail.partition(self.text)[0] if self.text in self.tail else ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Find what ends a response: the first special token after a rendered response, otherwise the tokenizer's EOS.

    If EOS directly follows that token in every turn, as in Command R7B's template, EOS ends the response.
    """
    tail = _text_after_answer(tokenizer) if tokenizer.chat_template else ""
    candidates = [
        (position, -len(token.content), token.content, token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        # Some tokenizers have added tokens that are pure whitespace, for code.
        if (token.special or token.content.strip()) and (position := tail.find(token.content)) >= 0
    ]
    if candidates:
        *_, text, token_id = min(candidates)
        eos = tokenizer.eos_token
        if (
            eos
            and text + eos in tail
            and text + eos in _text_after_answer(tokenizer, {"role": "user", "content": "user"})
        ):
            text, token_id = eos, tokenizer.eos_token_id
        return EndOfTurn(token_id, text, tail)
    if tokenizer.eos_token_id is None:
        raise SimpoError("the tokenizer has no EOS and its chat template does not end turns; set an eos_token")
    return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token, tail)


def _text_after_answer(tokenizer: PreTrainedTokenizerBase, *following: Message) -> str:
    """Return what a template writes after the content of an assistant message, given the ``following`` messages."""
    template = ChatTemplate(tokenizer, RenderSettings())
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = template.render([*messages, *following], Context())
    except BadRow as refused:
        raise SimpoError(f"cannot render a user and an assistant message: {refused.reason}") from refused
    if SENTINEL not in text:
        raise SimpoError("the chat template does not render assistant messages; set chat_template to another one")
    return text.rpartition(SENTINEL)[2]


# ---- Answers as they appear in the data, possibly with special tokens of a template or of another model.

# Tokens that end a turn or a document in common model families.
_ENDS = (
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>",
    "<|endoftext|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
# A letter next to punctuation, as in "<eos>" and "[PAD]".
_MARKUP = re.compile(r"\w\W|\W\w")


class AnswerNormalizer:
    """Normalizes answers from the data for one tokenizer, whose template ends a turn with ``end``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> None:
        self._bos, self._has_template = tokenizer.bos_token, bool(tokenizer.chat_template)
        # Everything that the template writes after an answer, e.g. Phi-3's "<|end|>\n<|endoftext|>", or just the token.
        whole = r"\s*".join(map(re.escape, end.tail.split()))
        self._ends = re.compile(rf"(?:{'|'.join(filter(None, (whole, re.escape(end.text))))})\s*\Z")
        special_tokens = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
        # Some tokenizers pad with a plain-text token, such as "!".
        texts = {*_ENDS, *(text for text in special_tokens if text and _MARKUP.search(text))} - {end.text}
        self._unexpected = re.compile(rf"({'|'.join(map(re.escape, sorted(texts)))})\s*\Z")

    def normalize(self, content: str) -> str:
        """Strip an end of turn that the answer already includes, because one is added later.

        Raises:
            BadRow: the answer starts with BOS, or ends with an end token that does not end turns in this chat template.
        """
        while match := self._ends.search(content):
            content = content[: match.start()]
        # "<s>...</s>" within a text is HTML for strikethrough, not BOS and EOS.
        struck = self._bos == "<s>" and "</s>" in content.rstrip().removesuffix("</s>")
        if self._bos and content.lstrip().startswith(self._bos) and not struck:
            raise BadRow(f"an answer starts with {self._bos!r}, the BOS token: remove it from the row")
        # Without a chat template, text is used unchanged.
        match = self._unexpected.search(content) if self._has_template else None
        if match and not (match[1] == "</s>" and "<s>" in content):
            raise BadRow(
                f"an answer ends with {match[1]!r}, which does not end turns in this chat template: remove it from "
                "the row"
            )
        return content
