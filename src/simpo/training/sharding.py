"""``ShardedTrainer``: a ``Trainer`` for FSDP2 and DeepSpeed that saves models as ordinary files.

A checkpoint can therefore resume on any other number of ranks, with FSDP2 or without.
"""

from __future__ import annotations

import dataclasses
import inspect
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
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from simpo.errors import SimpoError, one_line
from simpo.models.adapters import adapter_tensors, read_adapter_tensors
from simpo.models.zero import gathered_forwards, prepare_deepspeed


class ShardedTrainer(Trainer):
    """A ``Trainer`` that can evaluate before training and writes ordinary checkpoints, sharded or not.

    A model is sharded from the start, because a forward pass of the full model might not fit on one device. Without
    FSDP and DeepSpeed it behaves like ``Trainer``.
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
            # New weights are initialized at random, so all ranks take the main one's, as in DDP.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    shared = parameter.detach().to(self.accelerator.device)
                    torch.distributed.broadcast(shared, src=0)
                    parameter.data.copy_(shared)
            self.create_optimizer()  # FSDP2 has to prepare the model and optimizer together
            model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model = self.model_wrapped = model

    def forwards(self) -> AbstractContextManager[None]:
        """Return a context for forward passes that may run before training, without an engine to gather weights yet."""
        before = self.is_deepspeed_enabled and self.deepspeed is None
        return gathered_forwards(self.model) if before else nullcontext()

    def check_engine(self, checkpoint: Path, saved_by: int) -> None:
        """Check that this run can load ``checkpoint``; DeepSpeed has its own files, one set per process.

        Raises:
            SimpoError: it was saved with another engine, ZeRO stage or number of processes (``saved_by``).
        """
        saved = current = "without DeepSpeed"
        if any(checkpoint.glob("global_step*")):
            zero3 = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
            saved = f"with DeepSpeed {'at' if zero3 else 'below'} ZeRO stage 3 on {saved_by} processes"
        if self.is_deepspeed_enabled:
            zero3 = self.accelerator.state.deepspeed_plugin.zero_stage == 3
            current = f"with DeepSpeed {'at' if zero3 else 'below'} ZeRO stage 3 on {self.args.world_size} processes"
        if saved != current:
            raise SimpoError(
                f"resume_from_checkpoint: {checkpoint} was saved {saved}, but this run is {current}; continue it the "
                "same way, or start a new run from its weights (model_name_or_path)"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does, but if a sharded model has an adapter, gather only the adapter."""
        if self._shards and isinstance(self.model, PeftModel):
            trained = ((name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad)
            self._save(output_dir, {name: _whole(tensor.detach()).cpu() for name, tensor in trained})
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict:  # gathering has untied tied weights
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
        elif checkpoint is not None and (Path(checkpoint) / OPTIMIZER_NAME).is_file():  # absent in a model folder
            folder = Path(checkpoint)
            state = torch.load(folder / OPTIMIZER_NAME, weights_only=True, map_location="cpu", mmap=True)
            _check_optimizer(self.optimizer, state["param_groups"], folder)
            _load_state(self.optimizer, state)
            _load_schedule(self.lr_scheduler, torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def check_optimizer_state(self, checkpoint: Path) -> None:
        """Raise :class:`SimpoError` if another optimizer saved ``checkpoint``; DeepSpeed checks its own files."""
        if self.is_deepspeed_enabled or not (checkpoint / OPTIMIZER_NAME).is_file():
            return
        state = torch.load(checkpoint / OPTIMIZER_NAME, weights_only=True, map_location="cpu", mmap=True)
        before = self.optimizer
        _check_optimizer(self.create_optimizer(), state["param_groups"], checkpoint)
        self.optimizer = before

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _load_weights(self.model, Path(resume_from_checkpoint))  # never called with DeepSpeed, which has its own files

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            _load_weights(self.model, Path(str(self.state.best_model_checkpoint)))


def prepare_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Check that ``model`` can be sharded as requested, and configure accelerate's FSDP if it is used.

    As without sharding, log-probabilities leave the model in fp32 and gradients are averaged over ranks in fp32;
    accelerate's policy for ``bf16`` would round both. Autocast handles all other casts. Models are saved unsharded.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
        raise SimpoError(
            "parallelism_config: tensor, context and sequence parallelism are not supported, because every process "
            "trains on different rows; use fsdp"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise SimpoError("model: its weights are already sharded; pass the unsharded model and set fsdp: true")
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if getattr(model, "is_loaded_in_4bit", False):
        raise SimpoError(
            "fsdp: sharding a base model in 4 bits is not supported yet; leave out fsdp, so that every process holds "
            "all of it, or leave out load_in_4bit"
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
    """Turn ``model.parameters()`` back into shards; a forward pass without backward leaves some weights gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gather a sharded model's weights, so that ranks may run different numbers of forward passes inside.

    Every rank must enter, and every device needs memory for the full weights. Without FSDP2 this does nothing.
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
        for module in shards:  # the backward pass needs the root's right away
            restored = accelerator.state.fsdp_plugin.reshard_after_forward and module is not model
            module.set_reshard_after_forward(bool(restored), recurse=False)


# ---- Weights: full tensors in files, shards in memory.


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the names and lazy slices of the weights in a checkpoint."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            yield from ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights one at a time into a possibly sharded model; every rank reads the files."""
    target: dict[str, Tensor] = model.state_dict()
    stored: Iterable[tuple[str, Tensor]] = ((name, tensor[...]) for name, tensor in stored_tensors(folder))
    if isinstance(model, PeftModel):
        target, stored = adapter_tensors(model), read_adapter_tensors(str(folder)).items()
    elif unknown := [name for name, _ in stored_tensors(folder) if name not in target]:
        if isinstance(model, FSDPModule):
            raise SimpoError(
                f"resume_from_checkpoint: {folder}: loading {unknown[0]} into a sharded model is not supported yet"
            )
        _load_renamed(folder, model)  # e.g. transformers saves each expert of a mixture separately
        return
    loaded = set(getattr(model, "all_tied_weights_keys", {}))  # tied weights are stored only once
    with torch.no_grad():
        for name, tensor in stored:
            target[name].copy_(_as_sharded(tensor, target[name]))
            loaded.add(name)
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    if missing and not isinstance(model, PeftModel):
        raise SimpoError(
            f"resume_from_checkpoint: {folder} belongs to another model (it has no {missing[0]}); use a checkpoint of "
            "this model"
        )


def _load_renamed(folder: Path, model: Any) -> None:
    """Load weights stored under other names through transformers, which needs memory for a second model."""
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    try:
        if any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError("weights are missing, unexpected, or of another shape")
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise SimpoError(
            f"resume_from_checkpoint: {folder} belongs to another model ({one_line(error, 200)}); use a checkpoint of "
            "this model"
        ) from error


def _gather_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return the optimizer's state with full tensors on the CPU, as without sharding; empty unless ``keep``."""
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
                    f"optim: cannot save the state {name!r} of {type(optimizer).__name__}, because it is not sharded "
                    "like the weights; use adamw_torch"
                )
            full = _whole(value) if isinstance(value, Tensor) else value
            if keep:
                whole[index][name] = full.cpu() if isinstance(full, Tensor) else full
    return {**state, "state": whole}


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings of each parameter group: the arguments of the optimizer's constructor, and ``initial_lr``.

    Whatever else a group holds is state, such as the step count of schedule-free optimizers. The schedule sets ``lr``.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps optimizers
    names = {"initial_lr", *inspect.signature(kind.__init__).parameters} - {"params", "lr"}
    return [{name: group[name] for name in group.keys() & names} for group in optimizer.param_groups]


def _check_optimizer(optimizer: Any, stored: list[dict[str, Any]], checkpoint: Path) -> None:
    """Raise :class:`SimpoError` if another kind of optimizer saved the groups ``stored``.

    Groups of the same optimizer may still differ, as other versions of its package may have more or fewer settings.
    """
    for group, saved in zip(optimizer.param_groups, stored, strict=False):
        scheduled = {"initial_lr"}  # which only some schedules set
        lacking, unknown = sorted(group.keys() - saved.keys()), sorted(saved.keys() - group.keys() - scheduled)
        if lacking and unknown:
            raise SimpoError(
                f"optim: {checkpoint} was saved by another optimizer (it has {unknown[0]}, but not {lacking[0]}); "
                "restore optim, or start a new run from the checkpoint's weights (model_name_or_path)"
            )


def _load_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """Load the step of a schedule, and continue from there with the configured learning rate.

    ``reduce_lr_on_plateau`` and ``greedy`` continue with the stored learning rate, which depends on the losses so far.
    """
    configured = getattr(scheduler, "base_lrs", None)
    scheduler.load_state_dict(state)
    if type(scheduler) is LambdaLR:
        scheduler.base_lrs = configured
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate


def _load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state with full tensors into an optimizer with possibly sharded parameters; it keeps its own settings."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        index: {
            name: _as_sharded(value, parameters[index]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    groups = state["param_groups"]
    if len(groups) == len(optimizer.param_groups):  # otherwise, the optimizer rejects them
        groups = [stored | own for stored, own in zip(groups, _settings(optimizer), strict=True)]
    optimizer.load_state_dict({**state, "state": shards, "param_groups": groups})


def _as_sharded(whole: Tensor, other: Tensor) -> Tensor:
    """Move ``whole`` to the device of ``other``, keeping only this rank's shard if ``other`` is sharded."""
    whole = whole.to(other.device)
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
