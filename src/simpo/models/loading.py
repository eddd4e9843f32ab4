"""Loads models and tokenizers from the hub or a folder, and checks that their files are complete."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.llama import modeling_llama
from transformers.utils import GENERATION_CONFIG_NAME

from simpo.config.text import read_text_file
from simpo.data.chat_template import end_of_turn
from simpo.errors import SimpoError, one_line, third_party
from simpo.models.adapters import add_adapter, continue_adapter, find_adapter, prevent_repacking
from simpo.models.files import PICKLE, check_config, check_tokenizer, check_weight_files
from simpo.models.settings import ModelArguments
from simpo.runs.files import write_text

logger = logging.getLogger(__name__)

# Attention masks that old checkpoints store like weights; not every architecture declares them.
_STORED_MASKS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(inv_freq|position_ids)$")
# Parts of a checkpoint that its text-only class does not have.
_OTHER_MODALITIES = re.compile(r"(^|\.)(vision|visual|audio|multi_modal)\w*\.")
_NEEDS_REMOTE_CODE = "it needs custom code; review it, then allow it with trust_remote_code (--trust_remote_code)"
_FAULTS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "with the wrong shape"}
_FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def load_model(model: str | ModelArguments) -> PreTrainedModel | PeftModel:
    """Load a causal language model, with an adapter if ``model`` names one or ``use_peft`` asks for a new one.

    Weights are fp32 unless ``dtype`` is given: at the learning rates of preference optimization, most of Adam's updates
    would be rounded away in bf16 weights. ``bf16: true`` computes in bf16 from fp32 weights. An adapter's weights are
    always fp32, and those of a new adapter are drawn from torch's global generator.
    """
    arguments = ModelArguments.of(model)
    name = arguments.model_name_or_path
    check_folder(name)
    adapter = find_adapter(name, arguments.model_revision)
    if adapter is not None:
        try:
            base = _load_causal(base_arguments(adapter, arguments))
        except SimpoError as error:
            if not str(error).startswith("model_name_or_path: "):
                raise
            reason = str(error).removeprefix("model_name_or_path: ")
            raise SimpoError(
                f"model_name_or_path: {name} is an adapter whose base model is missing: {reason}"
            ) from error
        base.generation_config = generation_config(name, arguments.model_revision) or base.generation_config
        return continue_adapter(base, adapter, name, revision=arguments.model_revision, given=arguments.lora)
    if not arguments.use_peft and (unused := [*arguments.lora, *arguments.quantization]):
        raise SimpoError(f"{unused[0]}: applies only to adapters; set use_peft: true, or leave it out")
    loaded = _load_causal(arguments)
    return add_adapter(loaded, arguments.lora, arguments.model_revision) if arguments.use_peft else loaded


def check_model_files(arguments: ModelArguments) -> None:
    """Raise :class:`SimpoError` if a model's files are incomplete; for engines that load the weights themselves."""
    _load_causal(base_model_of(arguments), device_map="meta")


