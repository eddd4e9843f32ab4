"""Encodes and decodes text with one tokenizer: boundaries, BOS, and special-token text that is meant literally."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import render_messages, template_of
from simpo.data.rows import BadRow
from simpo.errors import SimpoError

# Prefixes to encode a text with, so that the tokenizer does not insert a space of its own. The first one with which the
# text decodes to itself is used, so the order only affects speed.
_ANCHORS = ("", "\n", ".", "a")
# Number of preceding ids that decoding needs to treat the next ones as a continuation.
_CONTEXT = 8
_REASONING_TAGS = ("<think>", "</think>")


class Encoder:
    """Encodes rendered text exactly as generation would read it, with the special tokens that the template wrote.

    Raises:
        SimpoError: the tokenizer is not a fast one (from the ``tokenizers`` library).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise SimpoError(
                f"{tokenizer.name_or_path or type(tokenizer).__name__}: not a fast tokenizer; "
                "use a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        # Special tokens first: the first one is used to test whether a space is inserted after special tokens.
        added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: not item[1].special)
        structural = _structural_tokens(tokenizer)
        self._added = {token.content: (token_id, token) for token_id, token in added if token.content in structural}
        self._not_special = {token.content for _, token in added if token.content in structural and not token.special}
        self._strips_following = {token_id for token_id, token in self._added.values() if token.rstrip}
        self.literal = LiteralText(structural, exempt=_texts_tested_by_template(tokenizer))
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        # Legacy sentencepiece starts over after a special token and puts a space in front of the text.
        self._spaces_after_special = False
        if self._added:
            special, (special_id, _) = next(iter(self._added.items()))
            alone, after = self.encode(["a", special + "a"])
            self._spaces_after_special = after == [special_id, *alone]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode rendered texts; special tokens in them are parsed and none are added."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def encode_marked(self, text: str, marker: str, before: Sequence[int] = ()) -> list[int]:
        """Encode a rendered text in which special-token text from messages was marked as literal.

        ``marker`` is the one given to :meth:`LiteralText.mark`; ``before`` holds the ids that precede the text.
        """
        pieces = self.literal.pattern.split(text)
        ids = list(before)
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self._added[piece][0])
                continue
            # Some special tokens, such as Phi-3's, swallow adjacent whitespace.
            kept = piece
            if index > 0 and self._added[pieces[index - 1]][1].rstrip:
                kept = kept.lstrip()
            if index + 1 < len(pieces) and self._added[pieces[index + 1]][1].lstrip:
                kept = kept.rstrip()
            if not kept:
                continue
            kept = self.literal.restore(kept, marker)
            after_special = bool(ids) and any(ids[-1] == special for special, _ in self._added.values())
            if not ids or (self._spaces_after_special and after_special):
                ids += self._encode_one(kept, split_special=True)
            else:
                ids += self._continue(kept, ids, split_special=True)
        return ids[len(before) :]

    def encode_groups(self, groups: Sequence[tuple[Sequence[str], str | None]]) -> list[list[list[int]]]:
        """Encode the texts of each group; all texts without marks are encoded in one call.

        Each group comes with the marker of special-token text in its texts, or None if nothing is marked.
        """
        plain = iter(self.encode([text for texts, marker in groups if marker is None for text in texts]))
        return [
            [next(plain) if marker is None else self.encode_marked(text, marker) for text in texts]
            for texts, marker in groups
        ]

    def encode_following(self, prompt: Sequence[int], text: str, whole: Sequence[int], marker: str | None) -> list[int]:
        """Encode a text that follows a prompt: the rest of ``whole``, or on its own if a token spans the boundary.

        ``whole`` holds the ids of the prompt and this text encoded together; ``marker``, if any, marks special-token
        text in it.
        """
        swallowed = bool(prompt) and text[:1].isspace() and prompt[-1] in self._strips_following
        if whole[: len(prompt)] == prompt and not swallowed:
            return list(whole[len(prompt) :])
        if marker is None:
            return self._continue(text, prompt, split_special=False)
        return self.encode_marked(text, marker, before=prompt)

    def with_one_bos(self, prompt: list[int]) -> list[int]:
        """Return the prompt with exactly one BOS in front if the template or the tokenizer adds one, else with none."""
        bos = self._tokenizer.bos_token_id
        count = next((i for i, token_id in enumerate(prompt) if token_id != bos), len(prompt))
        if bos is None or (not count and not self.adds_bos):
            return prompt
        return [bos, *prompt[count:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, keeping special tokens and whitespace."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _continue(self, text: str, before: Sequence[int], *, split_special: bool) -> list[int]:
        """Encode a text such that it decodes to itself after ``before``, using the first anchor that achieves this."""
        context = list(before[-_CONTEXT:])
        expected = self.decode(context) + text
        for anchor in _ANCHORS:
            head = self._encode_one(anchor, split_special=split_special) if anchor else []
            ids = self._encode_one(anchor + text, split_special=split_special)
            rest = ids[len(head) :]
            if ids[: len(head)] == head and self.decode(context + rest) == expected:
                return rest
        return self._encode_one(text, split_special=split_special)

    def _encode_one(self, text: str, *, split_special: bool) -> list[int]:
        if split_special and any(token in text for token in self._not_special):
            return self._literal_backend.encode(text, add_special_tokens=False).ids
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        ).input_ids

    @cached_property
    def _literal_backend(self) -> Tokenizer:
        """The tokenizer without structural tokens, because split_special_tokens only splits those that are special."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in self._added]
        state["padding"] = state["truncation"] = None
        return Tokenizer.from_str(json.dumps(state))


class LiteralText:
    """Marks token text inside messages, so that it is still plain text after rendering.

    Args:
        structural: text of each structural token -> whether the assistant may write the token in an answer.
        exempt: tokens that the template looks for at the beginning or end of a user message.
    """

    def __init__(self, structural: Mapping[str, bool], exempt: Container[str] = ()) -> None:
        # Longest first, because a token may be a prefix of another one.
        self._tokens = sorted(structural, key=len, reverse=True)
        self._numbers = {text: number for number, text in enumerate(self._tokens)}
        self.pattern = _any_of(self._tokens)
        self._exempt = exempt
        self._not_in_answers = _any_of([token for token in self._tokens if not structural[token]])

    def marker_for(self, value: object, *, answers: Sequence[str] = ()) -> str | None:
        """Return a private-use character that no text contains, not even escaped; ``None`` if nothing needs marking.

        ``value`` is any JSON value, and ``answers`` are texts written by the assistant.
        """
        texts = list(_strings(value))
        if not any(map(self.pattern.search, texts)) and not any(map(self._not_in_answers.search, answers)):
            return None
        texts += answers
        used = set().union(*texts)
        unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
        markers = (marker for marker in unused if not any(_escaped(marker) in text for text in texts))
        if (marker := next(markers, None)) is None:
            raise BadRow("special-token text cannot be marked, because the row uses every private-use character")
        return marker

    def mark(self, value: Any, marker: str, role: str | None = None) -> Any:
        """Replace token text in all strings of a JSON value with the token's number between two markers.

        With a ``role``, ``value`` is the content of a message with this role: an assistant's may contain tokens such
        as ``<think>``.
        """
        if isinstance(value, str):
            pattern = self._not_in_answers if role == "assistant" else self.pattern

            def replacement(match: re.Match[str]) -> str:
                if role == "user" and match[0] in self._exempt and (match.start() == 0 or match.end() == len(value)):
                    return match[0]
                return f"{marker}{self._numbers[match[0]]}{marker}"

            return pattern.sub(replacement, value)
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item, marker) for item in value]
        return value

    def restore(self, text: str, marker: str) -> str:
        """Undo :meth:`mark`, also where a template has printed a mapping and escaped the markers in it."""
        either = f"(?:{marker}|{re.escape(_escaped(marker))})"
        return re.sub(f"{either}(\\d+){either}", lambda match: self._tokens[int(match[1])], text)


def _escaped(marker: str) -> str:
    """Return the marker as Python's ``repr`` and JSON in ASCII write it."""
    return f"\\u{ord(marker):04x}"


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


def _structural_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return the text of each token that structures conversations, and whether an answer may contain it.

    These are the special tokens and any that the chat template itself writes (Qwen's ``<tool_call>``), but not words
    that were added to the vocabulary. An answer may contain reasoning tags, and tokens that are not special and neither
    open nor end a turn.
    """
    template = template_of(tokenizer)
    around_turns = ""
    if template:
        messages = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue000"}]
        with suppress(BadRow):  # a faulty template is reported when it is used
            around_turns = render_messages(tokenizer, messages)
    return {
        token.content: token.content in _REASONING_TAGS or not (token.special or token.content in around_turns)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or ((token.content in template or token.content in around_turns) and re.search(r"[^\w\s]", token.content))
    }


def _texts_tested_by_template(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return texts by which a template recognizes certain messages, as Qwen's does for tool results."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return set(re.findall(r"""\b(?:starts|ends)with\(['"]([^'"]+)['"]\)""", template_of(tokenizer))) - special
