"""The sampling engine interface, and its implementation with transformers' ``generate``."""

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
from simpo.packing.rounding import compute_dtype, precision, rounding_tolerance

logger = logging.getLogger(__name__)

# Keys of a checkpoint's generation configuration that our settings replace or that do not affect sampling.
_HARMLESS_KEYS = {
    "do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens",
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "cache_implementation", "trust_remote_code",
}  # fmt: skip

Images = tuple[ImageTensors, ...]

# Which prompts can share a batch: all, only those of equal length, or none.
Batching = Literal["all", "equal", "none"]


class Sampled(NamedTuple):
    """One sampled response."""

    ids: list[int]  # its tokens, including the stop token
    finished: bool  # whether it ended with a stop token; False if it reached `max_new_tokens`
    # Sum of log-probabilities of `ids` in nats, at temperature 1 and over the full vocabulary; None if not computed.
    logp: float | None


class Engine(Protocol):
    """Anything that samples responses: a model in memory, or an inference engine."""

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """Sample one response per prompt, in the same order.

        Args:
            prompts: token ids, including BOS and the assistant header; duplicates are allowed.
            settings: resolved settings.
            seed: random seed; the same seed, prompts and settings give the same responses.
            images: the images of each prompt; empty if no prompt has any.
        """
        ...


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Return the tokens that end a response: the template's end of turn, EOS, and those the checkpoint names."""
    named = getattr(generation_config, "eos_token_id", None)
    candidates = {end_of_turn(tokenizer).token_id, tokenizer.eos_token_id}
    candidates |= set(named) if isinstance(named, list) else {named}
    return sorted(token_id for token_id in candidates if token_id is not None)


