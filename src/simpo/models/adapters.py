"""What is trained of a model: LoRA adapters, new ones and stored ones, and parts that are frozen or switched off."""

from __future__ import annotations

import logging
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
from simpo.models.settings import LORA
from simpo.models.zero import gathered, shape_of
from simpo.packing.model import causal_lm, is_reward_model, score_head

logger = logging.getLogger(__name__)

PARTS_TIED = (
    "the adapter changes the embeddings or the output layer, which are one matrix in this model: it can be used, but "
    "not merged"
)


def find_adapter(name: str, revision: str = "main") -> LoraConfig | None:
    """The configuration of the adapter that a folder or hub repository holds; None if it holds none."""
    with third_party(f"model_name_or_path: {name!r} cannot be loaded"):
        found = find_adapter_config_file(name, revision=revision)
        config = None if found is None else PeftConfig.from_pretrained(name, revision=revision)
    if config is None:
        # peft saves an adapter that has a name of its own in a subfolder of that name
        if not (Path(name) / "config.json").exists() and (inside := sorted(Path(name).glob(f"*/{CONFIG_NAME}"))):
            names = ", ".join(str(path.parent) for path in inside)
            raise SimpoError(f"model_name_or_path: {name!r} is not an adapter itself; name the one in it: {names}")
        return None
    if not isinstance(config, LoraConfig):
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter of another kind than LoRA ({config.peft_type})")
    base, own_revision = config.base_model_name_or_path, config.revision
    if not base or not isinstance(base, str) or not isinstance(own_revision, str | None):
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter that does not name its base model")
    if config.megatron_config:  # for which peft imports a module that the adapter names
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter for Megatron")
    return config


def add_adapter(model: PreTrainedModel, given: Mapping[str, Any], revision: str = "main") -> PeftModel:
    """``model``, frozen, under a new LoRA that changes nothing yet; the adapter's weights are fp32 at least.

    ``given`` are settings by their keys in recipes; ``revision``, the base model's, is saved with the adapter.
    """
    settings = {peft_name: given.get(key, default) for key, (peft_name, default) in LORA.items()}
    excluded = list(parts_unused_by_text(model))
    if excluded:
        logger.warning("no adapter on parts that text does not use: %s", ", ".join(excluded))
    excluded += _custom_linear_layers(model)
    if excluded:
        settings["exclude_modules"] = rf"({'|'.join(map(re.escape, excluded))})(\..*)?"
    base = model.name_or_path
    try:
        with _without_warnings():
            adapted: Any = get_peft_model(model, LoraConfig(task_type=_task(model), **settings), revision=revision)
    except (ValueError, TypeError) as error:
        advice = "; set lora_dropout: 0" if "lora_dropout" in str(error) else ""  # on experts of a mixture
        raise SimpoError(f"use_peft: the adapter cannot be put on the model ({one_line(error)}){advice}") from error
    whole = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    _check_found("lora_target_modules", given, adapted.base_model.targeted_module_names)
    _check_found("lora_modules_to_save", given, whole)
    if changes_tied_weights(adapted):
        logger.warning(PARTS_TIED)
    _normalize(adapted, base)
    return adapted


def _custom_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of layers that the model's own code derives from linear ones with another forward, such as a router.

    An adapter would add to their output, which need not be one tensor. Libraries derive linear layers too (4 bits,
    FSDP); those are fine.
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
        logger.warning("no adapter on layers that are not plain linear ones: %s", ", ".join(kinds))
    return names


def _check_found(key: str, given: Mapping[str, Any], found: list[str]) -> None:
    """Refuse names that no layer has; peft ignores one among others."""
    wanted = given.get(key) or ()
    for end in () if isinstance(wanted, str) else sorted(wanted):
        if not any(f".{name}".endswith(f".{end}") for name in found):
            raise SimpoError(f"{key}: no suitable layer's name ends with {end!r}; leave it out")


