"""The interface of sampling engines, and the engine on transformers' ``generate``."""

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

from simpo.data.chat_template import end_of_turn
from simpo.errors import SimpoError
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.packing.images import forward_inputs
from simpo.packing.layout import ImageTensors
from simpo.packing.model import causal_lm, prepare_policy, state_of
from simpo.packing.rounding import computes_in, precision, rounding_tolerance

logger = logging.getLogger(__name__)

# Keys of a checkpoint's generation configuration that the settings replace or that do not change what is sampled.
_HARMLESS_KEYS = {
    "do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens",
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "cache_implementation", "trust_remote_code",
}  # fmt: skip

Images = tuple[ImageTensors, ...]

# The prompts that share a batch: all, those of equal length, or none.
Batching = Literal["all", "equal", "none"]


class Sampled(NamedTuple):
    """One sampled response."""

    ids: list[int]  # its tokens, including the one that ended it
    finished: bool  # whether it ended; False if `max_new_tokens` was reached
    # Sum over `ids` of the model's own log-probabilities (temperature 1, no token excluded), in nats; None if it was
    # not computed.
    logp: float | None


class Engine(Protocol):
    """A model to sample from, in memory or in an inference engine."""

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """One response to every prompt, in the order of the prompts.

        Args:
            prompts: token ids, with BOS and assistant header; the same prompt may occur several times.
            settings: resolved settings.
            seed: together with prompts and settings, determines the responses.
            images: the images of each prompt; nothing if none has any.
        """
        ...


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end a response: the template's end of turn, EOS, and those that the checkpoint names."""
    named = getattr(generation_config, "eos_token_id", None)
    found = {end_of_turn(tokenizer).token_id, tokenizer.eos_token_id}
    found |= set(named) if isinstance(named, list) else {named}
    return sorted(token_id for token_id in found if token_id is not None)


class TransformersEngine:
    """Samples from a model in memory, also one in training, and leaves it as it was.

    ``model`` may have a peft adapter; the ``tokenizer`` must have a token that ends a response.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._batching: Batching | None = None
        self._reported = False
        self._padding_limit = _padding_limit(model)
        self.stop_ids = stop_ids(tokenizer, model.generation_config)
        self._pad_id = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if ignored := ignored_settings(model.generation_config):
            logger.warning("the checkpoint's generation settings are not used: %s", ", ".join(ignored))

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """One response to every prompt; see :class:`Engine`.

        Every response is the one that its prompt alone would get. Where padding or other prompts would change it, which
        is checked once and reported, a batch has prompts of equal length, or one prompt. If some have images,
        every prompt has a batch of its own.
        """
        assert settings.max_new_tokens is not None
        groups = [[index] for index in range(len(prompts))]
        if not any(images):
            groups = self._groups([len(prompt) for prompt in prompts], settings.max_new_tokens)
        found: list[Sampled] = [Sampled([], False, None)] * len(prompts)
        for number, group in enumerate(groups):
            own_seed = seed if len(groups) == 1 else derived_seed(seed, number)
            own = images[group[0]] if any(images) else ()
            new, logps = self._recorded([prompts[index] for index in group], settings, own_seed, images=own)
            for index, row, row_logps in zip(group, new.tolist(), logps.tolist(), strict=True):
                ids, finished = self._cut_at_stop(row)
                found[index] = Sampled(ids, finished, sum(row_logps[: len(ids)]))
        return found

    def stream(self, prompt: list[int], settings: SamplingSettings, seed: int, **options: Any) -> Sampled:
        """One response, without its log-probability; ``options`` are ``streamer`` and ``stopping_criteria``."""
        new = self._new_tokens([prompt], settings, seed, **options)
        return Sampled(*self._cut_at_stop(new[0].tolist()), logp=None)

    def _recorded(
        self,
        prompts: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        *processors: LogitsProcessor,
        images: Images = (),
    ) -> tuple[Tensor, Tensor]:
        """``[B, N]`` new tokens and their log-probabilities under the model; with ``images``, of a single prompt."""
        recorder = _Recorder()
        processing = LogitsProcessorList([recorder, *processors])
        given = forward_inputs(causal_lm(self.model), torch.tensor(prompts), images) if images else {}
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        new = self._new_tokens(prompts, settings, seed, logits_processor=processing, **given)
        return new, recorder.finish(new)

    def _new_tokens(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, **options: Any
    ) -> Tensor:
        """``[B, N]`` the tokens after the prompts, with padding at the end."""
        device = next(self.model.parameters()).device
        ids, mask = pad_left(prompts, self._pad_id)
        drawn: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        configuration = GenerationConfig(
            do_sample=not settings.greedy,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self._pad_id,
            **({} if settings.greedy else drawn),
        )
        with _sampling_mode(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            if getattr(causal_lm(self.model), "_is_stateful", False):
                # Some recurrent models keep the state of the last answer in their modules; this resets it.
                with torch.no_grad():
                    self.model(input_ids=ids[:1, -1:].to(device), use_cache=False)
            try:
                found = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=configuration,
                    synced_gpus=False,  # every rank has whole weights, and generates as often as its prompts require
                    **options,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise SimpoError(
                    f"{self.model.name_or_path}: its logits are not finite; its weights are damaged, "
                    "or need another dtype"
                ) from error
        return found[:, ids.shape[1] :].cpu()

    def _cut_at_stop(self, ids: list[int]) -> tuple[list[int], bool]:
        """A row up to and including the token that ended it, and whether there is one."""
        end = next((number for number, token_id in enumerate(ids, start=1) if token_id in self.stop_ids), None)
        return ids[:end], end is not None

    # ---- which prompts share a batch ----

    def _groups(self, lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """The indices of the prompts of every batch."""
        if len(lengths) == 1:
            return [[0]]
        if self._batching is None:
            self._batching, reason = self._check_batching()
            self._report(self._batching, reason)
        if self._batching == "none":
            return [[index] for index in range(len(lengths))]
        reach, kinds = max(lengths) + max_new_tokens, sorted(set(lengths))
        if self._batching == "equal" or (reach > self._padding_limit and len(kinds) > 1):
            self._report("equal", f"beyond {self._padding_limit} tokens its attention depends on padding")
            return [[index for index, size in enumerate(lengths) if size == length] for length in kinds]
        return [list(range(len(lengths)))]

    def _report(self, batching: Batching, reason: str) -> None:
        """Log once why not all prompts share a batch."""
        if batching != "all" and not self._reported:
            how = "in groups of equal length" if batching == "equal" else "one at a time"
            logger.warning("%s: %s: prompts are generated from %s", type(causal_lm(self.model)).__name__, reason, how)
            self._reported = True

    def _check_batching(self) -> tuple[Batching, str]:
        """Compare the log-probabilities of a batch with those of each prompt alone.

        The prompts are random tokens with a fixed seed, so that the outcome is the same for every part of a run.
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

        dtype, device = computes_in(self.model), self.model.device
        with precision(device, autocast=torch.is_autocast_enabled(device.type)):
            alone = torch.cat([logps([prompt]) for prompt in prompts])
            # Two prompts of equal length need no padding: what differs is rounding, unless other prompts matter.
            rounding = (logps(prompts[:2]) - alone[:2]).abs().max().item()
            padded = (logps(prompts) - alone).abs().max().item()
        if not rounding <= min(1.0, 100 * rounding_tolerance(0.0, dtype)):
            return "none", f"other prompts in a batch change its log-probabilities by {rounding:.2g}"
        if not padded <= min(1.0, rounding_tolerance(rounding, dtype)):
            return "equal", f"padding changes its log-probabilities by {padded:.2g}"
        return "all", ""


