"""Supports DeepSpeed: its configuration, and weights that ZeRO-3 partitions across processes.

A parameter that ZeRO-3 has partitioned is empty (``ds_tensor`` holds this process's part, ``ds_shape`` its shape) until
the engine's hooks gather it for a layer's forward pass. The engine is created when training starts, but the self-check,
the reference and held-out rows need the model earlier, so :func:`gathered_forwards` adds equivalent hooks.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import deepspeed_config

from simpo.config.text import read_text_file
from simpo.errors import SimpoError, third_party

# Accelerate imports DeepSpeed whenever it is installed, and the import warns if there is no accelerator.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def read_config(given: str | dict[str, Any] | None, rows: int, accumulation: int) -> dict[str, Any] | None:
    """Read the configuration in a recipe's ``deepspeed`` (a file name, JSON text or a dict), without batch sizes."""
    config = _parse(given) if given else None
    if importlib.util.find_spec("deepspeed") is None:
        raise SimpoError("deepspeed: not installed; DS_BUILD_OPS=0 pip install --no-build-isolation 'simpo[deepspeed]'")
    # DeepSpeed calls torch's collectives by deprecated names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if config is not None:
        unset_batch_sizes(config, rows, accumulation)
        for precision in ("bf16", "fp16"):  # if the file does not mention them, the recipe decides
            config.setdefault(precision, {"enabled": "auto"})
    return config


def _parse(given: str | dict[str, Any]) -> dict[str, Any]:
    if "WORLD_SIZE" not in os.environ:
        raise SimpoError("deepspeed: start the run with torchrun or accelerate launch, even for a single process")
    if isinstance(given, dict):
        return copy.deepcopy(given)
    with third_party(f"deepspeed: {given!r} is not a JSON file"):
        return json.loads(given if given.lstrip().startswith("{") else read_text_file(given))


def unset_batch_sizes(config: dict[str, Any], rows: int, accumulation: int) -> None:
    """Check that the batch sizes in DeepSpeed's ``config`` match the recipe's, and leave them to the trainer.

    Training hands DeepSpeed all rows of a step as one batch, which matches neither setting.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    ours = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": rows * accumulation * processes,
    }
    for key, value in ours.items():
        if config.get(key, "auto") not in ("auto", value):
            raise SimpoError(f"deepspeed: {key} is {config[key]}, but {value} in the recipe; set it to auto")
        config[key] = "auto"
    # DeepSpeed computes this product itself, and on a CPU checks it before it knows the number of processes
    del config["train_batch_size"]


def prepare_deepspeed(accelerator: Accelerator, model: nn.Module) -> None:
    """Convert ``model`` to DeepSpeed's compute dtype and, with ZeRO-3, partition it now instead of later.

    Results computed before training then match those in training, and models are saved whole.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin.hf_ds_config.mismatches:
        differing = "; ".join(line.lstrip("- ") for line in plugin.hf_ds_config.mismatches)
        raise SimpoError(f"deepspeed: its configuration (ds) and the recipe (hf) disagree: {differing}")
    config, dtype = plugin.hf_ds_config.config, plugin.hf_ds_config.dtype()
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise SimpoError("deepspeed: tensor parallelism (tensor_parallel) is not supported; use ZeRO-3")
    if getattr(model, "is_loaded_in_4bit", False) and plugin.hf_ds_config.is_zero3():
        raise SimpoError("deepspeed: ZeRO-3 cannot partition a 4-bit base model; use ZeRO-2, or drop load_in_4bit")
    unpartitioned = [parameter for parameter in model.parameters() if not is_partitioned(parameter)]
    partitioned = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    dtypes = {parameter.dtype for parameter in unpartitioned if parameter.is_floating_point()}
    if partitioned:  # during loading, in DeepSpeed's dtype whatever was requested
        dtypes |= {getattr(getattr(model, "config", None), "dtype", None) or dtype}
    if other := dtypes - {torch.float32, dtype}:
        raise SimpoError(
            f"dtype: the model is in {str(min(other, key=str))[6:]}, but DeepSpeed computes in {str(dtype)[6:]} "
            "(float32 unless bf16: true); make them agree"
        )
    for parameter in unpartitioned:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if plugin.hf_ds_config.is_zero3():
        import deepspeed  # noqa: PLC0415 - an extra

        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if partitioned and unpartitioned:  # a new adapter on a model that was partitioned during loading
            partitioned[0].convert_to_zero_parameters(param_list=unpartitioned)
        elif unpartitioned:
            deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config(), dtype=dtype)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned ``parameter``."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the full shape of a parameter, even if it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(*parameters: Tensor) -> Iterator[None]:
    """Gather partitioned ``parameters`` inside this context, read-only. Every process must call this."""
    missing = [parameter for parameter in parameters if is_partitioned(parameter) and not parameter.numel()]
    if not missing:
        yield
        return
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.GatheredParameters(missing):
        yield


@contextmanager
def gathered_forwards(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a partitioned ``model`` layer by layer in forward passes, before an engine wraps it.

    The weights are read-only, and every process must run the same passes in the same order. Does nothing for a model
    that is not partitioned.
    """
    hooks: list[Any] = []
    stacks: dict[nn.Module, ExitStack] = {}

    def gather(module: nn.Module, *_: Any) -> None:
        stacks[module] = ExitStack()
        stacks[module].enter_context(gathered(*module.parameters(recurse=False)))

    def release(module: nn.Module, *_: Any) -> None:
        stacks.pop(module).close()

    for module in model.modules():
        if any(map(is_partitioned, module.parameters(recurse=False))):
            hooks += [
                module.register_forward_pre_hook(gather),
                module.register_forward_hook(release, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exchange_partitions(parameters: list[nn.Parameter], others: list[Tensor]) -> None:
    """Swap this process's partitions of ``parameters`` with ``others``. Every process must call this."""
    whole = [parameter for parameter in parameters if parameter.numel()]  # small ones stay whole between forwards
    for parameter in whole:
        parameter.partition()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, other in zip(parameters, others, strict=True):
            partition = parameter.ds_tensor  # type: ignore[attr-defined]
            previous = partition.clone()
            partition.copy_(other)
            other.copy_(previous)
    if whole:
        whole[0].all_gather(param_list=whole)  # type: ignore[attr-defined]
