"""Preference objectives as pure functions of log-probabilities, in a table by name. Imports nothing but torch."""

from simpo.objectives import beyond_pairs as _beyond_pairs  # noqa: F401 - registers its objectives in the table
from simpo.objectives.mixture import Mixture
from simpo.objectives.objective import Objective, Responses
from simpo.objectives.preference import OBJECTIVES, reference_point, sft_term

__all__ = ["OBJECTIVES", "Mixture", "Objective", "Responses", "reference_point", "sft_term"]
