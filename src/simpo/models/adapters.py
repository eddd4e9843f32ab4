"""LoRA adapters, 4-bit base models, and the parts of a model that text cannot reach."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, ModulesToSaveWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from simpo.errors import SimpoError
from simpo.models.zero import gathered, shape_of
from simpo.packing.model import causal_lm, is_reward_model

# ---- Parts of a model that text does not reach: the vision and audio towers of models that also see or hear.


logger = logging.getLogger(__name__)


def unreached_by_text(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """The largest parts of ``model``, by name, that take no part in a forward of text alone.

    These are the parts of a conditional-generation model outside its language model and its output layer, and a
    language model's own layers of cross-attention to images. None for a model of text alone.
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
    reached = (inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings())
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


def freeze_unreached(model: nn.Module) -> None:
    """Stop training what text does not reach, and report it.

    Such weights get no gradient: DDP waits for one, and weight decay would shrink them.
    """
    names, count = [], 0
    for name, part in unreached_by_text(model).items():
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        if trained:
            names.append(name)
            count += sum(parameter.numel() for parameter in trained)
    if names:
        logger.warning(
            "not trained, because text does not reach it: %s (%s parameters)", ", ".join(names), f"{count:,}"
        )


# What recipes call an adapter's settings: what peft calls them, and the default.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", "all-linear"),
    "lora_modules_to_save": ("modules_to_save", None),
    "use_rslora": ("use_rslora", False),
}


PARTS_TIED = (
    "the adapter changes the embeddings or the output layer, which are one matrix in this model: it can be used, but "
    "not merged"
)


def adapter_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a new adapter, by the names that recipes have for them: those given, and the others' defaults."""
    return {key: given.get(key, default) for key, (_, default) in _SETTINGS.items()}


def find_adapter(name: str, revision: str = "main") -> LoraConfig | None:
    """The configuration of the adapter that a folder or hub repository holds; None if it holds none.

    Raises:
        SimpoError: it cannot be read, is no LoRA, or does not name its base model.
    """
    try:
        found = find_adapter_config_file(name, revision=revision)
        config = None if found is None else PeftConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SimpoError(f"model_name_or_path: {name!r} cannot be loaded: {_line(error)}") from error
    if config is None:
        _check_no_adapter_inside(Path(name))
        return None
    if not isinstance(config, LoraConfig):
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter of another kind than LoRA ({config.peft_type})")
    if not config.base_model_name_or_path:
        raise SimpoError(f"model_name_or_path: {name!r} is an adapter that does not name its base model")
    return config


def _check_no_adapter_inside(folder: Path) -> None:
    """Refuse a folder that is no model and holds adapters under their names, as peft saves those it did not name."""
    if not (folder / "config.json").exists() and (found := sorted(folder.glob(f"*/{CONFIG_NAME}"))):
        names = ", ".join(str(path.parent) for path in found)
        raise SimpoError(f"model_name_or_path: {str(folder)!r} is no adapter itself; name the one in it: {names}")


def add_adapter(model: PreTrainedModel, given: Mapping[str, Any], revision: str = "main") -> PeftModel:
    """``model``, frozen, under a new LoRA that changes nothing yet; the adapter's weights are fp32 at least.

    Args:
        model: the base model.
        given: settings by the names that recipes have for them; the others get their defaults.
        revision: the base model's, which the adapter will be saved with.

    Raises:
        SimpoError: a setting that peft or the model cannot take.
    """
    settings = {_SETTINGS[key][0]: value for key, value in adapter_settings(given).items()}
    left_out = list(unreached_by_text(model))
    if left_out:
        logger.warning("no adapter on what text does not reach: %s", ", ".join(left_out))
    left_out += _unlike_linear(model)
    if left_out:
        settings["exclude_modules"] = rf"({'|'.join(map(re.escape, left_out))})(\..*)?"
    base = model.name_or_path
    try:
        with _without_noise():
            adapted: Any = get_peft_model(model, LoraConfig(task_type=_task_of(model), **settings), revision=revision)
    except (ValueError, TypeError) as error:
        advice = "; set lora_dropout: 0" if "lora_dropout" in str(error) else ""  # on experts of a mixture
        raise SimpoError(f"use_peft: the adapter cannot be put on the model ({_line(error)}){advice}") from error
    _check_names(adapted, given)
    if parts_tied(adapted):
        logger.warning(PARTS_TIED)
    _settle(adapted, base)
    return adapted