def _load_causal(arguments: ModelArguments, **options: Any) -> PreTrainedModel:
    config = load_files(AutoConfig, arguments)
    if (Path(arguments.model_name_or_path) / GENERATION_CONFIG_NAME).exists():  # from_pretrained ignores a damaged one
        generation_config(arguments.model_name_or_path, arguments.model_revision)
    model, loading = load_weights(auto_class(config), arguments, **options)
    if type(model.config) is not type(config):  # transformers extracted the language model from a larger checkpoint
        loading["unexpected_keys"] = {key for key in loading["unexpected_keys"] if not _OTHER_MODALITIES.search(key)}
        logger.warning(
            "%s: only its language model (%s) is loaded and saved", config.name_or_path, type(model).__name__
        )
    check_weights(arguments.model_name_or_path, model, loading)
    if not arguments.quantization:
        return model
    prevent_repacking(model)
    # Converts everything that is not quantized (norms, embeddings, output layer) to fp32.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def auto_class(config: Any) -> Any:
    """Return the ``Auto`` class for causal language models or, if there is none, for models of text and images."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    if not config.is_encoder_decoder:
        for mapping, auto in zip(mappings, classes, strict=True):
            if type(config) in mapping:
                return auto
    return AutoModelForCausalLM  # either there is custom code, or transformers explains the problem


def load_weights(auto: Any, arguments: ModelArguments, **options: Any) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """Load a model, and return it with its missing, unexpected and mismatched weights, for :func:`check_weights`.

    Tied weights, and those that transformers itself expects to be missing or unexpected, are not included.
    """
    options = _loading_options(arguments) | options
    check_weight_files(arguments, load_files(AutoConfig, arguments))
    if find_adapter(arguments.model_name_or_path, arguments.model_revision) is not None:  # a base model on the hub
        raise SimpoError(
            f"model_name_or_path: {arguments.model_name_or_path!r} is itself an adapter; name a full model"
        )
    if not arguments.allow_pickle:
        options["use_safetensors"] = True
    if arguments.trust_remote_code:  # code written for transformers 4, such as ArmoRM's, imports this name
        modeling_llama.__dict__.setdefault("LLAMA_INPUTS_DOCSTRING", "")
    with _without_report():
        model, loading = load_files(auto, arguments, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    text = model.config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap and text._attn_implementation == "sdpa" and "attn_implementation" not in options:
        model.set_attn_implementation("eager")  # sdpa has no softcap, and transformers 5.17 silently drops it
    loading["unexpected_keys"] = {key for key in loading["unexpected_keys"] if not _STORED_MASKS.search(key)}
    return model, loading


def _loading_options(arguments: ModelArguments) -> dict[str, Any]:
    """Build the ``from_pretrained`` options for dtype, quantization and attention."""
    dtype: Any = arguments.dtype or "float32"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": dtype}
    attention = arguments.attn_implementation
    if attention is not None:
        package = _FLASH_PACKAGES.get(attention, attention)
        flash = attention.startswith("flash_attention")
        if flash and (importlib.util.find_spec(package) is None or not torch.cuda.is_available()):
            # Not an error, because packed batches do not need it.
            logger.warning(
                "attn_implementation: %s is not available here; generation uses the model's default", attention
            )
        else:
            options["attn_implementation"] = attention
    if quantization := arguments.quantization:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SimpoError("load_in_4bit: bitsandbytes is not installed; pip install 'simpo[qlora]'")
        if arguments.dtype in (None, "auto"):  # the dtype of matrix products; bf16 gains nothing on a CPU
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=quantization["bnb_4bit_quant_type"],
            bnb_4bit_use_double_quant=quantization["use_bnb_nested_quant"],
        )
        options["device_map"] = {"": PartialState().local_process_index if torch.cuda.is_available() else "cpu"}
    return options


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' table of missing and unexpected weights; :func:`check_weights` reports them.

    It uses a filter, because setting a level on that logger would also enable checks of multi-GPU plans.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    transformers_logger = logging.getLogger("transformers.modeling_utils")
    transformers_logger.addFilter(is_other)
    try:
        yield
    finally:
        transformers_logger.removeFilter(is_other)


def check_weights(name: str, model: PreTrainedModel, loading: Mapping[str, set[Any]]) -> None:
    """Raise :class:`SimpoError` for missing (transformers would initialize them), unexpected or mismatched weights."""
    faults = []
    for fault, description in _FAULTS.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in loading[fault])
        if keys:
            faults.append(f"{len(keys)} {description} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if faults:
        advice = "name a folder whose config.json and weights belong together"
        raise SimpoError(
            f"model_name_or_path: {name!r} does not contain the weights of a {type(model).__name__}: "
            f"{'; '.join(faults)}; {_NEEDS_REMOTE_CODE if has_remote_code(model) else advice}"
        )


def has_remote_code(model: PreTrainedModel) -> bool:
    """Whether ``model`` has a class from transformers although its files come with their own code."""
    return type(model).__module__.startswith("transformers.") and bool(getattr(model.config, "auto_map", None))


def load_files(auto: Any, arguments: ModelArguments, **options: Any) -> Any:
    """Call ``from_pretrained`` of a transformers ``Auto`` class, and turn its errors into one line."""
    name = arguments.model_name_or_path
    check_folder(name)
    check_config(arguments)
    if auto is AutoTokenizer:
        check_tokenizer(arguments)
    try:
        return auto.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code, **options
        )
    except Exception as error:  # damaged files and custom code can raise anything
        reason = one_line(error, None)
        if "trust_remote_code" in reason and not arguments.trust_remote_code:
            reason = _NEEDS_REMOTE_CODE
        elif "Unrecognized configuration class" in reason:
            reason = f"transformers has no {auto.__name__.removeprefix('Auto')} for models of its type"
        elif options.get("use_safetensors") and "model.safetensors" in reason and isinstance(error, OSError):
            reason = f"it has no model.safetensors; if its weights are in pytorch_model.bin, that is {PICKLE}"
        raise SimpoError(f"model_name_or_path: {name!r} cannot be loaded: {reason[:500]}") from error


def check_folder(name: str) -> None:
    """Raise :class:`SimpoError` for a path that does not exist, before it is mistaken for a name on the hub."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise SimpoError(f"model_name_or_path: there is no folder {name!r}")


