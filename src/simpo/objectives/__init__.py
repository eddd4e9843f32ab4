"""Preference objectives: pure functions of log-probabilities, and the table that names them. Imports torch only."""

from simpo.objectives import beyond_pairs as _beyond_pairs  # noqa: F401 - it adds its objectives to the table
from simpo.objectives.mixture import Mixture
from simpo.objectives.objective import Objective, Responses
from simpo.objectives.preference import OBJECTIVES, reference_point, sft_term

__all__ = ["OBJECTIVES", "Mixture", "Objective", "Responses", "reference_point", "sft_term"]
