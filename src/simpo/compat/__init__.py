"""TRL's and the paper's trainers by their own names: a script's import changes, and nothing else."""

from simpo.compat.cpo import CPOConfig, CPOTrainer
from simpo.compat.paper import SimPOConfig, SimPOTrainer

__all__ = ["CPOConfig", "CPOTrainer", "SimPOConfig", "SimPOTrainer"]
