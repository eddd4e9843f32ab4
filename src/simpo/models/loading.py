"""Models and tokenizers from the hub or a folder, and the device they run on."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama import modeling_llama

from simpo.errors import SimpoError
from simpo.models.adapters import add_adapter, continue_adapter, find_adapter, four_bits, frozen
from simpo.models.limits import Limits
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import write_text

logger = logging.getLogger(__name__)


# Attention masks that old checkpoints store as if they were weights; not every architecture declares them.
_STORED_MASKS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)(inv_freq|position_ids)$")


# Parts of a checkpoint that its architecture's class for text alone does not have.
_OTHER_MODALITIES = re.compile(r"(^|\.)(vision|visual|audio|multi_modal)\w*\.")


_OWN_CODE = "it has code of its own; read it, and allow it with trust_remote_code (--trust_remote_code)"


_FAULTS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}


def load_model(name: str, arguments: ModelArguments | None = None) -> PreTrainedModel | PeftModel:
    """A causal language model, under an adapter if ``name`` is one or ``use_peft`` asks for a new one.

    Weights are fp32 unless ``dtype`` says otherwise: at the learning rates of preference optimization most of Adam's
    updates round to nothing in bf16 weights. ``bf16: true`` computes in bf16 from fp32 weights. An adapter's weights
    are fp32 in any case, its first ones drawn from torch's generator.

    Raises:
        SimpoError: there is no such model, it or its base model cannot be loaded, or settings that contradict.
    """
    arguments = _named(name, arguments)
    check_folder(name)
    adapter = find_adapter(name, arguments.model_revision)
    if adapter is not None:
        base = _load_base(name, adapter, arguments)
        base.generation_config = generation_config(name, arguments.model_revision) or base.generation_config
        return continue_adapter(base, adapter, name, revision=arguments.model_revision, given=arguments.lora)
    if not arguments.use_peft and (useless := [*arguments.lora, *arguments.quantization]):
        raise SimpoError(f"{useless[0]}: only an adapter takes it; set use_peft: true, or leave it out")
    model = _load_causal(arguments)
    return add_adapter(model, arguments.lora, arguments.model_revision) if arguments.use_peft else model


def load_tokenizer(
    name: str, arguments: ModelArguments | None = None, *, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with ``chat_template`` (a template, the path of a file with one, or ``"none"``).

    An adapter that was saved without one gets its base model's, which is reported.

    Raises:
        SimpoError: there is no such tokenizer, or no such template file.
    """
    tokenizer = _load_tokenizer(_named(name, arguments))
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(given: str) -> str | None:
    """The template that a recipe's ``chat_template`` means: its text, a file's text, or None for ``"none"``."""
    if given.strip().lower() == "none":
        return None
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise SimpoError(f"chat_template: {given[:80]!r} is neither a template nor a file of one ({error})") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of ``model`` to 0, those that attention reads from its module included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        config = getattr(module, "config", None)
        if config is not None and isinstance(getattr(config, "hidden_dropout", None), float):  # Falcon reads it there
            config.hidden_dropout = 0.0
        for attribute in ("attention_dropout", "dropout", "layerdrop", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def _attention(asked: str | None) -> str | None:
    """``asked`` where it is installed; packed batches do not need it, so its absence is reported and is no error."""
    if asked is not None and asked.startswith("flash_attention"):
        package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(asked, asked)
        if importlib.util.find_spec(package) is None or not torch.cuda.is_available():
            logger.warning("attn_implementation: %s is not available here; generation uses the model's default", asked)
            return None
    return asked


def generation_config(name: str, revision: str) -> GenerationConfig | None:
    """The generation settings that a model or an adapter was saved with, if it was."""
    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        return None


def load_config(arguments: ModelArguments) -> Any:
    """The configuration of a model, or of the base model of an adapter, without any weights.

    Raises:
        SimpoError: there is no such model.
    """
    return load_files(AutoConfig, below_adapter(arguments))


def below_adapter(arguments: ModelArguments) -> ModelArguments:
    """``arguments`` for the base model if they name an adapter; the same for any other model."""
    check_folder(arguments.model_name_or_path)
    adapter = find_adapter(arguments.model_name_or_path, arguments.model_revision)
    return arguments if adapter is None else base_arguments(adapter, arguments)


def base_arguments(adapter: LoraConfig, arguments: ModelArguments) -> ModelArguments:
    """Which model ``adapter`` is for, to be loaded as ``arguments`` say."""
    base, revision = adapter.base_model_name_or_path, adapter.revision or "main"
    return dataclasses.replace(arguments, model_name_or_path=base, model_revision=revision)


def _named(name: str, arguments: ModelArguments | None) -> ModelArguments:
    return ModelArguments(name) if arguments is None else dataclasses.replace(arguments, model_name_or_path=name)


def _load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    name = arguments.model_name_or_path
    check_folder(name)
    try:
        return load_files(AutoTokenizer, arguments)
    except SimpoError:
        adapter = find_adapter(name, arguments.model_revision)
        if adapter is None:
            raise
        logger.warning("%s has no tokenizer; its base model's is used", name)
        return load_files(AutoTokenizer, base_arguments(adapter, arguments))


def _load_base(name: str, adapter: LoraConfig, arguments: ModelArguments) -> PreTrainedModel:
    """The model that the adapter ``name`` is for."""
    try:
        return _load_causal(base_arguments(adapter, arguments))
    except SimpoError as error:
        key, _, reason = str(error).partition(": ")
        if key != "model_name_or_path":
            raise
        raise SimpoError(f"model_name_or_path: {name} is an adapter whose base model is missing: {reason}") from error


def check_stored(arguments: ModelArguments) -> None:
    """Refuse a model whose files are not its own, without reading the weights: for engines that load it themselves.

    Raises:
        SimpoError: as :func:`load_model`.
    """
    _load_causal(below_adapter(arguments), device_map="meta")


def _load_causal(arguments: ModelArguments, **options: Any) -> PreTrainedModel:
    config = load_files(AutoConfig, arguments)
    model, loading = load_weights(_class_for(config), arguments, **loading_options(arguments), **options)
    if type(model.config) is not type(config):  # transformers reads the language model out of a larger checkpoint
        loading["unexpected_keys"] = {key for key in loading["unexpected_keys"] if not _OTHER_MODALITIES.search(key)}
        logger.warning(
            "%s: only its language model (%s) is loaded, and will be saved", config.name_or_path, type(model).__name__
        )
    check_weights(arguments.model_name_or_path, model, loading)
    return frozen(model) if arguments.quantization else model


def _class_for(config: Any) -> Any:
    """The ``Auto`` class for a causal language model, or for a model of text and images where that is the only one."""
    known = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    if not config.is_encoder_decoder:
        for mapping, auto in zip(known, classes, strict=True):
            if type(config) in mapping:
                return auto
    return AutoModelForCausalLM  # custom code, or transformers' own message


def loading_options(arguments: ModelArguments) -> dict[str, Any]:
    """What ``from_pretrained`` is told of the weights' type, quantization and attention."""
    dtype: Any = arguments.dtype or "float32"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    options = {"dtype": dtype}
    if (attention := _attention(arguments.attn_implementation)) is not None:
        options["attn_implementation"] = attention
    if quantization := arguments.quantization:
        options |= four_bits(
            kind=quantization["bnb_4bit_quant_type"],
            nested=quantization["use_bnb_nested_quant"],
            dtype=_product_type() if arguments.dtype in (None, "auto") else dtype,
        )
    return options


def _product_type() -> torch.dtype:
    """The type that 4-bit weights are multiplied in: bf16 on a GPU, fp32 on a CPU, where bf16 gains nothing."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_files(auto: Any, arguments: ModelArguments, **options: Any) -> Any:
    """``from_pretrained`` of one of transformers' ``Auto`` classes.

    Raises:
        SimpoError: there is no such thing, or it cannot be loaded.
    """
    name = arguments.model_name_or_path
    check_folder(name)
    try:
        return auto.from_pretrained(
            name, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code, **options
        )
    except Exception as error:  # damaged files and code that comes with models raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason and not arguments.trust_remote_code:
            reason = _OWN_CODE
        elif "Unrecognized configuration class" in reason:
            reason = f"transformers has no {auto.__name__.removeprefix('Auto')} for models of its type"
        raise SimpoError(f"model_name_or_path: {name!r} cannot be loaded: {reason[:300]}") from error


def load_weights(auto: Any, arguments: ModelArguments, **options: Any) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """A model, and which weights its files lack, have in addition, or have in another shape; see :func:`check_weights`.

    Weights that are tied, and those that transformers declares as expected, are not among them.

    Raises:
        SimpoError: as :func:`load_files`.
    """
    if arguments.trust_remote_code:  # code from before transformers 5, ArmoRM's for one, imports this text
        modeling_llama.__dict__.setdefault("LLAMA_INPUTS_DOCSTRING", "")
    with _without_report():
        model, loading = load_files(auto, arguments, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    if _loses_softcap(model) and "attn_implementation" not in options:
        model.set_attn_implementation("eager")
    loading["unexpected_keys"] = {key for key in loading["unexpected_keys"] if not _STORED_MASKS.search(key)}
    return model, loading


def check_weights(name: str, model: PreTrainedModel, loading: Mapping[str, set[Any]]) -> None:
    """Refuse a model whose files are not its own: transformers would draw what is missing at random.

    Raises:
        SimpoError: some weights are missing, left over or of another shape; names the first ones.
    """
    faults = []
    for fault, what in _FAULTS.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in loading[fault])
        if keys:
            faults.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if faults:
        advice = "name a folder whose config.json and weights belong together"
        if needs_own_code(model):
            advice = _OWN_CODE
        raise SimpoError(
            f"model_name_or_path: {name!r} does not hold the weights of a {type(model).__name__}: {'; '.join(faults)}; "
            f"{advice}"
        )


def needs_own_code(model: PreTrainedModel) -> bool:
    """Whether ``model`` is one of transformers' own classes although its files name code of theirs."""
    return type(model).__module__.startswith("transformers.") and bool(getattr(model.config, "auto_map", None))


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights; :func:`check_weights` reports them.

    A filter, because that logger also checks a plan for several GPUs wherever a level is set on it.
    """
    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(_is_no_report)
    try:
        yield
    finally:
        theirs.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def round_weights(folder: Path, dtype: str) -> None:
    """Round the weights of a saved model or adapter to ``dtype``, file by file, and note it in ``config.json``."""
    kind, size = getattr(torch, dtype), 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: each.to(kind) if each.is_floating_point() else each for name, each in load_file(path).items()}
        size += sum(each.nbytes for each in tensors.values())
        replacement = path.with_suffix(".rounded")
        save_file(tensors, replacement, metadata={"format": "pt"})
        replacement.replace(path)  # not written in place: what has been read is still mapped from the file
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


def _loses_softcap(model: PreTrainedModel) -> bool:
    """Whether its attention leaves out the bound of its scores, as sdpa does, which transformers 5.17 takes anyway."""
    config = model.config.get_text_config()
    return bool(getattr(config, "attn_logit_softcapping", None)) and config._attn_implementation == "sdpa"


def check_folder(name: str) -> None:
    """Refuse a path that leads nowhere, before it is taken for a name on the hub.

    Raises:
        SimpoError: it does.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise SimpoError(f"model_name_or_path: there is no folder {name!r}")


# ---- Where models that are not trained run, in which type, and what is left of their memory.


def device() -> torch.device:
    """The accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def with_dtype(model: ModelArguments) -> ModelArguments:
    """The arguments with the type of the weights chosen: bf16 on an accelerator and fp32 on a CPU, unless given."""
    chosen = model.dtype or ("float32" if device().type == "cpu" else "bfloat16")
    return dataclasses.replace(model, dtype=chosen)


def free_memory() -> None:
    """Free the memory of models that are no longer needed; trainers and models refer to one another."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before its weights are read.

    Attributes:
        arguments: where it is, with the type of its weights chosen.
        limits: of what it can read.
        generation_config: its generation settings.
    """

    arguments: ModelArguments
    limits: Limits
    generation_config: GenerationConfig

    @property
    def context(self) -> int | None:
        """Positions that the model has; None if it has no bound."""
        return self.limits.positions

    @classmethod
    def read(cls, arguments: ModelArguments) -> Checkpoint:
        """Look at a model on disk or on the hub.

        Weights are bf16 on an accelerator and fp32 on a CPU unless ``dtype`` says otherwise.

        Raises:
            SimpoError: there is no such model.
        """
        config = load_config(arguments)
        base = below_adapter(arguments)
        found = generation_config(arguments.model_name_or_path, arguments.model_revision)
        found = found or generation_config(base.model_name_or_path, base.model_revision)
        return cls(
            with_dtype(arguments),
            Limits.of(config),
            found or GenerationConfig.from_model_config(config),  # a checkpoint need not have one
        )

    def load(self) -> PreTrainedModel:
        """The model, on the accelerator if there is one.

        Raises:
            SimpoError: it cannot be loaded.
        """
        model: Any = load_model(self.arguments.model_name_or_path, self.arguments)
        return model.to(device())
