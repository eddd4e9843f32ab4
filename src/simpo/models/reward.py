"""Loads reward models: transformers sequence classifiers with one label, from files or on top of a language model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from simpo.data.chat_template import end_of_turn
from simpo.errors import SimpoError
from simpo.models.adapters import add_adapter, continue_adapter, find_adapter
from simpo.models.loading import base_arguments, check_folder, check_weights, has_remote_code, load_files, load_weights
from simpo.models.settings import ModelArguments
from simpo.packing.layout import TokenizedComparison
from simpo.packing.model import causal_lm, reading_last_tokens

logger = logging.getLogger(__name__)

_HEAD = "score.weight"
_OUTPUT_LAYERS = {"lm_head", "embed_out", "unembed", "head"}  # names in files; classes use the first


def load_reward_model(
    model: str | ModelArguments, *, new_head: bool = False, gated: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a reward model, with an adapter if ``model`` names one or ``use_peft`` asks for a new one.

    ``new_head`` gives a language model a random score head, which is logged, instead of rejecting it. ``gated`` accepts
    custom models with several labels, which may combine them into one score; see :func:`gated_scores`.
    """
    arguments = ModelArguments.of(model)
    name, revision = arguments.model_name_or_path, arguments.model_revision
    if arguments.load_in_4bit:
        raise SimpoError("load_in_4bit: not supported for reward models; leave it out")
    check_folder(name)
    adapter = find_adapter(name, revision)
    if adapter is not None:
        if adapter.task_type != "SEQ_CLS":
            raise SimpoError(
                f"model_name_or_path: {name} is an adapter for a language model; merge it first: simpo merge {name}"
            )
        base = _load(base_arguments(adapter, arguments), new_head=True)
        return continue_adapter(base, adapter, name, revision=revision, given=arguments.lora)
    loaded = _load(arguments, new_head=new_head, gated=gated, log=True)
    return add_adapter(loaded, arguments.lora, revision) if arguments.use_peft else loaded


def _load(arguments: ModelArguments, *, new_head: bool, gated: bool = False, log: bool = False) -> PreTrainedModel:
    name = arguments.model_name_or_path
    labels = {}
    if new_head:
        kinds = load_files(AutoConfig, arguments).architectures or []
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            labels = {"num_labels": 1}
    model, loading = load_weights(AutoModelForSequenceClassification, arguments, **labels)
    head_is_new = bool(labels) and _HEAD in loading["missing_keys"]
    if head_is_new:
        loading["missing_keys"].discard(_HEAD)
        loading["unexpected_keys"] = {key for key in loading["unexpected_keys"] if not _in_output_layer(model, key)}
    elif loading["missing_keys"] == {_HEAD} and not has_remote_code(model):
        raise SimpoError(f"model_name_or_path: {name!r} is not a reward model: its files contain no {_HEAD}")
    check_weights(name, model, loading)
    custom = not type(model).__module__.startswith("transformers.")
    if model.config.num_labels != 1 and not (gated and custom):
        raise SimpoError(f"model_name_or_path: {name!r} has {model.config.num_labels} labels; a reward model has one")
    if head_is_new and log:
        logger.warning("%s is a language model: replaced its output layer with a random score head", name)
    return model


@torch.no_grad()
def gated_scores(model: PreTrainedModel, comparisons: Sequence[TokenizedComparison]) -> Tensor:
    """Score all responses, ``[R]``, with a model that combines several objectives itself, such as ArmoRM.

    Its custom code gets one text at a time, without padding, and must return a ``score``.
    """
    scores = []
    with reading_last_tokens(model):
        for comparison in comparisons:
            for response in comparison.response_ids:
                ids = torch.tensor([[*comparison.prompt_ids, *response]], device=model.device)
                try:
                    score = getattr(model(input_ids=ids, attention_mask=torch.ones_like(ids)), "score", None)
                except ValueError as error:
                    raise SimpoError(f"{model.name_or_path}: its own code rejected a text: {error}") from error
                if score is None or score.numel() != 1:
                    raise SimpoError(
                        f"{model.name_or_path}: it has {model.config.num_labels} labels and its code returns no single "
                        "score; a reward model has one"
                    )
                scores.append(score.float().flatten())
    return torch.cat(scores)


def _in_output_layer(model: PreTrainedModel, key: str) -> bool:
    """Whether ``key`` belongs to the output layer of a language model, which the score head replaces."""
    module = key.rpartition(".")[0]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    tied = {tied.rpartition(".")[0] for tied in getattr(causal, "_tied_weights_keys", None) or ()}
    return module in tied or module.rpartition(".")[2] in _OUTPUT_LAYERS


def choose_padding(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a padding token so that plain transformers reads rewards at the right token, even in a padded batch.

    transformers reads them at the last token that is not padding, so the end-of-turn token must not be padding. If the
    tokenizer pads with it, another special token becomes the padding token of model and tokenizer. If there is no
    other, the model gets no padding token, and plain transformers will score only one sequence at a time.
    """
    config: Any = causal_lm(model).config.get_text_config()
    end = end_of_turn(tokenizer).token_id
    others = [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) != end]
    if tokenizer.pad_token_id in (None, end) and others:
        tokenizer.pad_token = others[0]
        logger.warning("the tokenizer now pads with %s, because rewards are read at the end-of-turn token", others[0])
    config.pad_token_id = None if tokenizer.pad_token_id == end else tokenizer.pad_token_id