def _unlike_linear(model: PreTrainedModel) -> list[str]:
    """Names of layers that the model's own code derives from linear ones with another forward, such as a router.

    An adapter would add to their output what need not be one tensor. Others derive linear layers too (4 bits, FSDP).
    """
    own = [
        (name, type(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__ == type(model).__module__
    ]
    names = [name for name, kind in own if kind.forward is not nn.Linear.forward]
    if names:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        logger.warning("no adapter on layers that are not plain linear ones: %s", ", ".join(kinds))
    return names


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter on a model in memory that could not be trained or saved as it is.

    Raises:
        SimpoError: it adds tokens to the input, which packed batches do not have, or it is one of several.
    """
    kinds = {config.peft_type.value for config in model.peft_config.values() if config.is_prompt_learning}
    if kinds:
        raise SimpoError(f"model: {', '.join(sorted(kinds))} is not supported; use LoRA")
    if len(model.peft_config) > 1 and active_name(model) != "default":
        names = ", ".join(model.peft_config)
        raise SimpoError(f"model: it has the adapters {names}; remove all but the one to train with delete_adapter")


def active_name(model: PeftModel) -> str:
    """The name of the adapter that is trained."""
    return model.active_adapters[0]


def flatten_named(model: PeftModel, folder: Path) -> None:
    """Move an adapter that was saved in a subfolder of its own name to where everybody looks for one."""
    own = folder / active_name(model)
    if own.name != "default" and own.is_dir():
        for path in own.iterdir():
            path.replace(folder / path.name)
        own.rmdir()


def continue_adapter(
    model: PreTrainedModel, config: LoraConfig, name: str, *, revision: str = "main", given: Mapping[str, Any]
) -> PeftModel:
    """``model``, frozen, under the adapter of the folder or hub repository ``name``, to be trained further or used.

    Args:
        model: the base model.
        config: what :func:`find_adapter` found there.
        name: where the adapter is.
        revision: the adapter's, on the hub.
        given: settings that must be the adapter's own.

    Raises:
        SimpoError: a setting that is not the adapter's, weights that are missing, or those of another base model.
    """
    for key, value in given.items():
        own = getattr(config, _SETTINGS[key][0])
        if (set(own) if isinstance(own, set | list) else own) != (set(value) if isinstance(value, list) else value):
            shown = ", ".join(sorted(own)) if isinstance(own, set | list) else own
            raise SimpoError(f"{key}: {name} is an adapter with {shown}, which is continued; leave {key} out")
    base = model.name_or_path
    stored = stored_adapter(name, revision)
    _resize_vocabulary(model, stored, name)
    config.inference_mode = False
    try:
        with _without_noise():
            adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[_task_of(model)](model, config)
    except (ValueError, TypeError) as error:
        raise SimpoError(f"model_name_or_path: {name}: an adapter for another model ({_line(error)})") from error
    _settle(adapted, base)
    if fault := _fault(adapted, stored):
        raise SimpoError(f"model_name_or_path: {name}: an adapter for another model than {base!r} ({fault})")
    set_peft_model_state_dict(adapted, stored)
    return adapted


def _resize_vocabulary(model: PreTrainedModel, stored: Mapping[str, Tensor], name: str) -> None:
    """Give ``model`` as many tokens as the adapter was trained with, if the adapter brings all of their weights.

    Raises:
        SimpoError: it brings the embeddings of another vocabulary, but not the output layer that belongs to it.
    """
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


def parts_tied(model: PeftModel) -> bool:
    """Whether the adapter changes one of two matrices that the model ties, so that no whole model has its numbers."""
    base: Any = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    changed = any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in ends)
    return changed and bool(getattr(base.config, "tie_word_embeddings", False))


def describe_adapter(model: PeftModel) -> str:
    """How many of the parameters of ``model`` are trained, as text."""
    trained, total = model.get_nb_trainable_parameters()
    return f"adapter: {trained:,} of {total:,} parameters are trained"


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter's weights are in ``folder``."""
    return (folder / WEIGHTS_NAME).is_file()


def adapter_fault(model: PeftModel, folder: Path) -> str | None:
    """Why ``folder`` does not hold an adapter of ``model``'s shape, as text; None if it does."""
    if not holds_adapter(folder):
        return "a whole model there, an adapter here"
    return _fault(model, stored_adapter(str(folder)))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Give the adapter on ``model`` the weights in ``folder``; :func:`adapter_fault` has looked at them."""
    set_peft_model_state_dict(model, stored_adapter(str(folder)), adapter_name=active_name(model))


def stored_adapter(name: str, revision: str = "main") -> dict[str, Tensor]:
    """An adapter's tensors, by the names that they have in its file.

    Raises:
        SimpoError: the file cannot be read.
    """
    try:
        stored = load_file(str(cached_file(name, WEIGHTS_NAME, revision=revision)))
    except (OSError, ValueError, SafetensorError) as error:
        raise SimpoError(f"{name}: {WEIGHTS_NAME} cannot be read: {_line(error)}") from error
    # of a resized vocabulary, peft stores a module that is trained whole a second time, under another name
    twice = [key for key in stored if ".modules_to_save." in key and key.replace(".modules_to_save", "") in stored]
    return {key: tensor for key, tensor in stored.items() if key not in twice}


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The weights of ``model`` by their own names and, of its adapter's, by those that they have in a file."""
    weights = model.state_dict(keep_vars=True)
    own = get_peft_model_state_dict(model, weights, adapter_name=active_name(model), save_embedding_layers=False)
    return {**weights, **own}


def weights_below(model: PeftModel) -> dict[str, Any] | None:
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


def _check_names(model: PeftModel, given: Mapping[str, Any]) -> None:
    """Refuse names that no layer has; peft passes over one among others."""
    whole = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for key, found in (
        ("lora_target_modules", model.base_model.targeted_module_names),
        ("lora_modules_to_save", whole),
    ):
        wanted = given.get(key) or ()
        for end in () if isinstance(wanted, str) else sorted(wanted):
            if not any(f".{name}".endswith(f".{end}") for name in found):
                raise SimpoError(f"{key}: no suitable layer's name ends with {end!r}; leave it out")


def _task_of(model: PreTrainedModel) -> str:
    """What peft calls it; the score head of a reward model is trained whole, and stored with the adapter."""
    return "SEQ_CLS" if is_reward_model(model) else "CAUSAL_LM"


def _fault(model: PeftModel, stored: Mapping[str, Tensor]) -> str | None:
    """What is missing, left over or of another shape in an adapter's file; peft would only warn of the first two."""
    own = get_peft_model_state_dict(model, adapter_name=active_name(model), save_embedding_layers=False)
    known = adapter_tensors(model)  # embeddings are stored too where they are adapted
    if lacking := own.keys() - stored.keys():
        return f"{min(lacking)} is missing"
    if left_over := stored.keys() - known.keys():
        return f"{min(left_over)} has no place here"
    for name, tensor in stored.items():
        if tuple(tensor.shape) != shape_of(known[name]):
            return f"{name} is {list(tensor.shape)} there, {list(shape_of(known[name]))} here"
    return None


def _settle(model: PeftModel, base: str) -> None:
    """Let the adapter's file say where its base model is, wherever it is read from, and be the same every time."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    for key in ("target_modules", "target_parameters"):  # sets, which are written in another order every time
        if isinstance(getattr(config, key), set):
            setattr(config, key, sorted(getattr(config, key)))
    if config.modules_to_save is not None:  # peft adds a score head every time
        config.modules_to_save = sorted(set(config.modules_to_save))


@contextmanager
def _without_noise() -> Iterator[None]:
    """Without what peft says of transformers' names, of tied weights, and of those that it transposes by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- Base models in 4 bits, for adapters to be trained on (QLoRA, arXiv 2305.14314).


def four_bits(*, kind: Literal["nf4", "fp4"], nested: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` that load a model in 4 bits a weight onto this process's GPU, or the CPU.

    Args:
        kind: of 4-bit numbers.
        nested: whether their scales are quantized too.
        dtype: that weights are expanded to for a product.

    Raises:
        SimpoError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SimpoError("load_in_4bit: bitsandbytes is not installed; pip install 'simpo[qlora]'")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
    )
    place = PartialState().local_process_index if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights for inference.

    On CPUs with AVX512-BF16, bitsandbytes does so at a layer's first forward in evaluation mode, for good: from then on
    products are rounded to bf16, and gradients do not pass through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A quantized model ready for an adapter, with what is not quantized (norms, embeddings, output layer) in fp32."""
    keep_gradients(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
