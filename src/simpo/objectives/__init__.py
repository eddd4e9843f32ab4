"""Preference objectives: pure functions of log-probabilities, and the table that names them. Imports torch only."""

from simpo.objectives import listwise as _listwise  # noqa: F401 - it adds its objectives to the table
from simpo.objectives import pointwise as _pointwise  # noqa: F401 - so does this
from simpo.objectives.mixture import Mixture
from simpo.objectives.objective import Objective
from simpo.objectives.preference import OBJECTIVES, reference_point, sft_term
from simpo.objectives.responses import Responses

__all__ = ["OBJECTIVES", "Mixture", "Objective", "Responses", "reference_point", "sft_term"]
