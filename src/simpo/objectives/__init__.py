"""Preference objectives: pure functions of log-probabilities, and the table that names them. Imports torch only."""

from simpo.objectives.pairwise import sft_term
from simpo.objectives.registry import OBJECTIVES, Objective
from simpo.objectives.responses import Responses

__all__ = ["OBJECTIVES", "Objective", "Responses", "sft_term"]
