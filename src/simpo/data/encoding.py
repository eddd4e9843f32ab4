"""Text to ids and back for one tokenizer: boundaries, BOS, special-token text that is meant literally."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from simpo.errors import SimpoError

# What may stand before a text to keep a tokenizer from putting a space of its own in front of it. The
# first with which the text decodes to itself is taken, so the order is only a matter of speed.
_ANCHORS = ("", "\n", ".", "a")
# Ids of context that decoding needs to treat what follows them as a continuation.
_CONTEXT = 8


class Texts(Protocol):
    """Texts of one row.

    Attributes:
        texts: as they are rendered.
        marker: set if special-token text stands marked in them (see :class:`LiteralText`).
    """

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
        self._added = {
            token.content: (token_id, token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._swallowing = {token_id for token_id, token in self._added.values() if token.rstrip}
        self.literal = LiteralText(list(self._added))
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
        """A piece without the white space that the special tokens beside it swallow (Phi-3's do)."""
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
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        ).input_ids

    def _detect_space_after_special(self) -> bool:
        """Whether text after a special token starts anew (legacy sentencepiece puts a space there)."""
        if not self._added:
            return False
        special, (special_id, _) = next(iter(self._added.items()))
        alone, after = self.encode(["a", special + "a"])
        return after == [special_id, *alone]


class LiteralText:
    """Marks special-token text inside messages, so that it stays text once they are rendered."""

    def __init__(self, specials: Sequence[str]) -> None:
        # Longest first: a token may be the beginning of another one.
        self._specials = sorted(specials, key=len, reverse=True)
        self._numbers = {text: number for number, text in enumerate(self._specials)}
        alternatives = "|".join(map(re.escape, self._specials)) or r"(?!)"
        self.pattern = re.compile(f"({alternatives})")

    def marker_for(self, texts: Sequence[str]) -> str | None:
        """A private-use character that is in none of the texts; ``None`` if none holds special-token text."""
        if not any(self.pattern.search(text) for text in texts):
            return None
        used = set().union(*texts)
        return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)

    def mark(self, text: str, marker: str) -> str:
        """Replace special-token text by its number between two markers."""
        return self.pattern.sub(lambda match: f"{marker}{self._numbers[match[0]]}{marker}", text)

    def restore(self, text: str, marker: str) -> str:
        """Undo :meth:`mark`."""
        return re.sub(f"{marker}(\\d+){marker}", lambda match: self._specials[int(match[1])], text)
