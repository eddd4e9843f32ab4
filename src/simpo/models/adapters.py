"""Decides which parts of a model are trained: adds or loads LoRA adapters, freezes unused parts, disables dropout."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from simpo.errors import SimpoError, one_line, third_party
from simpo.models.settings import LORA, MOST_RANK
from simpo.models.zero import gathered, shape_of
from simpo.packing.model import causal_lm, is_reward_model, score_head

logger = logging.getLogger(__name__)

CANNOT_MERGE = (
    "the adapter changes the embeddings or the output layer, which share their weights in this model: it can be used, "
    "but not merged"
)


def find_adapter(name: str, revision: str = "main") -> LoraConfig | None:
    """Read the adapter configuration in a folder or hub repository; None if there is no adapter."""
    with third_party(f"model_name_or_path: {name!r} cannot be loaded"):
        file = find_adapter_config_file(name, revision=revision)
        config = None if file is None else PeftConfig.from_pretrained(name, revision=revision)
    if config is None:
        # peft saves a named adapter in a subfolder of that name
        if not (Path(name) / "config.json").exists() and (inside := sorted(Path(name).glob(f"*/{CONFIG_NAME}"))):
            names = ", ".join(str(path.parent) for path in inside)
            raise SimpoError(f"model_name_or_path: {name!r} only contains an adapter; name its folder: {names}")
        return None
    if not isinstance(config, LoraConfig):
        raise SimpoError(f"model_name_or_path: {name!r} is not a LoRA adapter ({config.peft_type.value}); use one")
    base, base_revision = config.base_model_name_or_path, config.revision
    if not base or not isinstance(base, str) or not isinstance(base_revision, str | None):
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter that does not name its base model")
    if (Path(os.path.expanduser(base)) / CONFIG_NAME).is_file():  # noqa: PTH111 - no error for ~nobody
        raise SimpoError(
            f"model_name_or_path: {name!r} is an adapter whose base model {base!r} is itself an adapter; merge that "
            "one first with simpo merge, or name a full model"
        )
    if config.megatron_config:  # peft would import whatever module the adapter names
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter for Megatron, which is not supported")
    return config


def add_adapter(model: PreTrainedModel, given: Mapping[str, Any], revision: str = "main") -> PeftModel:
    """Freeze ``model`` and add a new LoRA adapter, which changes nothing yet; its weights are at least fp32.

    ``given`` holds adapter settings by recipe key; ``revision``, the base model's, is saved with the adapter.
    """
    settings = {peft_name: given.get(key, default) for key, (peft_name, default) in LORA.items()}
    excluded = list(parts_unused_by_text(model))
    if excluded:
        logger.warning("not adapted, because text does not use it: %s", ", ".join(excluded))
    excluded += _custom_linear_layers(model)
    if excluded:
        settings["exclude_modules"] = rf"({'|'.join(map(re.escape, excluded))})(\..*)?"
    base = model.name_or_path
    try:
        with _without_warnings():
            adapted: Any = get_peft_model(model, LoraConfig(task_type=_task(model), **settings), revision=revision)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: it does not fit into memory
        advice = "; set lora_dropout: 0" if "lora_dropout" in str(error) else ""  # for mixtures of experts
        raise SimpoError(f"use_peft: cannot add an adapter to this model ({one_line(error)}){advice}") from error
    fully_trained = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    _check_names("lora_target_modules", given, adapted.base_model.targeted_module_names)
    _check_names("lora_modules_to_save", given, fully_trained)
    if changes_tied_weights(adapted):
        logger.warning(CANNOT_MERGE)
    _normalize(adapted, base)
    return adapted


def _custom_linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers whose forward the model's own code overrides, such as routers.

    An adapter would add to their output, which may not be a single tensor. Linear layers subclassed by libraries (4
    bits, FSDP) are fine.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__ == type(model).__module__
        and type(module).forward is not nn.Linear.forward
    ]
    if names:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        logger.warning("not adapted, because they are not plain linear layers: %s", ", ".join(kinds))
    return names


def _check_names(key: str, given: Mapping[str, Any], matched: list[str]) -> None:
    """Raise :class:`SimpoError` for names that match no layer; peft ignores them if any other name matches."""
    requested = given.get(key) or ()
    for end in () if isinstance(requested, str) else sorted(requested):
        if not any(f".{name}".endswith(f".{end}") for name in matched):
            raise SimpoError(f"{key}: no suitable layer has a name ending in {end!r}; leave it out")


def continue_adapter(
    model: PreTrainedModel, config: LoraConfig, name: str, *, revision: str = "main", given: Mapping[str, Any]
) -> PeftModel:
    """Freeze ``model`` and load the adapter in the folder or hub repository ``name``, to train it further or use it.

    ``config`` is the result of :func:`find_adapter`; any ``given`` settings must match the adapter's.
    """
    for key, value in given.items():
        stored_value = getattr(config, LORA[key][0])
        if (set(stored_value) if isinstance(stored_value, set | list) else stored_value) != (
            set(value) if isinstance(value, list) else value
        ):
            shown = ", ".join(sorted(stored_value)) if isinstance(stored_value, set | list) else stored_value
            raise SimpoError(f"{key}: {name} is an existing adapter with {shown}, which cannot change; leave {key} out")
    base = model.name_or_path
    stored = read_adapter_tensors(name, revision)
    _check_ranks(config, stored, name)
    _resize_vocabulary(model, stored, name)
    config.inference_mode = False
    with third_party(f"model_name_or_path: {name}: the adapter belongs to another model"), _without_warnings():
        adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[_task(model)](model, config)
    _normalize(adapted, base)
    if fault := adapter_fault(adapted, stored):
        raise SimpoError(f"model_name_or_path: {name}: the adapter belongs to another model than {base!r} ({fault})")
    set_peft_model_state_dict(adapted, stored)
    return adapted


def _check_ranks(config: LoraConfig, stored: Mapping[str, Tensor], name: str) -> None:
    """Raise :class:`SimpoError` for ranks that the ``stored`` tensors cannot have, before peft allocates memory.

    Each layer's exact rank is checked afterwards, because only peft knows which layers a pattern matches.
    """
    with third_party(f"model_name_or_path: {name}: the adapter's ranks are invalid"):
        ranks = [int(rank) for rank in (config.r, *(config.rank_pattern or {}).values())]
    # a layer's factor has as many rows as its rank, or a multiple in a mixture of experts
    most = max((len(tensor) for key, tensor in stored.items() if re.search(r"\.lora_(embedding_)?A\b", key)), default=0)
    if min(ranks) > most or max(ranks) > max(most, MOST_RANK):
        raise SimpoError(
            f"model_name_or_path: {name}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together: the adapter has "
            f"rank {max(ranks):,}, and its weights have at most rank {most:,}; restore both files"
        )


def _resize_vocabulary(model: PreTrainedModel, stored: Mapping[str, Tensor], name: str) -> None:
    """Resize the vocabulary of ``model`` to the adapter's, provided that the adapter contains all weights for it."""
    names = {module: name for name, module in model.named_modules()}
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    ends = [(f"{names[layer]}.weight", f"{names[layer]}.base_layer.weight") for layer in layers]
    rows = [next((len(tensor) for key, tensor in stored.items() if key.endswith(end)), 0) for end in ends]
    before = model.config.get_text_config().vocab_size
    if {*rows} <= {0, before}:
        return
    if len({*rows} - {0}) > 1 or (0 in rows and not getattr(model.config, "tie_word_embeddings", False)):
        raise SimpoError(
            f"model_name_or_path: {name}: the adapter was trained with {max(rows)} tokens and the model has {before}, "
            "but the adapter lacks the embeddings or the output layer; save it with both in modules_to_save"
        )
    model.resize_token_embeddings(max(rows), mean_resizing=False)


