"""Sampling from a model during training: from the weights in memory, or with vLLM, which reads them from files."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from simpo.errors import SimpoError
from simpo.generation.chunks import gather, missing_chunks, sample_chunks
from simpo.generation.engine import Engine, Images, Sampled, stop_ids
from simpo.generation.settings import SamplingSettings
from simpo.generation.vllm import VllmEngine, import_vllm
from simpo.models.devices import free_memory, from_main
from simpo.models.merging import write_merged
from simpo.models.settings import ModelArguments
from simpo.packing.rounding import computes_in
from simpo.runs.files import provisional, remove_folder, staged_folder
from simpo.training.checkpoints import shared_staging
from simpo.training.packed import PackedTrainer
from simpo.training.sharding import whole_weights

logger = logging.getLogger(__name__)

# Prefixes of the variables in which a launcher (torchrun, accelerate launch) passes a process its rank.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def sample_answers(
    trainer: PackedTrainer,
    engine: Engine,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    images: Callable[[int], Images] | None = None,
) -> list[list[Sampled]]:
    """The answers to every prompt, on every rank; the ranks share the work, and all must call.

    ``prompts`` are token ids, ``images`` as in :func:`~simpo.generation.chunks.sample_chunks`, and ``engine`` holds the
    trainer's model. If the weights are sharded, every rank has all of them meanwhile.
    """
    config = trainer.args
    share = missing_chunks(prompts, settings)[config.process_index :: config.world_size]
    # Layers were compiled for training, and would be compiled again for every length of the growing cache.
    eager = torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()
    with whole_weights(trainer.model, trainer.accelerator), trainer.accelerator.autocast(), eager:
        records = list(sample_chunks(engine, prompts, settings, share, images))
    return gather(records if config.world_size == 1 else gather_object(records), len(prompts))


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Judges and models may draw or seed random numbers without effect on the training."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


# ---- vLLM, which the main process starts, and to which it hands over the current weights before every sampling.

# Nats a token by which log-probabilities may differ: right after a start (in bf16, rounding is about a hundredth), and
# when other weights have been loaded since, as a multiple of that and a sum.
_LARGEST_GAP, _TIMES, _PLUS = 0.1, 10, 1e-5


class VllmSampler:
    """Runs vLLM alongside training: the main process writes the weights to ``folder``, and vLLM loads them and samples.

    ``trainer`` has an :class:`~simpo.training.configs.OnlineConfig`, and ``loading`` is how its model was loaded. The
    files are the policy's whole weights, also where they are sharded, with an adapter merged into them; they are
    removed when vLLM has read them. vLLM is started once and loads later weights in place, unless that proves wrong.

    Raises:
        SimpoError: vLLM is not installed, has no such arguments or cannot start, or the model is one in 4 bits.
    """

    def __init__(self, trainer: PackedTrainer, loading: ModelArguments | None, folder: Path) -> None:
        self._trainer, self._loading, self._folder = trainer, loading or ModelArguments(""), folder
        self._engine: VllmEngine | None = None
        self._fresh, self._reloads, self._rounding = True, True, 0.0  # the same on all ranks
        self._arguments: dict[str, Any] = {"max_model_len": trainer.args.max_length, **trainer.args.vllm_arguments()}
        if "enable_sleep_mode" in self._arguments:
            raise SimpoError("engine_args: enable_sleep_mode: vLLM is awake all the time; lower gpu_memory_utilization")
        if getattr(trainer.model, "is_loaded_in_4bit", False):
            raise SimpoError("engine: vllm gets whole weights, not those in 4 bits; use transformers")
        if trainer.is_world_process_zero():
            import_vllm(self._arguments)

    def sample(self, prompts: Sequence[list[int]], settings: SamplingSettings) -> list[list[Sampled]]:
        """The answers of the current weights to every prompt, on every rank; all must call."""
        self._write_weights()
        found: Any = None
        if self._trainer.is_world_process_zero():
            self._load_weights()
            assert self._engine is not None
            found = list(sample_chunks(self._engine, prompts, settings, missing_chunks(prompts, settings)))
        return gather(from_main(found), len(prompts))

    def accepts(self, samples: Sequence[Sequence[Sampled]], logps: Sequence[Sequence[Sequence[float]]]) -> bool:
        """Whether the last answers come from the current weights; if not, the next sampling starts a new vLLM.

        ``logps`` are log-probabilities of the tokens by the policy. Raises :class:`SimpoError` if it was a new one.
        """
        gap = engine_gap(logps, [[one.logp for one in answers] for answers in samples])
        if self._fresh:
            if gap > _LARGEST_GAP:
                raise SimpoError(
                    f"engine: vLLM's log-probabilities differ from the policy's by {gap:.2g} nats a token, so that it "
                    "samples from something else; use engine: transformers"
                )
            self._rounding, self._fresh = gap, not self._reloads
            return True
        if gap <= _TIMES * self._rounding + _PLUS:
            return True
        logger.warning(
            "engine: vLLM has not taken over all weights (its log-probabilities differ by %.2g nats a token, after a "
            "start by %.2g): it is started anew for every rollout",
            gap,
            self._rounding,
        )
        self._fresh, self._reloads = True, False
        return False

    def _write_weights(self) -> None:
        trainer, main = self._trainer, self._trainer.is_world_process_zero()
        adapter = self._folder.with_name("adapter") if isinstance(trainer.model, PeftModel) else None
        first = adapter or self._folder
        for left in {first, self._folder}:  # by a killed process
            if main and left.exists():
                remove_folder(left)
        wait = trainer.accelerator.wait_for_everyone
        with shared_staging(staged_folder(first), provisional(first), main=main, wait=wait) as staging:
            trainer.save_model(str(staging))
        if adapter is not None and main:
            kind = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
            write_merged(self._named(adapter, kind), self._folder)
            remove_folder(adapter)

    def _load_weights(self) -> None:
        """Start vLLM with the weights in the files, or let it read them."""
        if self._engine is not None and not self._fresh:
            self._engine.reload(self._folder)
        else:
            self._engine = None
            model: Any = self._trainer.model
            with self._trainer.accelerator.autocast():
                kind = str(computes_in(model)).removeprefix("torch.")
            stops = stop_ids(self._trainer.processing_class, model.generation_config)
            free_memory()  # which ends the one before; vLLM measures what is left
            with _outside_the_launch():
                self._engine = VllmEngine(self._named(self._folder, kind), stops, self._arguments)
        remove_folder(self._folder)

    def _named(self, folder: Path, dtype: str) -> ModelArguments:
        own = self._loading
        return ModelArguments(
            str(folder), dtype=dtype, trust_remote_code=own.trust_remote_code, allow_pickle=own.allow_pickle
        )


def engine_gap(policy: Sequence[Sequence[Sequence[float]]], engine: Sequence[Sequence[float | None]]) -> float:
    """Mean difference of an answer's log-probability by policy and engine, in nats a token.

    Args:
        policy: for every prompt and answer, those of the tokens.
        engine: for every prompt, those of whole answers.
    """
    pairs = [pair for own, theirs in zip(policy, engine, strict=True) for pair in zip(own, theirs, strict=True)]
    return sum(abs(sum(own) - (theirs or 0.0)) for own, theirs in pairs) / sum(len(own) for own, _ in pairs)


@contextmanager
def _outside_the_launch() -> Iterator[None]:
    """Inside, new processes do not inherit the launcher's variables or a forked copy of this process's threads."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_LAUNCHERS)}
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork of what has computed may hang
    try:
        yield
    finally:
        os.environ.update(before)
