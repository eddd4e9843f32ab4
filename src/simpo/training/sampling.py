"""Answers of a model while it is trained, without effect on the training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate.utils import gather_object

from simpo.generation.chunks import gather, missing_chunks, sample_chunks
from simpo.generation.engine import Engine, Images, Sampled
from simpo.generation.settings import SamplingSettings
from simpo.training.packed import PackedTrainer
from simpo.training.sharding import whole_weights


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
