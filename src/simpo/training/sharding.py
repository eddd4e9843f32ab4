"""A ``Trainer`` for models that FSDP2 shards or DeepSpeed partitions, whose checkpoints are ordinary files.

Because the files are ordinary, a checkpoint of any number of ranks, sharded with FSDP2 or not, continues on any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from simpo.errors import SimpoError, one_line
from simpo.models.adapters import adapter_tensors, read_adapter_tensors
from simpo.models.zero import gathered_forwards, prepare_deepspeed


class ShardedTrainer(Trainer):
    """A ``Trainer`` that can be evaluated before it has trained and whose checkpoints are ordinary, sharded or not.

    A sharded model is so from the start, because a forward of the whole model might not fit one device. Without FSDP
    and DeepSpeed everything is as ``Trainer`` has it.
    """

    model: Any
    optimizer: Any
    deepspeed: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            prepare_deepspeed(self.accelerator, self.model)
        prepare_sharding(self.accelerator, self.model)
        self._shards = self.accelerator.distributed_type == DistributedType.FSDP
        if self._shards:
            # New weights are random: all ranks take the main one's, as in DDP.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    shared = parameter.detach().to(self.accelerator.device)
                    torch.distributed.broadcast(shared, src=0)
                    parameter.data.copy_(shared)
            self.create_optimizer()  # FSDP2 needs both together
            model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model = self.model_wrapped = model

    def forwards(self) -> AbstractContextManager[None]:
        """Context for forwards that may run before training, when no DeepSpeed engine gathers weights yet."""
        before = self.is_deepspeed_enabled and self.deepspeed is None
        return gathered_forwards(self.model) if before else nullcontext()

    def check_engine(self, checkpoint: Path, saved_by: int) -> None:
        """Check that this run can load ``checkpoint``: DeepSpeed's have files of their own, one set per process.

        Raises:
            SimpoError: it was saved with another engine, ZeRO stage or number of processes (``saved_by``).
        """
        there = here = "without DeepSpeed"
        if any(checkpoint.glob("global_step*")):
            zero3 = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
            there = f"with DeepSpeed {'at' if zero3 else 'below'} ZeRO stage 3 by {saved_by} processes"
        if self.is_deepspeed_enabled:
            zero3 = self.accelerator.state.deepspeed_plugin.zero_stage == 3
            here = f"with DeepSpeed {'at' if zero3 else 'below'} ZeRO stage 3 by {self.args.world_size} processes"
        if there != here:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved {there}, and this run is {here}; continue it the same "
                "way, or start a new run from its weights (model_name_or_path)"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in ``Trainer``, but only the adapter of a sharded model is gathered if it has one."""
        if self._shards and isinstance(self.model, PeftModel):
            trained = ((name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad)
            self._save(output_dir, {name: _whole(tensor.detach()).cpu() for name, tensor in trained})
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
        state = _gather_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and (Path(checkpoint) / OPTIMIZER_NAME).is_file():  # a bare model has none
            folder = Path(checkpoint)
            state = torch.load(folder / OPTIMIZER_NAME, weights_only=True, map_location="cpu", mmap=True)
            _load_state(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _load_weights(self.model, Path(resume_from_checkpoint))  # never under DeepSpeed, which has files of its own

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            _load_weights(self.model, Path(str(self.state.best_model_checkpoint)))


def prepare_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Configure accelerate's FSDP for training here, if it is going to shard ``model``.

    Log-probabilities leave a model in fp32 and gradients are averaged over ranks in fp32, as without sharding;
    accelerate's policy for ``bf16`` would round both. Under autocast nothing else needs a cast. Models are saved whole.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
        raise SimpoError(
            "parallelism_config: tensor, context and sequence parallelism are not supported, because every process "
            "takes its own rows; use fsdp"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise SimpoError("model: its weights are sharded already; hand over the whole model and set fsdp: true")
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if getattr(model, "is_loaded_in_4bit", False):
        raise SimpoError(
            "fsdp: a base model in 4 bits is not sharded (not yet); leave out fsdp, so that every process holds it, or "
            "load_in_4bit"
        )
    if not accelerator.is_fsdp2:
        raise SimpoError("fsdp_config: FSDP 1 is not supported; set its version to 2")
    plugin = accelerator.state.fsdp_plugin
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def reshard(model: nn.Module) -> None:
    """Make ``model.parameters()`` the shards again: a forward without a backward leaves some weights gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, every rank has all weights of a sharded model and makes as many forwards as it likes; all ranks enter.

    This takes the memory of the whole model's weights on every device. Without FSDP2 nothing changes.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # Trainer wraps this method in FSDP hooks, which would reshard the root's weights after every call.
    generate = vars(model).pop("generate", None) if shards else None
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        reshard(model)
        if generate is not None:
            model.generate = generate
        for module in shards:  # the root's are needed again at once, in the backward
            again = accelerator.state.fsdp_plugin.reshard_after_forward and module is not model
            module.set_reshard_after_forward(bool(again), recurse=False)


# ---- Weights: whole in files, and of a sharded model each rank has a part.


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and slices, not yet read, of the weights in a checkpoint's files."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            yield from ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model, which may be sharded, one at a time; every rank reads the files."""
    target: dict[str, Tensor] = model.state_dict()
    stored: Iterable[tuple[str, Tensor]] = ((name, tensor[...]) for name, tensor in stored_tensors(folder))
    if isinstance(model, PeftModel):
        target, stored = adapter_tensors(model), read_adapter_tensors(str(folder)).items()
    elif unknown := [name for name, _ in stored_tensors(folder) if name not in target]:
        if isinstance(model, FSDPModule):
            raise SimpoError(
                f"resume_from_checkpoint: {folder}: {unknown[0]} has no place in the sharded model (not yet)"
            )
        _load_renamed(folder, model)  # transformers saves the experts of mixtures apart
        return
    loaded = set(getattr(model, "all_tied_weights_keys", {}))  # which are stored once
    with torch.no_grad():
        for name, tensor in stored:
            target[name].copy_(_as_sharded(tensor, target[name]))
            loaded.add(name)
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    if missing and not isinstance(model, PeftModel):
        raise SimpoError(
            f"resume_from_checkpoint: {folder} belongs to another model ({missing[0]} is missing there); name a "
            "checkpoint of this model"
        )


def _load_renamed(folder: Path, model: Any) -> None:
    """Load weights with other names through transformers, which needs the memory of a second model."""
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    try:
        if any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError("weights are missing or left over")
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise SimpoError(
            f"resume_from_checkpoint: {folder} belongs to another model ({one_line(error, 200)})"
        ) from error


def _gather_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The optimizer's state with whole tensors on the CPU, as without sharding; empty on ranks that do not keep it."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def layout(tensor: Tensor) -> Any:
        return (tensor.shape, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else tensor.shape

    whole: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        whole[index] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and layout(value) != layout(parameters[index]):
                raise SimpoError(
                    f"optim: the state {name!r} of {type(optimizer).__name__} is not sharded as the weights are and "
                    "cannot be saved; use adamw_torch"
                )
            full = _whole(value) if isinstance(value, Tensor) else value
            if keep:
                whole[index][name] = full.cpu() if isinstance(full, Tensor) else full
    return {**state, "state": whole}


def _load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors into an optimizer, whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        index: {
            name: _as_sharded(value, parameters[index]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _as_sharded(whole: Tensor, other: Tensor) -> Tensor:
    """``whole`` on the device of ``other``, or the shard of it that this rank has of ``other``."""
    whole = whole.to(other.device)
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
