"""Checkpoints whose weights have other names than the model's: transformers saves the experts of mixtures apart.

``Trainer`` loads a checkpoint by name and only warns of what is missing, so that such a model would go on with the
experts that it started with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from simpo.errors import SimpoError
from simpo.training.sharding import stored_tensors


def is_renamed(folder: Path, model: nn.Module) -> bool:
    """Whether ``folder`` has weights of which ``model`` knows nothing by their names."""
    known = model.state_dict().keys()
    return any(name not in known for name, _ in stored_tensors(folder))


def load_renamed(folder: Path, model: PreTrainedModel) -> None:
    """Give ``model`` the weights of ``folder`` as transformers loads them, which takes the room of a second model.

    Raises:
        SimpoError: they are of another model.
    """
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype, output_loading_info=True)
    try:
        if any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise RuntimeError("weights are missing or left over")
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise SimpoError(f"resume_from_checkpoint: {folder} is of another model ({reason})") from error


def kind_of(folder: Path) -> str | None:
    """The architecture that the checkpoint's ``config.json`` names, if it has one: ``llama``, ``mixtral``, ..."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
