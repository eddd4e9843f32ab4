"""Images of tokenized rows: which rows have any, whether a model can be trained on them, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch import nn
from transformers import ProcessorMixin

from simpo.data.images import DIGESTS, IMAGES, ImageReader
from simpo.errors import SimpoError
from simpo.models.preparation import freeze_parts_unused_by_text
from simpo.packing.attention import causal_lm
from simpo.packing.images import check_image_inputs
from simpo.packing.layout import ImageTensors
from simpo.packing.model import prepare_policy, state_of


def rows_with_images(rows: Dataset) -> np.ndarray:
    """Numbers of the tokenized rows that have images."""
    if IMAGES not in rows.column_names:
        return np.array([], dtype=int)
    lengths = pc.list_value_length(rows.with_format("arrow")[IMAGES])
    return np.flatnonzero(pc.fill_null(lengths, 0).to_numpy())


def image_reader(
    model: nn.Module, processing_class: Any, datasets: Sequence[Dataset | None], args: Any
) -> ImageReader | None:
    """The reader of the images of tokenized rows; None if there are none, and the parts for images are frozen then.

    ``processing_class`` is the model's processor; anything else is an error if there are images.
    """
    given = [rows for rows in datasets if rows is not None]
    found = [(rows, numbers[0]) for rows in given if len(numbers := rows_with_images(rows))]
    if not found:
        freeze_parts_unused_by_text(model)
        return None
    if not isinstance(processing_class, ProcessorMixin):
        raise SimpoError(
            "images: simpo train, sft and reward take them, in Python with the model's processor as processing_class; "
            "give it, or leave the images out"
        )
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    if args.world_size > 1 and (launched or args.fsdp or args.deepspeed or args.gradient_checkpointing):
        raise SimpoError(
            "images: several processes train on them with DDP and without activation checkpointing only, because not "
            "every micro-batch has some"
        )
    inner, reader = prepare_policy(model), ImageReader(processing_class)
    if state_of(inner).lengths is not None:
        raise SimpoError(f"images: the rotary frequencies of {type(inner).__name__} depend on a row's length")
    rows, number = found[0]
    row = rows[int(number)]
    (image, *_) = reader.tensors(row[IMAGES], row[DIGESTS])
    check_image_inputs(causal_lm(inner), image, reader.example(row[IMAGES][0]))
    return reader


def image_tensors(columns: Mapping[str, Any], reader: ImageReader | None) -> list[tuple[ImageTensors, ...]]:
    """The images of each row of a batch.

    ``reader`` is None if the rows that the trainer was made with have no images.
    """
    count = len(columns["prompt_ids"])
    several = zip(columns.get(IMAGES) or [[]] * count, columns.get(DIGESTS) or [[]] * count, strict=True)
    found: list[tuple[ImageTensors, ...]] = []
    for references, digests in several:
        if references and reader is None:
            raise SimpoError(
                "images: none of the rows that the trainer was made with have some; give such rows from the start"
            )
        found.append(reader.tensors(references, digests) if references and reader is not None else ())
    return found
