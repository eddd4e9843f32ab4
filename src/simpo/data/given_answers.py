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


class GivenAnswers:
    """Brings the answers of rows into one form for one tokenizer, in which ``end`` ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: EndOfTurn) -> None:
        self._end, self._bos, self._has_template = end, tokenizer.bos_token, bool(tokenizer.chat_template)
        texts = {*_ENDS, tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token} - {None, "", end.text}
        self._unexpected = re.compile(rf"({'|'.join(map(re.escape, sorted(texts)))})\s*\Z")

    def text(self, content: str) -> str:
        """An answer without the end-of-turn text that it may already have, because the token is added once.

        Raises:
            BadRow: it starts with BOS or, where a chat template ends the turn, ends with another token's text.
        """
        while (stripped := content.rstrip()).endswith(self._end.text):
            content = stripped.removesuffix(self._end.text)
        if self._bos and content.lstrip().startswith(self._bos):
            raise BadRow(f"an answer starts with {self._bos!r}, which starts a text: leave it out")
        # Without a template, text is used as it is. In HTML, </s> closes what <s> opens.
        found = self._unexpected.search(content) if self._has_template else None
        if found and not (found[1] == "</s>" and "<s>" in content):
            raise BadRow(f"an answer ends with {found[1]!r}, which ends no turn in this chat template: leave it out")
        return content


def check_not_empty(answer: str) -> None:
    """Refuse an answer that holds nothing but white space."""
    if not answer.strip():
        raise BadRow("empty response")
