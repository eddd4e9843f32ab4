"""Checks a model's configuration and the files that it and its indexes name, before any weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from simpo.errors import SimpoError, third_party
from simpo.models.settings import ModelArguments

PICKLE = (
    "a pickle, which can contain code; convert it to safetensors (with transformers: "
    "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER), and the same with AutoTokenizer), or, if you "
    "trust it, allow it with allow_pickle (--allow_pickle)"
)
_FILE_NAME = re.compile(r"[^/\\:]+")  # without a folder or drive
# Numbers of layers, of which configurations build lists before anything is read: num_hidden_layers, n_layer, depth, ...
_LAYERS = re.compile(r"(?!max_)(.*_)?(layers?|depth|blocks|stages)")
_MOST_LAYERS = 10_000
_SAFETENSORS = (".safetensors", ".safetensors.index.json")


def check_config(arguments: ModelArguments) -> None:
    """Raise :class:`SimpoError` if a configuration asks for more layers than any model has, which would take hours.

    Damaged files are left to transformers, which reports them.
    """
    name = arguments.model_name_or_path
    hub = None if Path(name).is_dir() else _on_hub(arguments, CONFIG_NAME)
    files = sorted(Path(name).glob("config*.json")) if hub is None else [hub]  # some are for other transformers
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for key, count in _layer_counts(content):
            if count > _MOST_LAYERS:
                raise SimpoError(
                    f"model_name_or_path: {name!r}: {path.name}: {key} is {count}, and no model has more than "
                    f"{_MOST_LAYERS:,} layers; restore the file"
                )


def _layer_counts(content: Any) -> Iterator[tuple[str, float]]:
    """Iterate over the keys and values of all numbers of layers in a configuration, and in those nested in it."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            yield from ((k, v) for k, v in part.items() if _LAYERS.fullmatch(k) and isinstance(v, int | float))


def check_weight_files(arguments: ModelArguments, config: Any) -> None:
    """Check the files that transformers will read weights from, whose names a configuration or an index can choose.

    Raises:
        SimpoError: a file lies outside the model's folder, or is a pickle although ``allow_pickle`` is false.
    """
    name, folder = arguments.model_name_or_path, Path(arguments.model_name_or_path)
    chosen = {str(part.transformers_weights) for part in _parts(config) if hasattr(part, "transformers_weights")}
    for file in sorted(chosen):
        _check_file_name(file, f"model_name_or_path: {name!r}: config.json: transformers_weights")
    if folder.is_dir():
        indexed_files(folder, "*.bin.index.json")
        named = chosen | indexed_files(folder, "*.safetensors.index.json")
        if not any(folder.glob("*.safetensors")):
            named |= {path.name for path in folder.glob("pytorch_model*.bin*")}
    else:  # for other files on the hub, use_safetensors is enough
        named = chosen | _hub_index(arguments, chosen)
    pickled = sorted(file for file in named if not file.endswith(_SAFETENSORS))
    if pickled and not arguments.allow_pickle:
        raise SimpoError(f"model_name_or_path: {name!r} stores its weights as {pickled[0]}, {PICKLE}")


def indexed_files(folder: Path, pattern: str) -> set[str]:
    """Return the names of the files that the indexes in ``folder`` whose own names match ``pattern`` list.

    Raises:
        SimpoError: an index is damaged or lists anything that is not a file next to it.
    """
    return {file for path in sorted(folder.glob(pattern)) for file in _listed(path, str(folder))}


def _hub_index(arguments: ModelArguments, chosen: set[str]) -> set[str]:
    """Return the names of the files that the index of a model on the hub lists; empty if it has none."""
    name, files = arguments.model_name_or_path, set()
    for file in {file for file in chosen if file.endswith(".index.json")} or {SAFE_WEIGHTS_INDEX_NAME}:
        path = _on_hub(arguments, file)
        files |= set() if path is None else _listed(path, name)
    return files


def _on_hub(arguments: ModelArguments, file: str) -> Path | None:
    """Return a file of a model on the hub, downloaded if necessary, or None if there is none."""
    name = arguments.model_name_or_path
    with third_party(f"model_name_or_path: {name!r} cannot be loaded"):
        path = cached_file(
            name,
            file,
            revision=arguments.model_revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if path is None else Path(path)


def _listed(index: Path, name: str) -> set[str]:
    place = f"model_name_or_path: {name!r}: {index.name}"
    with third_party(place):
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(files, key=str):
        _check_file_name(file, place)
    return files


def _check_file_name(file: Any, place: str) -> None:
    if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
        raise SimpoError(f"{place}: {file!r} is not the name of a file in the same folder; move the weights there")


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Iterate over a configuration and those nested in it, such as that of the language model."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