def _task(model: PreTrainedModel) -> str:
    """Return peft's name for the task; it makes peft train a reward model's score head fully and store it too."""
    return "SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM"


def _normalize(model: PeftModel, base: str) -> None:
    """Make the adapter's configuration find its base model from any folder, and be reproducible."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    for key in ("target_modules", "target_parameters"):  # sets, which would be written in a different order each time
        if isinstance(getattr(config, key), set):
            setattr(config, key, sorted(getattr(config, key)))
    if config.modules_to_save is not None:  # peft adds the score head on every load
        config.modules_to_save = sorted(set(config.modules_to_save))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide peft's warnings about deprecated names, tied weights, and weights that it transposes automatically."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def check_adapter(model: PeftModel) -> None:
    """Raise :class:`SimpoError` for several adapters, or one that adds input tokens, which packing does not support."""
    kinds = {config.peft_type.value for config in model.peft_config.values() if config.is_prompt_learning}
    if kinds:
        raise SimpoError(f"model: {', '.join(sorted(kinds))} is not supported; use LoRA")
    if len(model.peft_config) > 1 and active_name(model) != "default":
        names = ", ".join(model.peft_config)
        raise SimpoError(f"model: it has several adapters ({names}); remove all but one with delete_adapter")


def active_name(model: PeftModel) -> str:
    """Return the name of the adapter that is trained."""
    return model.active_adapters[0]


def changes_tied_weights(model: PeftModel) -> bool:
    """Whether the adapter changes embeddings or an output layer that are tied, so that it cannot be merged."""
    base: Any = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    changed = any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in ends)
    return changed and bool(getattr(base.config, "tie_word_embeddings", False))


def move_named_adapter(model: PeftModel, folder: Path) -> None:
    """Move an adapter that peft saved in a subfolder of its own name into ``folder``."""
    subfolder = folder / active_name(model)
    if subfolder.name != "default" and subfolder.is_dir():
        for path in subfolder.iterdir():
            path.replace(folder / path.name)
        subfolder.rmdir()


def has_adapter_weights(folder: Path) -> bool:
    """Whether ``folder`` contains an adapter's weights."""
    return (folder / WEIGHTS_NAME).is_file()