def continue_adapter(
    model: PreTrainedModel, config: LoraConfig, name: str, *, revision: str = "main", given: Mapping[str, Any]
) -> PeftModel:
    """``model``, frozen, under the adapter of the folder or hub repository ``name``, to be trained further or used.

    ``config`` is the result of :func:`find_adapter`; ``given`` settings must be the adapter's own.
    """
    for key, value in given.items():
        known = getattr(config, LORA[key][0])
        if (set(known) if isinstance(known, set | list) else known) != (
            set(value) if isinstance(value, list) else value
        ):
            shown = ", ".join(sorted(known)) if isinstance(known, set | list) else known
            raise SimpoError(f"{key}: {name} is an adapter with {shown}, which is continued; leave {key} out")
    base = model.name_or_path
    stored = read_adapter_tensors(name, revision)
    _resize_vocabulary(model, stored, name)
    config.inference_mode = False
    with third_party(f"model_name_or_path: {name}: an adapter for another model"), _without_warnings():
        adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[_task(model)](model, config)
    _normalize(adapted, base)
    if fault := adapter_fault(adapted, stored):
        raise SimpoError(f"model_name_or_path: {name}: an adapter for another model than {base!r} ({fault})")
    set_peft_model_state_dict(adapted, stored)
    return adapted


def _resize_vocabulary(model: PreTrainedModel, stored: Mapping[str, Tensor], name: str) -> None:
    """Give ``model`` as many tokens as the adapter was trained with, if the adapter brings all of their weights."""
    names = {module: name for name, module in model.named_modules()}
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    ends = [(f"{names[layer]}.weight", f"{names[layer]}.base_layer.weight") for layer in layers]
    rows = [next((len(tensor) for key, tensor in stored.items() if key.endswith(end)), 0) for end in ends]
    before = model.config.get_text_config().vocab_size
    if {*rows} <= {0, before}:
        return
    if len({*rows} - {0}) > 1 or (0 in rows and not getattr(model.config, "tie_word_embeddings", False)):
        raise SimpoError(
            f"model_name_or_path: {name}: an adapter for {max(rows)} tokens on a model with {before}, without both the "
            "embeddings and the output layer for them; save it with modules_to_save for both"
        )
    model.resize_token_embeddings(max(rows), mean_resizing=False)


def _task(model: PreTrainedModel) -> str:
    """peft's name of the task; the score head of a reward model is trained whole, and stored with the adapter."""
    return "SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM"


def _normalize(model: PeftModel, base: str) -> None:
    """Make the adapter's file find its base model from everywhere, and be the same every time."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    for key in ("target_modules", "target_parameters"):  # sets, which would be written in another order every time
        if isinstance(getattr(config, key), set):
            setattr(config, key, sorted(getattr(config, key)))
    if config.modules_to_save is not None:  # peft adds a score head every time
        config.modules_to_save = sorted(set(config.modules_to_save))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide peft's warnings about transformers' names, tied weights, and weights that it transposes by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that adds tokens to the input, which packed batches do not have, or that is one of several."""
    kinds = {config.peft_type.value for config in model.peft_config.values() if config.is_prompt_learning}
    if kinds:
        raise SimpoError(f"model: {', '.join(sorted(kinds))} is not supported; use LoRA")
    if len(model.peft_config) > 1 and active_name(model) != "default":
        names = ", ".join(model.peft_config)
        raise SimpoError(f"model: it has the adapters {names}; remove all but the one to train with delete_adapter")


def active_name(model: PeftModel) -> str:
    """The name of the adapter that is trained."""
    return model.active_adapters[0]


def changes_tied_weights(model: PeftModel) -> bool:
    """Whether the adapter changes one of two matrices that the model ties, so that no whole model has its numbers."""
    base: Any = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    changed = any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in ends)
    return changed and bool(getattr(base.config, "tie_word_embeddings", False))


def move_named_adapter(model: PeftModel, folder: Path) -> None:
    """Move an adapter that was saved in a subfolder of its own name to where it is looked for."""
    subfolder = folder / active_name(model)
    if subfolder.name != "default" and subfolder.is_dir():
        for path in subfolder.iterdir():
            path.replace(folder / path.name)
        subfolder.rmdir()


def has_adapter_weights(folder: Path) -> bool:
    """Whether an adapter's weights are in ``folder``."""
    return (folder / WEIGHTS_NAME).is_file()


