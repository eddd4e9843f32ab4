"""The protocol of sampling engines, texts of token ids, and the engine on transformers' ``generate``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from simpo.data.templates import end_of_turn
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.generation.thinking import marks_thinking
from simpo.packing.model import causal_lm, prepare_policy, state_of
from simpo.packing.selfcheck import computes_in, rounding_tolerance

# ---- What generates: prompts as token ids in, sampled token ids out.


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


logger = logging.getLogger(__name__)


# Keys of a checkpoint's generation configuration that the settings replace or that do not change what is sampled.
_OURS = {"do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens"}


_OURS |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"}


_OURS |= {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}


_OURS |= {"cache_implementation", "trust_remote_code"}


# Which prompts are generated from together: all, those of equal length, or none.
Together = Literal["all", "equal", "none"]


class TransformersEngine:
    """Samples from a model in memory, trained or not; the model is left as it was.

    Args:
        model: a causal language model of transformers, possibly with a peft adapter; also one in training.
        tokenizer: its tokenizer, with the chat template whose end-of-turn token ends a response.

    Raises:
        SimpoError: nothing ends a response.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._together: Together | None = None
        self._reported = False
        self._border = _border(model)
        self.stop_ids = stop_ids(tokenizer, model.generation_config)
        self._pad_id = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if ignored := ignored_settings(model.generation_config):
            logger.warning("the checkpoint's generation settings are not used: %s", ", ".join(ignored))

    def generate(self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int) -> list[Sampled]:
        """One response to every prompt; see :class:`simpo.generation.engine.Engine`.

        The responses are those of every prompt by itself: where padding or other prompts would change them, prompts of
        equal length are generated from together, or each alone, which is checked once and reported.
        """
        assert settings.max_new_tokens is not None
        groups = self._groups([len(prompt) for prompt in prompts], settings.max_new_tokens)
        found: list[Sampled] = [Sampled([], False, None)] * len(prompts)
        for number, group in enumerate(groups):
            own = seed if len(groups) == 1 else derived_seed(seed, number)
            for place, sampled in zip(group, self._generate([prompts[i] for i in group], settings, own), strict=True):
                found[place] = sampled
        return found

    def _generate(self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int) -> list[Sampled]:
        new, logps = self._recorded(prompts, settings, seed)
        ended = [self._until_stop(ids) for ids in new.tolist()]
        return [
            Sampled(ids, finished, sum(row[: len(ids)]))
            for (ids, finished), row in zip(ended, logps.tolist(), strict=True)
        ]

    def _recorded(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *processors: LogitsProcessor
    ) -> tuple[Tensor, Tensor]:
        """``[B, N]`` new tokens and their log-probabilities under the model."""
        recorder = _Recorder()
        processing = LogitsProcessorList([recorder, *processors])
        new = self._new_tokens(prompts, settings, seed, logits_processor=processing)
        return new, recorder.finish(new)

    # ---- which prompts are generated from together ----

    def _groups(self, lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Numbers of the prompts with these ``lengths`` that are generated from together."""
        if len(lengths) == 1:
            return [[0]]
        if self._together is None:
            self._together, reason = self._check()
            self._report(self._together, reason)
        if self._together == "none":
            return [[number] for number in range(len(lengths))]
        reach, kinds = max(lengths) + max_new_tokens, sorted(set(lengths))
        if self._together == "equal" or (reach > self._border and len(kinds) > 1):
            self._report("equal", f"beyond {self._border} tokens its attention depends on padding")
            return [[n for n, size in enumerate(lengths) if size == length] for length in kinds]
        return [list(range(len(lengths)))]

    def _report(self, together: Together, reason: str) -> None:
        """Say once why prompts are not all generated from together."""
        if together != "all" and not self._reported:
            how = "in groups of equal length" if together == "equal" else "one at a time"
            logger.warning("%s: %s: prompts are generated from %s", type(causal_lm(self.model)).__name__, reason, how)
            self._reported = True

    def _check(self) -> tuple[Together, str]:
        """Compare generation for several prompts with that for each alone: which prompts can go together, and why.

        The prompts are made up, so that the answer is the same for every part of a run.
        """
        config = causal_lm(self.model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 128
        count = min(8, max(1, context // 4))
        longest = max(1, min(64, context - count))
        ids = set(self._tokenizer.get_vocab().values()) - set(self._tokenizer.added_tokens_decoder)
        ordinary = sorted(ids & set(range(config.vocab_size))) or list(range(config.vocab_size))
        answer, *prompts = np.random.default_rng(0).choice(ordinary, (3, max(longest, count))).tolist()
        prompts = [prompts[0][:longest], prompts[1][:longest], prompts[0][: 1 + longest // 12]]

        def logps(prompts: Sequence[list[int]]) -> Tensor:
            """``[B, N]`` of the answer's first tokens after each prompt."""
            settings = SamplingSettings(temperature=0.0, max_new_tokens=count)
            return self._recorded(prompts, settings, 0, _Forced(answer))[1]

        alone = torch.cat([logps([prompt]) for prompt in prompts])
        dtype = computes_in(self.model)
        rounding = (logps(prompts[:2]) - alone[:2]).abs().max().item()
        if not rounding <= min(1.0, 100 * rounding_tolerance(0.0, dtype)):
            return "none", f"other prompts in a batch change its log-probabilities by {rounding:.2g}"
        padded = (logps(prompts) - alone).abs().max().item()
        if not padded <= min(1.0, rounding_tolerance(rounding, dtype)):
            return "equal", f"padding changes its log-probabilities by {padded:.2g}"
        return "all", ""

    def stream(self, prompt: list[int], settings: SamplingSettings, seed: int, **options: Any) -> Sampled:
        """One response without its log-probability, while it is generated.

        Args:
            prompt: token ids.
            settings: resolved ones.
            seed: as in :meth:`generate`.
            options: ``streamer`` and ``stopping_criteria`` of transformers' ``generate``.
        """
        new = self._new_tokens([prompt], settings, seed, **options)
        return Sampled(*self._until_stop(new[0].tolist()), logp=None)

    def _new_tokens(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, **options: Any
    ) -> Tensor:
        """``[B, N]`` what follows the prompts, filled up with padding."""
        device = next(self.model.parameters()).device
        ids, mask = left_padded(prompts, self._pad_id)
        with _sampling_mode(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            if getattr(causal_lm(self.model), "_is_stateful", False):
                with torch.no_grad():  # without a cache, so that a state left in its modules by an answer is dropped
                    self.model(input_ids=ids[:1, -1:].to(device), use_cache=False)
            found = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=self._configuration(settings),
                **options,
            )
        return found[:, ids.shape[1] :].cpu()

    def _configuration(self, settings: SamplingSettings) -> GenerationConfig:
        drawn: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        return GenerationConfig(
            do_sample=not settings.greedy,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self._pad_id,
            **({} if settings.greedy else drawn),
        )

    def _until_stop(self, ids: list[int]) -> tuple[list[int], bool]:
        """A row up to and with the token that ended it, and whether there is one."""
        end = next((place for place, token_id in enumerate(ids, start=1) if token_id in self.stop_ids), None)
        return ids[:end], end is not None


def _border(model: PreTrainedModel) -> float:
    """Tokens up to which padding changes nothing by the configuration; what no check of short prompts would show.

    Beyond it, rotary frequencies depend on the length, for which some models discard their cache, or chunks of
    attention start where the padding puts them.
    """
    rule = state_of(prepare_policy(model)).lengths
    config = causal_lm(model).config.get_text_config()
    borders = [getattr(config, "attention_chunk_size", None), getattr(config, "floor_scale", None)]
    if rule is not None:
        borders += [*rule.borders, rule.growth, getattr(config, "original_max_position_embeddings", None)]
    return min((border for border in borders if border), default=float("inf"))


def ignored_settings(generation_config: GenerationConfig | None) -> list[str]:
    """Settings of a checkpoint that would change what is sampled and are not taken over, as ``key value``."""
    if generation_config is None:
        return []
    return [f"{key} {value}" for key, value in generation_config.to_diff_dict().items() if key not in _OURS]


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """``[B, L]`` ids that end together, and the mask that is 0 on the padding before them."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and none of the model's own generation settings, which ``generate`` would merge into ours."""
    owners = {id(owner): owner for owner in (model, causal_lm(model))}.values()
    kept = [owner.generation_config for owner in owners]
    training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, configuration in zip(owners, kept, strict=True):
            owner.generation_config = configuration
        model.train(training)


class _Recorder(LogitsProcessor):
    """Keeps the log-probability of every token that was drawn, and of all others for one step only.

    ``generate`` calls processors that it is given before temperature, top-k and top-p, so the scores are the model's.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None  # [B, V] of the token that is drawn next
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._choose(input_ids[:, -1])
        self._last = torch.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return scores

    def finish(self, new: Tensor) -> Tensor:
        """``[B, N]`` log-probabilities of the tokens ``new``; ``generate`` may have run a step further."""
        if len(self._chosen) < new.shape[1]:
            self._choose(new[:, -1])
        return torch.stack(self._chosen[: new.shape[1]], dim=1).cpu()

    def _choose(self, tokens: Tensor) -> None:
        assert self._last is not None
        self._chosen.append(self._last.gather(1, tokens.to(self._last.device)[:, None]).squeeze(1))


class _Forced(LogitsProcessor):
    """Makes every row continue with the same tokens, one after the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, next(self._tokens)] = 0
        return forced


# ---- Sampled token ids to the text that the model meant as its message.


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
