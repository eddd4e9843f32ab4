"""The text of an answer as a row gives it, which may include special tokens of a template or of another model."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import EndOfTurn
from simpo.data.rows import BadRow

# Tokens that end a turn or a text in common model families.
_ENDS = (
    *("</s>", "<eos>", "<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>"),
    *("<|endoftext|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
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


def check_reasoning_ends(answer: str) -> None:
    """Raise BadRow if an answer opens its reasoning and does not end it."""
    if answer.lstrip().startswith("<think>") and "</think>" not in answer:
        raise BadRow("reasoning that does not end: <think> without </think>")


def check_not_empty(answer: str) -> None:
    """Raise BadRow if an answer is empty or consists of white space."""
    if not answer.strip():
        raise BadRow("empty response")
