"""One tokenizer's chat template: its limits, what it renders, its form of messages, and how a turn ends."""

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

# ---- Limits on the time and memory that a template, which may come from anybody, may use.

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SECONDS = 2.0  # processor time for one conversation, which takes milliseconds
_MEMORY = 1 << 30  # bytes
_LONGEST = 1 << 26  # characters
_BITS = 64  # size of a factor or an exponent


class _OverrunError(BaseException):
    """The time is over; not an Exception, so that no library handles it."""


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text that a tokenizer's chat template makes of messages.

    Raises:
        BadRow: the template refuses them, with whatever error of its own or of Jinja.
        SimpoError: it needs too much time or memory, or writes too much.
    """
    try:
        with _limited():
            text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except _OverrunError:
        raise SimpoError(f"chat_template: one conversation takes more than {_SECONDS:g} s to render") from None
    except MemoryError:
        raise SimpoError(f"chat_template: one conversation takes more than {_MEMORY >> 30} GiB to render") from None
    except Exception as error:
        raise BadRow(f"the chat template refuses it: {one_line(error)}") from error
    if len(text) > _LONGEST:
        raise SimpoError(f"chat_template: one conversation becomes {len(text):,} characters")
    return text


@contextmanager
def _limited() -> Iterator[None]:
    """Bound the processor time and the memory of the body, except on Windows and outside the main thread."""
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OverrunError

    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        _limit_memory(memory)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _limit_memory(current: tuple[int, int]) -> None:
    statistics = Path("/proc/self/statm")  # Linux; elsewhere the limit has no effect anyway
    if statistics.exists():
        limit = int(statistics.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        if current[0] == resource.RLIM_INFINITY or limit < current[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, current[1]))


def _bounded(function: Callable[[Any, Any], Any], largest: int) -> Callable[[Any, Any], Any]:
    """The operation, except on numbers so large that nothing could interrupt it."""

    def apply(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > largest:
            raise OverflowError("the number is too large")
        return function(left, right)

    return apply


# Jinja's sandbox, in which transformers runs templates, bounds the length of ranges but not the size of numbers.
SandboxedEnvironment.intercepted_binops = frozenset(("*", "**"))
SandboxedEnvironment.default_binop_table |= {
    "*": _bounded(operator.mul, 1 << _BITS),
    "**": _bounded(operator.pow, _BITS),
}


# Content that no template trims, splits or refuses, used to see what a template writes around it.
SENTINEL = "\uf8ffresponse\uf8ff"
_SENTINELS = tuple(f"\uf8ff{name}\uf8ff" for name in ("first", "second", "third"))
NO_SYSTEM_ROLE = (
    "the chat template has no system role; set system_message: fold, which writes the system message into the first "
    "user message"
)
_BLOCK_TAGS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# Text of a template that names a role: all of it, as in a comparison, or next to the mark that starts a turn.
_NAMED_ROLE = re.compile(r"\A\s*(\w+)\s*\Z|[>|\]](\w+)")
_WHETHER_GIVEN = ("defined", "undefined", "default", "d")
_NO_CONTENT: tuple[dict[str, Any], ...] = ({"content": ""}, {"content": None}, {})


class ChatTemplate:
    """Renders messages, after converting them to the form that the template expects.

    The form is detected by rendering messages of known content: templates differ in whether they take content as text
    or as parts, tool arguments as objects or as JSON text, absent content as ``""``, null or no key at all, and in the
    key that holds reasoning.

    Raises:
        SimpoError: ``chat_template_kwargs`` has a variable that the template never reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RenderSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.source = template_of(tokenizer)
        if unread := self.unread(settings.chat_template_kwargs):
            known = ", ".join(sorted(self.variables)) or "none"
            raise SimpoError(f"chat_template_kwargs: the chat template never reads {unread[0]!r}; it reads {known}")

    def render(self, messages: Sequence[Message], context: Context, *, generation_prompt: bool = False) -> str:
        """The text of messages."""
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

    def unread(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Names of variables that the template never reads."""
        return [name for name in kwargs if name not in self.variables] if kwargs else []

    @cached_property
    def _syntax_tree(self) -> nodes.Template:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701 - no HTML
        with third_party("chat_template"):
            return environment.parse(_BLOCK_TAGS.sub("", self.source))

    @cached_property
    def variables(self) -> set[str]:
        """Names of the variables that it reads, without those that transformers always gives it."""
        return meta.find_undeclared_variables(self._syntax_tree) - {*RESERVED_KWARGS, "raise_exception", "strftime_now"}

    @cached_property
    def options(self) -> set[str]:
        """Names of the variables that it expects to be given, such as ``enable_thinking``.

        A name that it assigns in a branch is one of :attr:`variables`, but is usually its own, such as ``content``;
        it is an option if the template tests whether it is defined.
        """
        names = list(self._syntax_tree.find_all(nodes.Name))
        parameters = {one.name for one in names if one.ctx == "param"}
        assigned = {one.name for one in names if one.ctx == "store"}
        tests = [one for one in self._syntax_tree.find_all((nodes.Test, nodes.Filter)) if one.name in _WHETHER_GIVEN]
        tested = {one.node.name for one in tests if isinstance(one.node, nodes.Name)}
        return self.variables - parameters - (assigned - tested)

    @cached_property
    def named_roles(self) -> frozenset[str]:
        """Words that the template compares roles with or writes where a turn starts, such as Granite's ``document``.

        Many templates write whatever role a message has; the model has probably never read one that they do not name.
        Not all of these words are roles: a message whose content the template leaves out is a bad row in any case.
        """
        texts = [node.value for node in self._syntax_tree.find_all(nodes.Const) if isinstance(node.value, str)]
        texts += [node.data for node in self._syntax_tree.find_all(nodes.TemplateData)]
        return frozenset("".join(found) for text in texts for found in _NAMED_ROLE.findall(text))

    def shows(self, messages: Sequence[Message], texts: Sequence[str], context: Context | None = None) -> bool:
        """Whether the template renders messages, and its output contains the texts."""
        try:
            rendered = self.render(messages, context or Context())
        except BadRow:
            return False
        return all(text in rendered for text in texts)

    def notices(self, end: EndOfTurn) -> list[str]:
        """Properties of the template that its users may not expect, one sentence each; ``end`` is its end of a turn."""
        found, asked = [], _user_turn(SENTINEL)
        with suppress(BadRow):  # the template's faults are reported where it is used
            prompt = self.render(asked, Context(), generation_prompt=True)
            answered = self.render([*asked, {"role": "assistant", "content": _SENTINELS[0]}], Context())
            header = answered.removeprefix(prompt).partition(_SENTINELS[0])[0]
            if prompt == self.render(asked, Context()) and answered.startswith(prompt) and header.strip():
                found.append(
                    f"the chat template has no generation prompt: the header {header.strip()!r} is a part of every "
                    "answer, is scored, and has to be generated"
                )
            if self._writes_date(prompt):
                known = "date_string" in self.variables
                advice = "; chat_template_kwargs: {date_string: ...} fixes it" if known else ""
                found.append(f"the chat template writes the date of tokenization into the prompts{advice}")
        if end.tail.strip() and end.text not in end.tail:
            found.append(
                f"the chat template ends turns with {end.tail.strip()!r}, which is no token of this tokenizer: answers "
                f"end with {end.text!r}"
            )
        return found

    def _writes_date(self, prompt: str) -> bool:
        """Whether ``prompt``, a rendered user message, depends on the date, for which transformers gives templates a
        function.
        """
        without = Context(kwargs={"strftime_now": ""})  # which takes precedence over the function of this name
        try:
            return self.render(_user_turn(SENTINEL), without, generation_prompt=True) != prompt
        except BadRow:
            return True

    @cached_property
    def has_system_role(self) -> bool:
        """Whether it renders a system message."""
        first, second, _ = _SENTINELS
        text = self._try_render([{"role": "system", "content": first}, *_user_turn(second)], parts=self._in_parts)
        return first in text and second in text

    @cached_property
    def reads_tools(self) -> bool:
        """Whether it renders tools."""
        first, second, _ = _SENTINELS
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
        tool = {"type": "function", "function": {"name": first, "description": first, "parameters": parameters}}
        return self.shows(_user_turn(second), [first], Context([tool]))

    @cached_property
    def renders_calls(self) -> bool:
        """Whether it renders tool calls."""
        return self._call_form is not None

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key under which it reads reasoning; None if there is none."""
        first, second, third = _SENTINELS
        for key in REASONING:
            text = self._try_render([*_user_turn(first), {"role": "assistant", "content": second, key: third}])
            if second in text and third in text:
                return key
        return None

    @cached_property
    def _in_parts(self) -> bool:
        """Whether it takes content only as a list of parts, as some templates of vision models do."""
        first, second, _ = _SENTINELS
        messages = [*_user_turn(first), {"role": "assistant", "content": second}]
        texts = [self._try_render(messages, parts=parts) for parts in (False, True)]
        return second not in texts[0] and second in texts[1]

    def _try_render(self, messages: list[Message], *, parts: bool = False) -> str:
        """The text of messages, with content as it is or as parts; empty if the template refuses them."""
        messages = list(map(_as_parts, messages)) if parts else messages
        try:
            return render_messages(self._tokenizer, messages, **self._settings.chat_template_kwargs)
        except BadRow:
            return ""

    @cached_property
    def _call_form(self) -> tuple[bool, dict[str, Any]] | None:
        """Whether arguments are JSON text, and what replaces absent content; None if calls are not rendered."""
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
        """A message in the form that the template expects; with ``images``, its content may include :data:`IMAGE`."""
        reasoning = reasoning_of(message)
        if reasoning and self.reasoning_key is not None and self.reasoning_key not in message:
            rest = {key: value for key, value in message.items() if key not in REASONING}
            message = {**rest, self.reasoning_key: reasoning}
        message = self.with_arguments(message)
        if "tool_calls" in message and not message["content"] and self._call_form is not None:
            rest = {key: value for key, value in message.items() if key != "content"}
            message = {**rest, **self._call_form[1]}
        return _as_parts(message) if self._in_parts or (images and IMAGE in message["content"]) else message

    def with_arguments(self, message: Message) -> Message:
        """A message whose tool arguments are objects or JSON text, as the template expects them."""
        if "tool_calls" not in message or self._call_form is None:
            return message
        as_text, _ = self._call_form
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if not as_text:
                found = as_object(arguments)  # None of text that is not a JSON object, which stays text
                arguments = arguments if found is None else found
            elif not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        return {**message, "tool_calls": calls}


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or the default one of several; empty if there is none."""
    with third_party("chat_template"):  # several templates, none of which is the default
        return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def _user_turn(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _as_parts(message: Message) -> Message:
    """A message with content as a list of parts: texts, and images in their places."""
    first, *texts = (message.get("content") or "").split(IMAGE)
    parts = [{"type": "text", "text": first}] if first or not texts else []
    for text in texts:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return {**message, "content": parts}


def as_object(arguments: str | dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a tool call as an object; None for text that is not a JSON object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def user_turn_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The text that a tokenizer's template writes before and after a user's message that is to be answered."""
    try:
        text = render_messages(tokenizer, _user_turn(SENTINEL), add_generation_prompt=True)
    except BadRow:
        return None
    before, found, after = text.partition(SENTINEL)
    before = before.removeprefix(tokenizer.bos_token or "").strip()
    return (before, after.strip()) if found and before and after.strip() else None


@dataclass(frozen=True)
class EndOfTurn:
    """The end of the assistant's turn in a template."""

    token_id: int  # the token that ends a response
    text: str  # its text
    tail: str = ""  # all text that the template writes after the content of a final assistant message

    @property
    def kept(self) -> str:
        """The part of ``tail`` before the end-of-turn token, which belongs to the response."""
        return self.tail.partition(self.text)[0] if self.text in self.tail else ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """The end of a response: the first special token after a rendered response, else the tokenizer's EOS.

    If the EOS directly follows that token in every turn, as in Command R7B's template, the EOS ends the response.
    """
    tail = _text_after_answer(tokenizer) if tokenizer.chat_template else ""
    found = [
        (position, -len(token.content), token.content, token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        # Some tokenizers have added tokens of nothing but white space, for code.
        if (token.special or token.content.strip()) and (position := tail.find(token.content)) >= 0
    ]
    if found:
        *_, text, token_id = min(found)
        eos = tokenizer.eos_token
        if (
            eos
            and text + eos in tail
            and text + eos in _text_after_answer(tokenizer, {"role": "user", "content": "user"})
        ):
            text, token_id = eos, tokenizer.eos_token_id
        return EndOfTurn(token_id, text, tail)
    if tokenizer.eos_token_id is None:
        raise SimpoError("the tokenizer has no EOS and its chat template ends no turn; set an eos_token")
    return EndOfTurn(tokenizer.eos_token_id, tokenizer.eos_token, tail)


def _text_after_answer(tokenizer: PreTrainedTokenizerBase, *following: Message) -> str:
    """The text that a template writes after the content of an assistant's message that others may follow."""
    template = ChatTemplate(tokenizer, RenderSettings())
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = template.render([*messages, *following], Context())
    except BadRow as refused:
        raise SimpoError(f"a user and an assistant message: {refused.reason}") from refused
    if SENTINEL not in text:
        raise SimpoError("the chat template leaves out the assistant's message; set chat_template to another")
    return text.rpartition(SENTINEL)[2]


# ---- The text of an answer as a row gives it, which may include special tokens of a template or of another model.

# Tokens that end a turn or a text in common model families.
_ENDS = (
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>",
    "<|endoftext|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
# A letter next to a punctuation mark, as in "<eos>" and "[PAD]".
_MARKUP = re.compile(r"\w\W|\W\w")


class GivenAnswers:
    """Normalizes the answers of rows for one tokenizer, whose template ends a turn with ``end``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> None:
        self._bos, self._has_template = tokenizer.bos_token, bool(tokenizer.chat_template)
        # All that the template writes after an answer, such as Phi-3's "<|end|>\n<|endoftext|>", or the token alone.
        whole = r"\s*".join(map(re.escape, end.tail.split()))
        self._ends = re.compile(rf"(?:{'|'.join(filter(None, (whole, re.escape(end.text))))})\s*\Z")
        own = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
        # Some tokenizers pad with a token of plain text, such as "!".
        texts = {*_ENDS, *(text for text in own if text and _MARKUP.search(text))} - {end.text}
        self._unexpected = re.compile(rf"({'|'.join(map(re.escape, sorted(texts)))})\s*\Z")

    def text(self, content: str) -> str:
        """An answer without the end of turn that it may already include, because the token is added once.

        Raises:
            BadRow: the answer starts with BOS, or ends with the text of a token that does not end turns in the chat
                template.
        """
        while found := self._ends.search(content):
            content = content[: found.start()]
        # "<s>...</s>" inside a text is HTML for struck-through text, not BOS and EOS.
        struck = self._bos == "<s>" and "</s>" in content.rstrip().removesuffix("</s>")
        if self._bos and content.lstrip().startswith(self._bos) and not struck:
            raise BadRow(f"an answer starts with {self._bos!r}, the BOS token: remove it from the row")
        # Without a chat template, text is used as it is.
        found = self._unexpected.search(content) if self._has_template else None
        if found and not (found[1] == "</s>" and "<s>" in content):
            raise BadRow(
                f"an answer ends with {found[1]!r}, which does not end turns in this chat template: remove it from "
                "the row"
            )
        return content
