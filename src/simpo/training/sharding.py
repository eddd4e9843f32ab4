"""FSDP2's sharded weights and optimizer states to and from ordinary files.

Because the files are ordinary, a checkpoint of any number of ranks, sharded or not, continues on any other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
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
from transformers import PreTrainedModel

from simpo.errors import SimpoError, one_line
from simpo.models.adapters import adapter_tensors, stored_adapter


def settle_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """Make accelerate shard ``model`` as training here needs it, where it is going to.

    Log-probabilities leave a model in fp32 and gradients are averaged over ranks in fp32, as without sharding, which
    accelerate's policy for ``bf16`` would round. Under autocast nothing else need be cast. Models are saved whole.

    Raises:
        SimpoError: a kind of parallelism that is not supported, a model that somebody has sharded already, or one in
            4 bits.
    """
    parallelism = accelerator.parallelism_config
    if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
        raise SimpoError(
            "parallelism_config: tensor, context and sequence parallelism are not supported, because every process "
            "takes rows of its own; use fsdp"
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


def share_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all ranks the main one's trained weights, as DDP does: new ones are random. Call it before sharding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            shared = parameter.detach().to(accelerator.device)
            torch.distributed.broadcast(shared, src=0)
            parameter.data.copy_(shared)


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread ``model``'s weights over ranks."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let ``model.parameters()`` be the shards again, which a forward without a backward leaves gathered in part."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and slices, not yet read, of the weights in a checkpoint's files."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            yield from ((name, tensors.get_slice(name)) for name in tensors.keys())  # noqa: SIM118


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a sharded ``model`` the weights of a checkpoint, one at a time; every rank reads the files.

    Raises:
        SimpoError: there are none.
    """
    if isinstance(model, PeftModel):
        _load_adapter(model, folder)
        return
    own, found = model.state_dict(), False
    with torch.no_grad():
        for name, stored in stored_tensors(folder):
            if name not in own:
                raise SimpoError(
                    f"resume_from_checkpoint: {folder}: {name} has no place in the sharded model (not yet)"
                )
            own[name].copy_(_like(stored[...], own[name]))
            found = True
    if not found:
        raise SimpoError(f"resume_from_checkpoint: {folder} has no whole weights; name a checkpoint of this model")


def _load_adapter(model: PeftModel, folder: Path) -> None:
    own = adapter_tensors(model)
    with torch.no_grad():
        for name, stored in stored_adapter(str(folder)).items():
            own[name].copy_(_like(stored, own[name]))


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a sharded ``model``, whole, on the CPU; all ranks have to call."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: _whole(parameter.detach()).cpu() for name, parameter in trained}


def gathered_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The optimizer's state with whole tensors on the CPU, as it would be without sharding; all ranks have to call.

    Args:
        optimizer: of sharded parameters.
        keep: whether this rank wants it; the others take part only.

    Raises:
        SimpoError: its state has tensors that are not sharded as the weights are.
    """
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole: dict[int, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        whole[index] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and _layout(value) != _layout(parameters[index]):
                raise SimpoError(
                    f"optim: the state {name!r} of {type(optimizer).__name__} is not sharded as the weights are and "
                    "cannot be saved; use adamw_torch"
                )
            full = _whole(value) if isinstance(value, Tensor) else value
            if keep:
                whole[index][name] = full.cpu() if isinstance(full, Tensor) else full
    return {**state, "state": whole}


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a state of whole tensors, whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        index: {
            name: _like(value, parameters[index]) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _like(whole: Tensor, other: Tensor) -> Tensor:
    """``whole``, or of it the shard that this rank has of ``other``."""
    whole = whole.to(other.device)
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _layout(tensor: Tensor) -> Any:
    return (tensor.shape, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else tensor.shape


# ---- Checkpoints whose weights have other names than the model's: transformers saves the experts of mixtures
# apart.


def is_renamed(folder: Path, model: nn.Module) -> bool:
    """Whether ``folder`` has weights of which ``model`` knows nothing by their names."""
    known = model.state_dict().keys()
    return any(name not in known for name, _ in stored_tensors(folder))


def load_renamed(folder: Path, model: PreTrainedModel) -> None:
    """Give ``model`` the weights of ``folder`` as transformers loads them, which takes the room of a second model.

    Raises:
        SimpoError: they are of another model.
    """
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    try:
        if any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError("weights are missing or left over")
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise SimpoError(f"resume_from_checkpoint: {folder} is of another model ({reason})") from error


def kind_of(folder: Path) -> str | None:
    """The architecture that the checkpoint's ``config.json`` names, if it has one: ``llama``, ``mixtral``, ..."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
