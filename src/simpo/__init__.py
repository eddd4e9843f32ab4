"""simpo: exact, fast and lightweight preference alignment for language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it, imported on first use so that `import simpo` is instant.
_PUBLIC = {
    "Responses": "simpo.objectives",
    "OBJECTIVES": "simpo.objectives",
    "Objective": "simpo.objectives",
    "TokenizedComparison": "simpo.packing.layout",
    "PackedBatch": "simpo.packing.layout",
    "policy_forward": "simpo.packing.model",
    "score_responses": "simpo.packing.scoring",
    "score_answers": "simpo.packing.scoring",
    "PreferenceConfig": "simpo.training.preference",
    "PreferenceTrainer": "simpo.training.preference",
    "SFTConfig": "simpo.training.sft",
    "SFTTrainer": "simpo.training.sft",
    "RewardConfig": "simpo.training.reward",
    "RewardTrainer": "simpo.training.reward",
    "SimpoError": "simpo.errors",
}

if TYPE_CHECKING:
    from simpo.errors import SimpoError
    from simpo.objectives import OBJECTIVES, Objective, Responses
    from simpo.packing.layout import PackedBatch, TokenizedComparison
    from simpo.packing.model import policy_forward
    from simpo.packing.scoring import score_answers, score_responses
    from simpo.training.preference import PreferenceConfig, PreferenceTrainer
    from simpo.training.reward import RewardConfig, RewardTrainer
    from simpo.training.sft import SFTConfig, SFTTrainer

__all__ = [
    "OBJECTIVES",
    "Objective",
    "PackedBatch",
    "PreferenceConfig",
    "PreferenceTrainer",
    "Responses",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SimpoError",
    "TokenizedComparison",
    "__version__",
    "policy_forward",
    "score_answers",
    "score_responses",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'simpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
