"""What generates: prompts as token ids in, sampled token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from transformers import GenerationConfig, PreTrainedTokenizerBase

from simpo.data.templates import end_of_turn
from simpo.sampling.settings import SamplingSettings


class Sampled(NamedTuple):
    """One sampled response.

    Attributes:
        ids: its tokens, the one that ended it included.
        finished: whether it ended; False where ``max_new_tokens`` was hit.
        logp: sum over ``ids`` of the model's own log-probability (temperature 1, nothing left out), in nats; None where
            it was not asked for.
    """

    ids: list[int]
    finished: bool
    logp: float | None


class Engine(Protocol):
    """A model that can be sampled from."""

    def generate(self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int) -> list[Sampled]:
        """One response to every prompt, in their order.

        Args:
            prompts: token ids, BOS and assistant header included; the same prompt may occur several times.
            settings: resolved ones.
            seed: with the prompts and the settings, determines the responses.
        """
        ...


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end a response: the template's end of turn, EOS, and those that the checkpoint names.

    Raises:
        SimpoError: as :func:`simpo.data.templates.end_of_turn`.
    """
    named = getattr(generation_config, "eos_token_id", None)
    found = {end_of_turn(tokenizer).token_id, tokenizer.eos_token_id}
    found |= set(named) if isinstance(named, list) else {named}
    return sorted(token_id for token_id in found if token_id is not None)
