"""TRL's and the paper's trainers by their own names: a script's import changes, and nothing else."""

from simpo.compat.preference import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    SimPOConfig,
    SimPOTrainer,
)
from simpo.compat.supervised import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SimPOConfig",
    "SimPOTrainer",
]
