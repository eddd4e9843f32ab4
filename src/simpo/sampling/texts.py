"""Sampled token ids to the text that the model meant as its message."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from simpo.data.templates import end_of_turn
from simpo.thinking import marks_thinking

# Ids of the prompt that decoding needs to treat what follows them as a continuation.
_CONTEXT = 8
_SENTINEL = "\ue000response\ue000"


class ResponseText:
    """Decodes responses of one tokenizer.

    Special tokens are left out, except for those that mark thinking, which could not be told from the answer without
    them. So is the white space that the chat template itself writes before and after a
    message: rendered with the template, the text gives the sampled tokens again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        end = end_of_turn(tokenizer)
        special = {one for one in tokenizer.all_special_ids if not marks_thinking(tokenizer.convert_ids_to_tokens(one))}
        self._special = special | {end.token_id}
        self._before, self._after = _written_before(tokenizer), end.kept

    def decode(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of the response ``ids`` to ``prompt``."""
        # In its context, because a decoder may strip the space that a text starts with.
        context = list(prompt[-_CONTEXT:])
        kept = [token_id for token_id in ids if token_id not in self._special]
        text = self._text(context + kept)[len(self._text(context)) :]
        return text.removeprefix(self._before).removesuffix(self._after)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _written_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes between the prompt that generation is fed and the assistant's message."""
    if not tokenizer.chat_template:
        return ""
    user = {"role": "user", "content": "user"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": _SENTINEL}], tokenize=False)
    return whole.removeprefix(prompt).partition(_SENTINEL)[0] if whole.startswith(prompt) else ""
