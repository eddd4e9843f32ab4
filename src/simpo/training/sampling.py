"""Sampling during training: from the weights in memory, or with vLLM, which loads them from files."""

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
from simpo.packing.rounding import compute_dtype
from simpo.runs.files import provisional, remove_folder, staged_folder
from simpo.training.checkpoints import shared_staging
from simpo.training.packed import PackedTrainer
from simpo.training.sharding import whole_weights

logger = logging.getLogger(__name__)

# Prefixes of the environment variables through which a launcher (torchrun, accelerate launch) sets a process's rank.
_LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def sample_answers(
    trainer: PackedTrainer,
    engine: Engine,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    images: Callable[[int], Images] | None = None,
) -> list[list[Sampled]]:
    """Sample answers to every prompt and return them on every rank. Every rank must call this; each samples a share.

    ``prompts`` are token ids, ``images`` as in :func:`~simpo.generation.chunks.sample_chunks`, and ``engine`` holds the
    trainer's model. Sharded weights are gathered on every rank in the meantime.
    """
    config = trainer.args
    share = missing_chunks(prompts, settings)[config.process_index :: config.world_size]
    # Layers compiled for training would be recompiled for every length of the growing cache.
    eager = torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()
    with whole_weights(trainer.model, trainer.accelerator), trainer.accelerator.autocast(), eager:
        records = list(sample_chunks(engine, prompts, settings, share, images))
    return gather(records if config.world_size == 1 else gather_object(records), len(prompts))


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Let judges and models draw or seed random numbers without affecting training."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


# ---- vLLM, started by the main process, which hands it the current weights before every round of sampling.

# By how many nats per token log-probabilities may differ from the policy's: right after a start (bf16 rounding is about
# 0.01), and after a reload at most this multiple of the difference at the start, plus a constant.
_MAX_START_GAP, _GAP_FACTOR, _GAP_SLACK = 0.1, 10, 1e-5


class VllmSampler:
    """Runs vLLM alongside training: the main process writes the weights to ``folder``, and vLLM loads them and samples.

    ``trainer`` has an :class:`~simpo.training.configs.OnlineConfig`, and ``loading`` is how its model was loaded. The
    files contain the policy's full weights, gathered if sharded and with any adapter merged; they are deleted once vLLM
    has read them. vLLM is started once and then reloads weights in place, unless reloading turns out not to work.

    Raises:
        SimpoError: vLLM is not installed, rejects the arguments or cannot start, or the model is quantized to 4 bits.
    """

    def __init__(self, trainer: PackedTrainer, loading: ModelArguments | None, folder: Path) -> None:
        self._trainer, self._loading, self._folder = trainer, loading or ModelArguments(""), folder
        self._engine: VllmEngine | None = None
        self._fresh, self._reloads, self._rounding = True, True, 0.0  # the same on all ranks
        self._arguments: dict[str, Any] = {"max_model_len": trainer.args.max_length, **trainer.args.vllm_arguments()}
        if "enable_sleep_mode" in self._arguments:
            raise SimpoError("engine_args: enable_sleep_mode: not supported; lower gpu_memory_utilization instead")
        if getattr(trainer.model, "is_loaded_in_4bit", False):
            raise SimpoError("engine: vllm cannot sample from a model in 4 bits during training; use transformers")
        if trainer.is_world_process_zero():
            import_vllm(self._arguments)

    def sample(self, prompts: Sequence[list[int]], settings: SamplingSettings) -> list[list[Sampled]]:
        """Sample answers from the current weights and return them on every rank. Every rank must call this."""
        self._write_weights()
        records: Any = None
        if self._trainer.is_world_process_zero():
            self._load_weights()
            assert self._engine is not None
            records = list(sample_chunks(self._engine, prompts, settings, missing_chunks(prompts, settings)))
        return gather(from_main(records), len(prompts))

    def accepts(self, samples: Sequence[Sequence[Sampled]], logps: Sequence[Sequence[Sequence[float]]]) -> bool:
        """Return whether the last answers come from the current weights; if not, restart vLLM for the next ones.

        ``logps`` are the policy's token log-probabilities. If vLLM was just started, raise :class:`SimpoError` instead.
        """
        gap = engine_gap(logps, [[one.logp for one in answers] for answers in samples])
        if self._fresh:
            if gap > _MAX_START_GAP:
                raise SimpoError(
                    f"engine: vLLM's log-probabilities differ from the policy's by {gap:.2g} nats per token, so it "
                    "does not sample from the policy; use engine: transformers"
                )
            self._rounding, self._fresh = gap, not self._reloads
            return True
        if gap <= _GAP_FACTOR * self._rounding + _GAP_SLACK:
            return True
        logger.warning(
            "engine: vLLM did not reload all weights (its log-probabilities differ by %.2g nats per token, but by %.2g "
            "after a start); restarting it for every rollout from now on",
            gap,
            self._rounding,
        )
        self._fresh, self._reloads = True, False
        return False

    def _write_weights(self) -> None:
        trainer, main = self._trainer, self._trainer.is_world_process_zero()
        adapter = self._folder.with_name("adapter") if isinstance(trainer.model, PeftModel) else None
        first = adapter or self._folder
        for leftover in {first, self._folder}:  # of a killed process
            if main and leftover.exists():
                remove_folder(leftover)
        wait = trainer.accelerator.wait_for_everyone
        with shared_staging(staged_folder(first), provisional(first), main=main, wait=wait) as staging:
            trainer.save_model(str(staging))
        if adapter is not None and main:
            kind = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
            write_merged(self._model_arguments(adapter, kind), self._folder)
            remove_folder(adapter)

    def _load_weights(self) -> None:
        """Start vLLM with the weights in the folder, or let a running one reload them."""
        if self._engine is not None and not self._fresh:
            self._engine.reload(self._folder)
        else:
            self._engine = None
            model: Any = self._trainer.model
            with self._trainer.accelerator.autocast():
                kind = str(compute_dtype(model)).removeprefix("torch.")
            stops = stop_ids(self._trainer.processing_class, model.generation_config)
            free_memory()  # ends the previous vLLM; a new one measures how much memory is free
            with _without_launcher_environment():
                self._engine = VllmEngine(self._model_arguments(self._folder, kind), stops, self._arguments)
        remove_folder(self._folder)

    def _model_arguments(self, folder: Path, dtype: str) -> ModelArguments:
        loading = self._loading
        return ModelArguments(
            str(folder), dtype=dtype, trust_remote_code=loading.trust_remote_code, allow_pickle=loading.allow_pickle
        )


def engine_gap(policy: Sequence[Sequence[Sequence[float]]], engine: Sequence[Sequence[float | None]]) -> float:
    """Return the mean absolute difference of answers' log-probabilities, policy and engine, in nats per token.

    Args:
        policy: log-probabilities of the tokens, by prompt and answer.
        engine: log-probabilities of whole answers, by prompt.
    """
    pairs = [pair for ours, theirs in zip(policy, engine, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(abs(sum(ours) - (theirs or 0.0)) for ours, theirs in pairs) / sum(len(ours) for ours, _ in pairs)


@contextmanager
def _without_launcher_environment() -> Iterator[None]:
    """Keep new processes from inheriting the launcher's variables or a forked copy of this process's threads."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_LAUNCHER_PREFIXES)}
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # forking after torch has computed may hang
    try:
        yield
    finally:
        os.environ.update(before)