def _padding_limit(model: PreTrainedModel) -> float:
    """Tokens up to which padding changes nothing, by the configuration; a check with short prompts would not show it.

    Beyond it, rotary frequencies depend on the length, for which some models discard their cache, or chunks of
    attention start where the padding puts them.
    """
    rule = state_of(prepare_policy(model)).lengths
    config = causal_lm(model).config.get_text_config()
    limits = [getattr(config, "attention_chunk_size", None), getattr(config, "floor_scale", None)]
    if rule is not None:
        limits += [*rule.borders, rule.growth, getattr(config, "original_max_position_embeddings", None)]
    return min((limit for limit in limits if limit), default=float("inf"))


def ignored_settings(generation_config: GenerationConfig | None) -> list[str]:
    """Settings of a checkpoint that would change what is sampled but are not used, as ``key value``."""
    if generation_config is None:
        return []
    return [f"{key} {value}" for key, value in generation_config.to_diff_dict().items() if key not in _HARMLESS_KEYS]


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """``[B, L]`` token ids with padding on the left, and the mask that is 0 there."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, without the model's own generation settings, which ``generate`` would merge into ours."""
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
    """Keeps the log-probability of every drawn token, and those of the whole vocabulary for one step only.

    ``generate`` calls given processors before temperature, top-k and top-p, so the scores are the model's own.
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
        """``[B, N]`` log-probabilities of the tokens ``new``; ``generate`` may have run one step further."""
        if len(self._chosen) < new.shape[1]:
            self._choose(new[:, -1])
        return torch.stack(self._chosen[: new.shape[1]], dim=1).cpu()

    def _choose(self, tokens: Tensor) -> None:
        assert self._last is not None
        self._chosen.append(self._last.gather(1, tokens.to(self._last.device)[:, None]).squeeze(1))


class _Forced(LogitsProcessor):
    """Makes every row continue with the same tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, next(self._tokens)] = 0
        return forced
