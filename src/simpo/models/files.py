"""Checks what a model's configuration, tokenizer and indexes ask for, before anything large is done or read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE
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
_MOST_GROWTH = 1_000  # how many times longer a tokenizer may make a text
_SAFETENSORS = (".safetensors", ".safetensors.index.json")


def check_config(arguments: ModelArguments) -> None:
    """Raise :class:`SimpoError` if a configuration asks for more layers than any model has, which would take hours.

    Damaged files are left to transformers, which reports them.
    """
    name = arguments.model_name_or_path
    for file, content in _json_files(arguments, CONFIG_NAME, "config*.json"):
        for key, count in _layer_counts(content):
            if count > _MOST_LAYERS:
                raise SimpoError(
                    f"model_name_or_path: {name!r}: {file}: {key} is {count}, and no model has more than "
                    f"{_MOST_LAYERS:,} layers; restore the file"
                )


def _layer_counts(content: Any) -> Iterator[tuple[str, float]]:
    """Iterate over the keys and values of all numbers of layers in a configuration, and in those nested in it."""
    for part in _nested(content):
        yield from ((k, v) for k, v in part.items() if _LAYERS.fullmatch(k) and isinstance(v, int | float))


def check_tokenizer(arguments: ModelArguments) -> None:
    """Raise :class:`SimpoError` if replacements in a tokenizer's files make texts so long that they fill the memory.

    Rust libraries abort the process then, and even loading normalizes the added tokens.
    """
    for file, content in _json_files(arguments, FULL_TOKENIZER_FILE, "tokenizer*.json"):
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            growth = _growth(content.get(part)) if isinstance(content, dict) else 1
            if growth > _MOST_GROWTH:
                raise SimpoError(
                    f"model_name_or_path: {arguments.model_name_or_path!r}: {file}: its {part} can make texts "
                    f"{growth:,.0f} times longer (at most {_MOST_GROWTH:,}); restore the file"
                )


def _growth(component: Any) -> float:
    """Return a bound on how many times longer a component of a tokenizer makes a text.

    A replacement multiplies the growth of an earlier one only if it can match what that one inserted.
    """
    highest = 1.0
    of_inserted: dict[str, float] = {}  # the growth that inserted characters are part of
    for step in _nested(component):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Prepend":
            inserted = str(step.get("prepend"))
            growth = 1.0 + len(inserted)
        elif kind == "Replace" and isinstance(pattern, dict):
            inserted, literal = str(step.get("content")), pattern.get("String")
            if literal:
                before = max(of_inserted.get(character, 1.0) for character in str(literal))
                growth = before * max(1.0, len(inserted) / len(str(literal)))
            else:  # an expression can match between any two characters, and so does an empty pattern
                growth = highest * (1.0 + len(inserted))
        else:
            continue
        highest = max(highest, growth)
        of_inserted |= {character: max(growth, of_inserted.get(character, 1.0)) for character in inserted}
    return highest


def _nested(content: Any) -> Iterator[dict[str, Any]]:
    """Iterate over all objects in JSON content, in their order in the file."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield part
            parts += reversed(part.values())
        elif isinstance(part, list):
            parts += reversed(part)


def _json_files(arguments: ModelArguments, file: str, pattern: str) -> Iterator[tuple[str, Any]]:
    """Iterate over the names and contents of a model's undamaged JSON files: ``file`` on the hub, or all in a folder.

    Some of those in a folder are for other versions of transformers.
    """
    folder = Path(arguments.model_name_or_path)
    paths = sorted(folder.glob(pattern)) if folder.is_dir() else [_on_hub(arguments, file)]
    for path in paths:
        try:
            content = None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if path is not None:
            yield path.name, content


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
