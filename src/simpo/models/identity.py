"""What identifies a model: digests of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from simpo.models.adapters import find_adapter
from simpo.models.loading import base_arguments
from simpo.models.settings import ModelArguments


def model_digest(model: ModelArguments) -> str:
    """SHA-256 of a local model's weights and configuration, and of an adapter's base model; of a hub model its name."""
    folder = Path(model.model_name_or_path)
    files = sorted(
        path for pattern in ("*.safetensors", "config.json", "adapter_config.json") for path in folder.glob(pattern)
    )
    if not files:
        return f"{model.model_name_or_path}@{model.model_revision}"
    digests = [file_digest(path) for path in files]
    adapter = find_adapter(model.model_name_or_path, model.model_revision)
    if adapter is not None:
        digests.append(model_digest(base_arguments(adapter, model)))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
