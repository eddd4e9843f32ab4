"""Text to ids and back for one tokenizer: boundaries, BOS, special-token text that is meant literally."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from simpo.errors import SimpoError

# What may stand before a text to keep a tokenizer from putting a space of its own in front of it. The
# first with which the text decodes to itself is taken, so the order is only a matter of speed.
_ANCHORS = ("", "\n", ".", "a")
# Ids of context that decoding needs to treat what follows them as a continuation.
_CONTEXT = 8
_REASONING_TAGS = ("<think>", "</think>")


class Texts(Protocol):
    """Texts of one row, and the marker if special-token text is marked in them (see :class:`LiteralText`)."""

    @property
    def texts(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def marker(self) -> str | None: ...  # noqa: D102


class Encoder:
    """Encodes as generation would read: rendered text, special tokens as the template wrote them.

    Raises:
        SimpoError: the tokenizer is not a fast one (of the ``tokenizers`` library).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise SimpoError(
                f"{tokenizer.name_or_path or type(tokenizer).__name__}: not a fast tokenizer; "
                "give a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        added = sorted(
            tokenizer.added_tokens_decoder.items(), key=lambda item: not item[1].special
        )  # special ones first
        structural = _structural(tokenizer)
        self._added = {token.content: (token_id, token) for token_id, token in added if token.content in structural}
        self._unsplit = {token.content for _, token in added if token.content in structural and not token.special}
        self._swallowing = {token_id for token_id, token in self._added.values() if token.rstrip}
        self.literal = LiteralText(list(self._added), structural, exempt=_tested(tokenizer))
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        self._spaces_after_special = self._detect_space_after_special()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts; special tokens in them are parsed and none is added."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def encode_marked(self, text: str, marker: str, before: Sequence[int] = ()) -> list[int]:
        """Ids of a rendered text in which the special-token text of messages was marked as literal.

        Args:
            text: rendered from messages that :meth:`LiteralText.mark` went over.
            marker: the marker it used.
            before: ids that the text follows.
        """
        pieces = self.literal.pattern.split(text)
        ids = list(before)
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._added[piece][0])
            elif stripped := self._as_tokenizer_strips(pieces, index):
                ids += self._literal_piece(self.literal.restore(stripped, marker), ids)
        return ids[len(before) :]

    def encode_groups(self, groups: Sequence[Texts]) -> list[list[list[int]]]:
        """Ids of the texts of each group; all texts without marks are encoded in one call."""
        plain = iter(self.encode([text for group in groups if group.marker is None for text in group.texts]))
        return [
            [next(plain) if group.marker is None else self.encode_marked(text, group.marker) for text in group.texts]
            for group in groups
        ]

    def following(self, prompt: Sequence[int], text: str, whole: Sequence[int], marker: str | None) -> list[int]:
        """Ids of a text that follows a prompt: the rest of ``whole``, or encoded alone if a token merged across.

        Args:
            prompt: ids of the prompt.
            text: what follows it.
            whole: ids of the prompt's text and this one, encoded together.
            marker: set if special-token text stands marked in the text.
        """
        if self._splits(whole, prompt, text):
            return list(whole[len(prompt) :])
        if marker is None:
            return self._continue(text, prompt, split_special=False)
        return self.encode_marked(text, marker, before=prompt)

    def _splits(self, whole: Sequence[int], prompt: Sequence[int], text: str) -> bool:
        """Whether ``whole``, the ids of a prompt and the text after it, is the prompt's ids and the text's.

        It is not if a token merged across, or if the prompt's last token swallowed white space of the text.
        """
        swallowed = bool(prompt) and text[:1].isspace() and prompt[-1] in self._swallowing
        return whole[: len(prompt)] == prompt and not swallowed

    def one_bos(self, prompt: list[int]) -> list[int]:
        """The prompt with exactly one BOS in front if template or tokenizer put one there, else none."""
        bos = self._tokenizer.bos_token_id
        count = next((i for i, token_id in enumerate(prompt) if token_id != bos), len(prompt))
        if bos is None or (not count and not self.adds_bos):
            return prompt
        return [bos, *prompt[count:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included, white space as it is."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _as_tokenizer_strips(self, pieces: list[str], index: int) -> str:
        """A piece without the white space that the special tokens next to it swallow (Phi-3's do)."""
        piece = pieces[index]
        if index > 0 and self._added[pieces[index - 1]][1].rstrip:
            piece = piece.lstrip()
        if index + 1 < len(pieces) and self._added[pieces[index + 1]][1].lstrip:
            piece = piece.rstrip()
        return piece

    def _literal_piece(self, text: str, before: list[int]) -> list[int]:
        if not before or (self._spaces_after_special and self._is_special(before[-1])):
            return self._encode_one(text, split_special=True)
        return self._continue(text, before, split_special=True)

    def _is_special(self, token_id: int) -> bool:
        return any(token_id == special for special, _ in self._added.values())

    def _continue(self, text: str, before: Sequence[int], *, split_special: bool) -> list[int]:
        context = list(before[-_CONTEXT:])
        expected = self.decode(context) + text
        for anchor in _ANCHORS:
            head = self._encode_one(anchor, split_special) if anchor else []
            ids = self._encode_one(anchor + text, split_special)
            rest = ids[len(head) :]
            if ids[: len(head)] == head and self.decode(context + rest) == expected:
                return rest
        return self._encode_one(text, split_special)

    def _encode_one(self, text: str, split_special: bool) -> list[int]:
        if split_special and any(token in text for token in self._unsplit):
            return self._literal_backend.encode(text, add_special_tokens=False).ids
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        ).input_ids

    @cached_property
    def _literal_backend(self) -> Tokenizer:
        """The tokenizer without structural tokens: split_special_tokens leaves those that are not special whole."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in self._added]
        state["padding"] = state["truncation"] = None
        return Tokenizer.from_str(json.dumps(state))

    def _detect_space_after_special(self) -> bool:
        """Whether text after a special token starts afresh (legacy sentencepiece puts a space there)."""
        if not self._added:
            return False
        special, (special_id, _) = next(iter(self._added.items()))
        alone, after = self.encode(["a", special + "a"])
        return after == [special_id, *alone]


class LiteralText:
    """Marks token text inside messages, so that it stays text once they are rendered.

    Args:
        tokens: text of all structural tokens.
        structural: the same, and whether the assistant itself may write the token as part of an answer.
        exempt: tokens that the template looks for at the beginning or end of a user's message.
    """

    def __init__(self, tokens: Sequence[str], structural: Mapping[str, bool], exempt: Container[str] = ()) -> None:
        # Longest first: a token may be the beginning of another one.
        self._tokens = sorted(tokens, key=len, reverse=True)
        self._numbers = {text: number for number, text in enumerate(self._tokens)}
        self.pattern = _any_of(self._tokens)
        self._exempt = exempt
        self._answered = _any_of([token for token in self._tokens if not structural[token]])

    def marker_for(self, value: object, *, answers: Sequence[str] = ()) -> str | None:
        """A private-use character that is in none of the texts; ``None`` if nothing has to be marked.

        Args:
            value: any JSON value.
            answers: texts that the assistant wrote.
        """
        texts = list(_strings(value))
        if not any(map(self.pattern.search, texts)) and not any(map(self._answered.search, answers)):
            return None
        used = set().union(*texts, *answers)
        return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)

    def mark(self, value: Any, marker: str, role: str | None = None) -> Any:
        """Replace token text in all strings of a JSON value by the token's number between two markers.

        Args:
            value: any JSON value.
            marker: of :meth:`marker_for`.
            role: whose message's content it is, if it is one: an assistant's may hold tokens such as ``<think>``.
        """
        if isinstance(value, str):
            pattern = self._answered if role == "assistant" else self.pattern

            def marked(match: re.Match[str]) -> str:
                if role == "user" and match[0] in self._exempt and (match.start() == 0 or match.end() == len(value)):
                    return match[0]
                return f"{marker}{self._numbers[match[0]]}{marker}"

            return pattern.sub(marked, value)
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marker) for item in value]
        return value

    def restore(self, text: str, marker: str) -> str:
        """Undo :meth:`mark`."""
        return re.sub(f"{marker}(\\d+){marker}", lambda match: self._tokens[int(match[1])], text)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, tokens)) or '(?!)'})")


def _structural(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Text of the added tokens that structure a conversation, and whether the assistant may write them in an answer.

    Structural are special tokens, and others that the chat template itself writes (Qwen's ``<tool_call>``); not words
    that somebody added to a vocabulary. In an answer, those are the model's own that are not special and neither open
    nor end a turn, and the tags around its reasoning.
    """
    template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    around_turns = _around_turns(tokenizer)
    return {
        token.content: token.content in _REASONING_TAGS or not (token.special or token.content in around_turns)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or ((token.content in template or token.content in around_turns) and re.search(r"[^\w\s]", token.content))
    }


def _around_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a template writes around a user's and an assistant's message."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue000"}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the template's faults are reported where it is used
        return ""


def _tested(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that a template looks for at an end of a message to tell what it is, as Qwen's does for tools' results."""
    template = str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return set(re.findall(r"""\b(?:starts|ends)with\(['"]([^'"]+)['"]\)""", template)) - special
