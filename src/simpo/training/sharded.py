"""transformers' ``Trainer`` on a model that accelerate shards with FSDP2: what it lacks, or writes in other files."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from simpo.errors import SimpoError
from simpo.models.adapters import load_adapter
from simpo.models.zero import gathered_forwards, prepare_deepspeed
from simpo.training.sharding import (
    gathered_state,
    gathered_weights,
    is_renamed,
    load_renamed,
    load_state,
    load_weights,
    settle_sharding,
    share_weights,
)


class ShardedTrainer(Trainer):
    """A ``Trainer`` that can be evaluated before it has trained and whose checkpoints are ordinary, sharded or not.

    A model that is sharded is so from the start, because a forward of the whole might not fit one device. Without FSDP
    everything is as ``Trainer`` has it.

    Raises:
        SimpoError: a kind of parallelism that is not supported, or a model that somebody has sharded already.
    """

    model: Any
    optimizer: Any
    deepspeed: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            prepare_deepspeed(self.accelerator, self.model)
        settle_sharding(self.accelerator, self.model)
        self._shards = self.accelerator.distributed_type == DistributedType.FSDP
        if self._shards:
            share_weights(self.accelerator, self.model)
            self.create_optimizer()  # FSDP2 wants both together
            model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model = self.model_wrapped = model

    def forwards(self) -> AbstractContextManager[None]:
        """Entered around forwards that may come before training, when no engine of DeepSpeed gathers weights."""
        before = self.is_deepspeed_enabled and self.deepspeed is None
        return gathered_forwards(self.model) if before else nullcontext()

    def check_engine(self, checkpoint: Path, saved_by: int) -> None:
        """Check that this run can load ``checkpoint``: DeepSpeed's have files of its own, and one set per process.

        Raises:
            SimpoError: it was saved with another engine, ZeRO stage or number of processes (``saved_by``).
        """
        theirs = any(checkpoint.glob("global_step*"))
        if theirs != self.is_deepspeed_enabled:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved {'with' if theirs else 'without'} DeepSpeed; continue "
                "it the same way, or start a new run from its weights (model_name_or_path)"
            )
        if theirs and saved_by != self.args.world_size:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved by {saved_by} processes, and DeepSpeed cannot "
                f"continue it on {self.args.world_size}; start {saved_by} processes"
            )
        zero3 = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
        if theirs and zero3 != (self.accelerator.state.deepspeed_plugin.zero_stage == 3):
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} is of another ZeRO stage; continue it with that one"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; of a sharded model with an adapter only the adapter is gathered."""
        if self._shards and isinstance(self.model, PeftModel):
            self._save(output_dir, gathered_weights(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict:  # gathered: tied weights came apart
            tied = getattr(self.model, "all_tied_weights_keys", {}).items()
            state_dict |= {name: state_dict[source] for name, source in tied if source in state_dict}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gathered_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and (Path(checkpoint) / OPTIMIZER_NAME).is_file():  # else a bare model
            folder = Path(checkpoint)
            state = torch.load(folder / OPTIMIZER_NAME, weights_only=True, map_location="cpu", mmap=True)
            load_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_by_name(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or not self._load_by_name(Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _load_by_name(self, folder: Path) -> bool:
        """Load the weights of ``folder`` if ``Trainer`` would not, or only in part; whether that was so."""
        if self._shards:
            load_weights(self.model, folder)
        elif isinstance(self.model, PeftModel):
            load_adapter(self.model, folder)
        elif is_renamed(folder, self.model):
            load_renamed(folder, self.model)
        else:
            return False
        return True