def adapter_fault(model: PeftModel, stored: Mapping[str, Tensor]) -> str | None:
    """Describe the first of the ``stored`` tensors that does not fit ``model``; None if all fit. peft only warns."""
    expected = get_peft_model_state_dict(model, adapter_name=active_name(model), save_embedding_layers=False)
    accepted = adapter_tensors(model)  # includes embeddings, which are stored if they are adapted
    if missing := expected.keys() - stored.keys():
        return f"{min(missing)} is missing"
    if left_over := stored.keys() - accepted.keys():
        return f"{min(left_over)} is unexpected"
    for name, tensor in stored.items():
        if tuple(tensor.shape) != shape_of(accepted[name]):
            return f"{name} has shape {list(tensor.shape)} instead of {list(shape_of(accepted[name]))}"
    return None


def read_adapter_tensors(name: str, revision: str = "main") -> dict[str, Tensor]:
    """Read an adapter's tensors, keyed by their names in the file."""
    with third_party(f"{name}: {WEIGHTS_NAME} cannot be read"):
        stored = load_file(str(cached_file(name, WEIGHTS_NAME, revision=revision)))
    # if the vocabulary was resized, peft stores fully trained modules twice, under two names
    duplicates = [key for key in stored if ".modules_to_save." in key and key.replace(".modules_to_save", "") in stored]
    return {key: tensor for key, tensor in stored.items() if key not in duplicates}


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the weights of ``model``: the adapter's keyed by their names in its file, the others by their own."""
    weights = model.state_dict(keep_vars=True)
    adapter = get_peft_model_state_dict(model, weights, adapter_name=active_name(model), save_embedding_layers=False)
    return {**weights, **adapter}


def unchanged_base_weights(model: PeftModel) -> dict[str, Any] | None:
    """Return the base model's weights, keyed by its own names, or None if the adapter already changes them."""
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(f".{factor}." in name for factor in ("lora_B", "lora_embedding_A")):  # zero in a new adapter
            with gathered(tensor):
                if bool(tensor.any()):
                    return None
        elif any(f".{factor}." in name for factor in ("lora_A", "lora_embedding_B")):
            continue
        elif any(f".{adapter}." in f"{name}." for adapter in model.peft_config):  # not LoRA
            return None
        else:
            weights[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return weights


# ---- Other preparations for training: dropout, parts without gradients, 4-bit layers.


def disable_dropout(model: nn.Module) -> None:
    """Set all dropout probabilities in ``model`` to 0, and the noise that some routers add to their inputs.

    Layers without an ``nn.Dropout`` read the probability from an attribute, which has many names (``residual_dropout``,
    ``attn_dropout``, ``router_jitter_noise``, ...), or from the configuration.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is not None and isinstance(getattr(config, "hidden_dropout", None), float):  # Falcon reads it there
            config.hidden_dropout = 0.0


def parts_unused_by_text(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Return the largest submodules of ``model``, by name, that a text-only forward pass does not use.

    These are the parts of a multimodal model outside its language model and its output or score layer (vision and audio
    towers), and cross-attention layers for images inside the language model. A text-only model has none.
    """
    inner: Any = causal_lm(model)
    config = inner.config
    text = config.get_text_config()
    cross_attention = getattr(text, "cross_attention_layers", None) or []
    unused: dict[str, nn.Module | nn.Parameter] = {
        name: module
        for number in cross_attention
        for name, module in inner.named_modules()
        if name.endswith(f"layers.{number}") and "CrossAttention" in type(module).__name__
    }
    if text is config:
        return unused
    roots = (inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings(), score_head(inner))
    used = {id(module) for root in roots if root is not None for module in root.modules()}
    return unused | dict(_outside(inner, used, ""))


def _outside(module: nn.Module, used: set[int], prefix: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        if id(child) in used:
            continue
        if {id(descendant) for descendant in child.modules()} & used:
            yield from _outside(child, used, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def freeze_parts_unused_by_text(model: nn.Module) -> None:
    """Freeze the parts that text does not use, and log them.

    They would get no gradient: DDP would wait for one, and weight decay would shrink them.
    """
    names, count = [], 0
    for name, part in parts_unused_by_text(model).items():
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        if trainable:
            names.append(name)
            count += sum(parameter.numel() for parameter in trainable)
    if names:
        logger.warning("not trained, because text does not use it: %s (%s parameters)", ", ".join(names), f"{count:,}")


def prevent_repacking(model: nn.Module) -> None:
    """Prevent 4-bit layers on a CPU from repacking their weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes does so, permanently, in a layer's first forward pass in evaluation mode.
    From then on its products are rounded to bf16 and silently pass no gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