def adapter_fault(model: PeftModel, stored: Mapping[str, Tensor]) -> str | None:
    """The first of an adapter's ``stored`` tensors that does not fit ``model``, as text; peft would only warn."""
    expected = get_peft_model_state_dict(model, adapter_name=active_name(model), save_embedding_layers=False)
    known = adapter_tensors(model)  # embeddings are stored too where they are adapted
    if missing := expected.keys() - stored.keys():
        return f"{min(missing)} is missing"
    if left_over := stored.keys() - known.keys():
        return f"{min(left_over)} has no place here"
    for name, tensor in stored.items():
        if tuple(tensor.shape) != shape_of(known[name]):
            return f"{name} is {list(tensor.shape)} there, {list(shape_of(known[name]))} here"
    return None


def read_adapter_tensors(name: str, revision: str = "main") -> dict[str, Tensor]:
    """An adapter's tensors, by the names that they have in its file."""
    with third_party(f"{name}: {WEIGHTS_NAME} cannot be read"):
        stored = load_file(str(cached_file(name, WEIGHTS_NAME, revision=revision)))
    # peft stores a fully trained module of a resized vocabulary a second time, under another name
    twice = [key for key in stored if ".modules_to_save." in key and key.replace(".modules_to_save", "") in stored]
    return {key: tensor for key, tensor in stored.items() if key not in twice}


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The weights of ``model``: the adapter's by their names in its file, the others by their own names."""
    weights = model.state_dict(keep_vars=True)
    adapter = get_peft_model_state_dict(model, weights, adapter_name=active_name(model), save_embedding_layers=False)
    return {**weights, **adapter}


def unchanged_base_weights(model: PeftModel) -> dict[str, Any] | None:
    """The base model's weights by its own names, if the adapter adds nothing to them yet; None if it does."""
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(f".{factor}." in name for factor in ("lora_B", "lora_embedding_A")):  # a new adapter's are 0
            with gathered(tensor):
                if bool(tensor.any()):
                    return None
        elif any(f".{factor}." in name for factor in ("lora_A", "lora_embedding_B")):
            continue
        elif any(f".{adapter}." in f"{name}." for adapter in model.peft_config):  # of another kind
            return None
        else:
            found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return found


# ---- Other changes before training: dropout, parts without gradients, 4-bit layers.


def disable_dropout(model: nn.Module) -> None:
    """Set every probability of dropout in ``model`` to 0, and the noise that some routers add to their inputs.

    Layers without an ``nn.Dropout`` read the probability from an attribute, under many names (``residual_dropout``,
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
    """The largest parts of ``model``, by name, that take no part in a forward pass of text alone.

    These are the parts of a multimodal model outside its language model and its output or score layer (vision and audio
    towers), and a language model's own layers of cross-attention to images. A model of text alone has none.
    """
    inner: Any = causal_lm(model)
    config = inner.config
    text = config.get_text_config()
    crossing = getattr(text, "cross_attention_layers", None) or []
    found: dict[str, nn.Module | nn.Parameter] = {
        name: module
        for number in crossing
        for name, module in inner.named_modules()
        if name.endswith(f"layers.{number}") and "CrossAttention" in type(module).__name__
    }
    if text is config:
        return found
    reached = (inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings(), score_head(inner))
    kept = {id(module) for one in reached if one is not None for module in one.modules()}
    return found | dict(_outside(inner, kept, ""))


def _outside(module: nn.Module, kept: set[int], prefix: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in module.named_children():
        inside = {id(one) for one in child.modules()}
        if id(child) in kept:
            continue
        if inside & kept:
            yield from _outside(child, kept, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def freeze_parts_unused_by_text(model: nn.Module) -> None:
    """Freeze the parts that text does not use, and report them.

    Such weights get no gradient: DDP would wait for one, and weight decay would shrink them.
    """
    names, count = [], 0
    for name, part in parts_unused_by_text(model).items():
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        if trained:
            names.append(name)
            count += sum(parameter.numel() for parameter in trained)
    if names:
        logger.warning("not trained, because text does not use it: %s (%s parameters)", ", ".join(names), f"{count:,}")


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes does so at a layer's first forward pass in evaluation mode, permanently:
    from then on products are rounded to bf16, and gradients do not pass through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