def generation_config(name: str, revision: str) -> GenerationConfig | None:
    """Load the generation settings saved with a model or an adapter, or None if there are none."""
    try:
        with third_party(f"model_name_or_path: {name!r}: generation_config.json"):
            config = GenerationConfig.from_pretrained(name, revision=revision)
    except SimpoError as error:
        if isinstance(error.__cause__, OSError) and not (Path(name) / GENERATION_CONFIG_NAME).exists():
            return None
        raise
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(end is None or type(end) is int for end in ends):
        raise SimpoError(
            f"model_name_or_path: {name!r}: generation_config.json: eos_token_id: {ends!r} contains invalid token ids"
        )
    return config


def base_model_of(arguments: ModelArguments) -> ModelArguments:
    """Return ``arguments`` for the base model if they name an adapter, otherwise unchanged."""
    check_folder(arguments.model_name_or_path)
    adapter = find_adapter(arguments.model_name_or_path, arguments.model_revision)
    return arguments if adapter is None else base_arguments(adapter, arguments)


def base_arguments(adapter: LoraConfig, arguments: ModelArguments) -> ModelArguments:
    """Return ``arguments`` for the base model of ``adapter``."""
    base, revision = adapter.base_model_name_or_path, adapter.revision or "main"
    return dataclasses.replace(arguments, model_name_or_path=base, model_revision=revision)


def load_tokenizer(model: str | ModelArguments, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, optionally with another ``chat_template`` (a template, a file, or ``"none"``).

    An adapter saved without a tokenizer gets its base model's, which is logged.
    """
    arguments = ModelArguments.of(model)
    name = arguments.model_name_or_path
    tokenizer = _load_own_or_base(AutoTokenizer, arguments)
    with third_party(f"model_name_or_path: {name!r}: its tokenizer does not work"):  # e.g. settings of wrong types
        tokenizer.decode(tokenizer("a").input_ids)
    if chat_template is None:
        return tokenizer
    if chat_template.strip().lower() == "none":
        tokenizer.chat_template = None
    elif "{" in chat_template:
        tokenizer.chat_template = chat_template
    else:
        with third_party(f"chat_template: {chat_template[:80]!r} is neither a template nor a file with one"):
            tokenizer.chat_template = read_text_file(chat_template)
    return tokenizer


def load_processor(model: str | ModelArguments, *, chat_template: str | None = None) -> ProcessorMixin:
    """Load the processor of a vision-language model, with the tokenizer from :func:`load_tokenizer`."""
    arguments = ModelArguments.of(model)
    tokenizer = load_tokenizer(arguments, chat_template=chat_template)
    processor = _load_own_or_base(AutoProcessor, arguments)
    if not isinstance(processor, ProcessorMixin):
        raise SimpoError(
            f"model_name_or_path: {arguments.model_name_or_path!r} has no processor; rows with images need one"
        )
    processor.tokenizer = tokenizer
    if chat_template is not None:
        processor.chat_template = tokenizer.chat_template
    return processor


def _load_own_or_base(auto: Any, arguments: ModelArguments) -> Any:
    """Load a tokenizer or processor from the model's files, or from the base model's if an adapter has none."""
    name = arguments.model_name_or_path
    check_folder(name)  # otherwise a missing folder would be looked up as an adapter on the hub
    try:
        return load_files(auto, arguments)
    except SimpoError:
        adapter = find_adapter(name, arguments.model_revision)
        if adapter is None:
            raise
        logger.warning("%s has no %s; using its base model's", name, auto.__name__.removeprefix("Auto").lower())
        return load_files(auto, base_arguments(adapter, arguments))


def round_weights(folder: Path, dtype: str) -> None:
    """Round the weights of a saved model or adapter to ``dtype``, file by file, and update ``config.json``."""
    kind, size = getattr(torch, dtype), 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in load_file(path).items()}
        size += sum(tensor.nbytes for tensor in tensors.values())
        replacement = path.with_suffix(".rounded")
        save_file(tensors, replacement, metadata={"format": "pt"})
        replacement.replace(path)  # not written in place, because the tensors are still memory-mapped from the file
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = size
        write_text(path, json.dumps(index, indent=2) + "\n")
    if (path := folder / "config.json").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = dtype
        write_text(path, json.dumps(config, indent=2) + "\n")


def stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Make generation stop at the token that ends a response in training, and log the change.

    A base model's generation settings lack the chat template's end-of-turn token.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or tokenizer is None:  # the model does not generate, or the data was tokenized elsewhere
        return
    current, end = settings.eos_token_id, end_of_turn(tokenizer)
    ids = [] if current is None else current if isinstance(current, list) else [current]
    if end.token_id not in ids:
        settings.eos_token_id = [*ids, end.token_id]
        logger.warning("generation_config: added the end-of-turn token %s to eos_token_id", end.text)
