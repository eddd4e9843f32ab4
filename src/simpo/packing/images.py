"""Prepares the image inputs of a model's forward; each image is encoded once for all responses to its prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.packing.attention import LAYOUT_ARGUMENT
from simpo.packing.layout import ImageTensors, PackedBatch, PaddedRows

# Arguments that mark image tokens with 1. In Gemma 3, tokens marked by the first attend to each other both ways.
_BIDIRECTIONAL = "token_type_ids"
_MASKS = (_BIDIRECTIONAL, "mm_token_type_ids")


def check_image_inputs(model: PreTrainedModel, image: ImageTensors, expected: Mapping[str, Tensor]) -> None:
    """Raise :class:`SimpoError` unless :func:`forward_inputs` builds the same inputs as the model's own processor.

    ``image`` holds the tensors of one image, and ``expected`` everything that the processor returns for a text that
    consists of this image twice; ``input_ids`` are ``[1, L]``.
    """
    name, accepted = type(model).__name__, _arguments(model)
    if "pixel_values" not in accepted or getattr(model.config, "image_token_id", None) is None:
        raise SimpoError(f"images: {name} takes no images; leave the column out, or choose a vision-language model")
    built = forward_inputs(model, expected["input_ids"], [image, image])
    for key in (set(expected) | set(built)) - {"input_ids", "attention_mask"}:
        ours, theirs = built.get(key), expected.get(key)
        if key not in accepted or ours is None or theirs is None or not torch.equal(ours, theirs.to(ours)):
            raise SimpoError(f"images: {name} is not supported: {key} would differ from what its processor returns")


def forward_inputs(model: PreTrainedModel, ids: Tensor, images: Sequence[ImageTensors]) -> dict[str, Tensor]:
    """Return the arguments that a forward needs for images, in addition to the token ids.

    Args:
        model: the model, unwrapped.
        ids: ``[rows, L]``.
        images: the images of all rows, in the order of their tokens.

    Returns:
        The image tensors, concatenated along dimension 0, and ``[rows, L]`` masks of the image tokens if the model
        accepts them; empty without images.
    """
    if not images:
        return {}
    is_image = (ids == model.config.image_token_id).long()
    masks = {name: is_image for name in _MASKS if name in _arguments(model)}
    return masks | {name: _concatenated([image[name] for image in images]) for name in images[0]}


def packed_inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """Return position ids, layout and images of a packed batch as forward arguments; ``model`` is unwrapped.

    Each prompt occurs once in the batch, and so do its images.
    """
    ids, layout = batch.input_ids[None], batch.layout
    images = list(chain.from_iterable(batch.images))
    inputs: dict[str, Any] = forward_inputs(model, ids, images)
    # goes into the layout instead, because a mask built by the model would ignore the segments
    bidirectional = inputs.pop(_BIDIRECTIONAL, None)
    if bidirectional is not None:
        starts = (bidirectional == 1) & (F.pad(bidirectional, (1, 0))[:, :-1] == 0)
        blocks = torch.where(bidirectional == 1, starts.cumsum(dim=1), -1)[0]
        layout = replace(layout, blocks=blocks, block_masks={})
    return inputs | {"position_ids": _positions(model, batch, images), LAYOUT_ARGUMENT: layout}


def _positions(model: Any, batch: PackedBatch, images: Sequence[ImageTensors]) -> Tensor:
    """Return position ids ``[1, T]``, or ``[3, 1, T]`` (time, height, width) if the model computes its own."""
    index = batch.layout.index
    rule = getattr(model.base_model, "get_rope_index", None)
    if rule is None or not images:
        return index.positions[None]
    rows, names = PaddedRows.unpack(batch), inspect.signature(rule).parameters
    row_images = [
        {name: tensor for name, tensor in image.items() if name in names} for image in chain.from_iterable(rows.images)
    ]
    inputs = forward_inputs(model, rows.input_ids, row_images)
    accepted = {name: tensor for name, tensor in inputs.items() if name in names}
    by_row, _ = rule(rows.input_ids, attention_mask=rows.attention_mask, **accepted)  # [3, R, L]
    flat = by_row.new_empty(len(by_row), batch.tokens)
    flat[:, index.key_index] = by_row[:, rows.attention_mask.bool()]  # writes shared prompts repeatedly, same values
    return flat[:, None]


def _arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along dimension 0, zero-padding all other dimensions at the end to equal sizes."""
    sizes = [max(each) for each in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat(
        [
            F.pad(
                tensor,
                [pad for own, size in zip(tensor.shape[:0:-1], sizes[::-1], strict=True) for pad in (0, size - own)],
            )
            for tensor in tensors
        ]
    )
