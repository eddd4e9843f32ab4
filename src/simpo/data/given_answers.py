"""The text of an answer as a row gives it, which may hold tokens' text of the model that wrote it, or of a template."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from simpo.data.chat_template import EndOfTurn
from simpo.data.rows import BadRow

# Tokens that end a turn or a text in the common families of models.
_ENDS = (
    *("</s>", "<eos>", "<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<|end|>"),
    *("<|endoftext|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
# Letters next to a sign, as in "<eos>" and "[PAD]".
_MARKUP = re.compile(r"\w\W|\W\w")


class GivenAnswers:
    """Brings the answers of rows into one form for one tokenizer, in which ``end`` ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> None:
        self._end, self._bos, self._has_template = end, tokenizer.bos_token, bool(tokenizer.chat_template)
        own = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}
        # Some tokenizers pad with a token of plain text, such as "!".
        texts = {*_ENDS, *(text for text in own if text and _MARKUP.search(text))} - {end.text}
        self._unexpected = re.compile(rf"({'|'.join(map(re.escape, sorted(texts)))})\s*\Z")

    def text(self, content: str) -> str:
        """An answer without the end-of-turn text that it may already have, because the token is added once.

        Raises:
            BadRow: it starts with BOS or, where a chat template ends the turn, ends with another token's text.
        """
        while (stripped := content.rstrip()).endswith(self._end.text):
            content = stripped.removesuffix(self._end.text)
        # In HTML, </s> closes what <s> opens.
        struck = self._bos == "<s>" and "</s>" in content.rstrip().removesuffix("</s>")
        if self._bos and content.lstrip().startswith(self._bos) and not struck:
            raise BadRow(f"an answer starts with {self._bos!r}, which starts a text: leave it out")
        # Without a template, text is used as it is.
        found = self._unexpected.search(content) if self._has_template else None
        if found and not (found[1] == "</s>" and "<s>" in content):
            raise BadRow(f"an answer ends with {found[1]!r}, which ends no turn in this chat template: leave it out")
        return content


def check_not_empty(answer: str) -> None:
    """Refuse an answer that holds nothing but white space."""
    if not answer.strip():
        raise BadRow("empty response")