class TransformersEngine:
    """Samples from a model in memory, without side effects on it, even while it is being trained.

    ``model`` may have a peft adapter; ``tokenizer`` must have a token that ends a response.
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
            logger.warning("ignoring the checkpoint's generation settings: %s", ", ".join(ignored))

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """Sample one response per prompt; see :class:`Engine`.

        Batching never changes log-probabilities: if padding or other prompts would affect them, which is checked once
        and reported, a batch holds only prompts of equal length, or a single one. With images, every prompt gets its
        own batch.
        """
        assert settings.max_new_tokens is not None
        groups = [[index] for index in range(len(prompts))]
        if not any(images):
            groups = self._groups([len(prompt) for prompt in prompts], settings.max_new_tokens)
        responses: list[Sampled] = [Sampled([], False, None)] * len(prompts)
        for number, group in enumerate(groups):
            batch_seed = seed if len(groups) == 1 else derived_seed(seed, number)
            shown = images[group[0]] if any(images) else ()
            new, logps = self._new_tokens_and_logps(
                [prompts[index] for index in group], settings, batch_seed, images=shown
            )
            for index, row, row_logps in zip(group, new.tolist(), logps.tolist(), strict=True):
                ids, finished = self._truncate_at_stop(row)
                responses[index] = Sampled(ids, finished, sum(row_logps[: len(ids)]))
        return responses

    def stream(self, prompt: list[int], settings: SamplingSettings, seed: int, **options: Any) -> Sampled:
        """Sample one response without its log-probability; ``options`` are ``streamer`` and ``stopping_criteria``."""
        new = self._new_tokens([prompt], settings, seed, **options)
        return Sampled(*self._truncate_at_stop(new[0].tolist()), logp=None)

    def _new_tokens_and_logps(
        self,
        prompts: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        *processors: LogitsProcessor,
        images: Images = (),
    ) -> tuple[Tensor, Tensor]:
        """Return ``[B, N]`` new tokens and their log-probabilities; ``images`` are those of a single prompt."""
        recorder = _LogpRecorder()
        processing = LogitsProcessorList([recorder, *processors])
        given = forward_inputs(causal_lm(self.model), torch.tensor(prompts), images) if images else {}
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        new = self._new_tokens(prompts, settings, seed, logits_processor=processing, **given)
        return new, recorder.finish(new)

    def _new_tokens(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, **options: Any
    ) -> Tensor:
        """Return the generated tokens ``[B, N]``, padded on the right."""
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
                # Some recurrent models keep the previous answer's state in their modules; this resets it.
                with torch.no_grad():
                    self.model(input_ids=ids[:1, -1:].to(device), use_cache=False)
            try:
                output = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=configuration,
                    synced_gpus=False,  # ranks have full weights and may generate a different number of tokens
                    **options,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise SimpoError(
                    f"{self.model.name_or_path}: its logits are not finite; the weights are damaged, "
                    "or need another dtype"
                ) from error
        return output[:, ids.shape[1] :].cpu()

    def _truncate_at_stop(self, ids: list[int]) -> tuple[list[int], bool]:
        """Truncate a row after its first stop token, and return whether there was one."""
        end = next((number for number, token_id in enumerate(ids, start=1) if token_id in self.stop_ids), None)
        return ids[:end], end is not None

    # ---- Which prompts can share a batch.

    def _groups(self, lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Split prompts with the given lengths into batches of indices."""
        if len(lengths) == 1:
            return [[0]]
        if self._batching is None:
            self._batching, reason = self._check_batching()
            self._report(self._batching, reason)
        if self._batching == "none":
            return [[index] for index in range(len(lengths))]
        longest, distinct = max(lengths) + max_new_tokens, sorted(set(lengths))
        if self._batching == "equal" or (longest > self._padding_limit and len(distinct) > 1):
            self._report("equal", f"beyond {self._padding_limit} tokens its attention depends on padding")
            return [[index for index, other in enumerate(lengths) if other == length] for length in distinct]
        return [list(range(len(lengths)))]

    def _report(self, batching: Batching, reason: str) -> None:
        """Log once why not all prompts can share a batch."""
        if batching != "all" and not self._reported:
            how = "in batches of equal length" if batching == "equal" else "one at a time"
            logger.warning("%s: %s: prompts are processed %s", type(causal_lm(self.model)).__name__, reason, how)
            self._reported = True

    def _check_batching(self) -> tuple[Batching, str]:
        """Compare log-probabilities in a batch with those of each prompt alone, and explain the decision.

        The prompts are random tokens with a fixed seed, so that every process and every resumed run decides the same.
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
            """Return the log-probabilities ``[B, N]`` of a fixed answer to each prompt."""
            settings = SamplingSettings(temperature=0.0, max_new_tokens=count)
            return self._new_tokens_and_logps(prompts, settings, 0, _ForcedTokens(answer))[1]

        dtype, device = compute_dtype(self.model), self.model.device
        with precision(device, autocast=torch.is_autocast_enabled(device.type)):
            alone = torch.cat([logps([prompt]) for prompt in prompts])
            # Two prompts of equal length need no padding, so any difference is rounding unless neighbors matter.
            rounding = (logps(prompts[:2]) - alone[:2]).abs().max().item()
            padded = (logps(prompts) - alone).abs().max().item()
        if not rounding <= min(1.0, 100 * rounding_tolerance(0.0, dtype)):
            return "none", f"other prompts in the batch change its log-probabilities by {rounding:.2g}"
        if not padded <= min(1.0, rounding_tolerance(rounding, dtype)):
            return "equal", f"padding changes its log-probabilities by {padded:.2g}"
        return "all", ""


def _padding_limit(model: PreTrainedModel) -> float:
    """Return the length in tokens up to which padding has no effect, according to the model's configuration.

    Beyond it, rotary frequencies depend on the length (some models then discard their cache), or padding shifts the
    boundaries of attention chunks. A check with short prompts would not reveal this.
    """
    rule = state_of(prepare_policy(model)).lengths
    config = causal_lm(model).config.get_text_config()
    limits = [getattr(config, "attention_chunk_size", None), getattr(config, "floor_scale", None)]
    if rule is not None:
        limits += [*rule.thresholds, rule.dynamic_above, getattr(config, "original_max_position_embeddings", None)]
    return min((limit for limit in limits if limit), default=float("inf"))


def ignored_settings(generation_config: GenerationConfig | None) -> list[str]:
    """List the checkpoint's settings that would affect sampling but are not used, as ``key value``."""
    if generation_config is None:
        return []
    return [f"{key} {value}" for key, value in generation_config.to_diff_dict().items() if key not in _HARMLESS_KEYS]


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left; returns token ids and the attention mask, both ``[B, L]``."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch to evaluation mode and hide the model's generation config, which ``generate`` would merge into ours."""
    owners = {id(owner): owner for owner in (model, causal_lm(model))}.values()
    originals = [owner.generation_config for owner in owners]
    training = model.training
    model.eval()
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, configuration in zip(owners, originals, strict=True):
            owner.generation_config = configuration
        model.train(training)


class _LogpRecorder(LogitsProcessor):
    """Records the log-probability of every sampled token, storing the full vocabulary for one step only.

    ``generate`` runs custom processors before temperature, top-k and top-p, so the scores are the model's own.
    """

    def __init__(self) -> None:
        self._next_logps: Tensor | None = None  # [B, V], for the next token
        self._recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._next_logps is not None:
            self._record(input_ids[:, -1])
        self._next_logps = torch.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return scores

    def finish(self, new: Tensor) -> Tensor:
        """Return the log-probabilities ``[B, N]`` of the tokens ``new``; ``generate`` may have run one extra step."""
        if len(self._recorded) < new.shape[1]:
            self._record(new[:, -1])
        return torch.stack(self._recorded[: new.shape[1]], dim=1).cpu()

    def _record(self, tokens: Tensor) -> None:
        assert self._next_logps is not None
        self._recorded.append(self._next_logps.gather(1, tokens.to(self._next_logps.device)[:, None]).squeeze(1))


class _ForcedTokens(LogitsProcessor):
    """Forces every row to continue with the same tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, next(self._tokens)] = 0
        return forced
