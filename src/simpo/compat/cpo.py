"""TRL's ``CPOConfig`` and ``CPOTrainer``, whose ``loss_type="simpo"`` is TRL's SimPO."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from simpo.compat.keys import PortedConfig, TRLKeys
from simpo.compat.trainer import PortedPreferenceTrainer
from simpo.config import check_values, setting
from simpo.errors import SimpoError

logger = logging.getLogger(__name__)

# TRL's loss_type -> our objective; its reference-free "hinge" and "ipo" have none.
_OBJECTIVES = {"simpo": "simpo", "alphapo": "alphapo", "sigmoid": "cpo"}
_DEFAULT_LENGTH = 512


@dataclass
class CPOConfig(TRLKeys, PortedConfig):  # type: ignore[misc]
    """TRL's keys with TRL's defaults (1.16, and the keys that older versions had).

    ``simpo_gamma`` is the margin itself, not its ratio to ``beta``. ``cpo_alpha`` is also read as ``sft_weight``.
    """

    beta: float = setting(0.1, "Scale of the reward; SimPO wants 2 to 10.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "simpo, alphapo, or sigmoid, which is CPO.")
    cpo_alpha: float = setting(1.0, "Weight of the SFT term; pure SimPO has 0.", least=0)
    simpo_gamma: float = setting(0.5, "SimPO's target margin, absolute.", least=0)
    alpha: float | None = setting(0.0, "AlphaPO's exponent; 0 is SimPO.")

    def __post_init__(self) -> None:
        for key, is_set, trls in (
            ("gamma", self.gamma not in (None, self.simpo_gamma), "simpo_gamma, the margin itself"),
            ("gamma_beta_ratio", self.gamma_beta_ratio is not None, "simpo_gamma, the margin itself"),
            ("sft_weight", self.sft_weight not in (0.0, self.cpo_alpha), "cpo_alpha"),
        ):
            if is_set:
                raise SimpoError(f"{key}: CPOConfig's key is {trls}")
        check_values(self)
        self._set_objective()
        if self.max_length is None:
            logger.warning("max_length is not set: %d, as in TRL", _DEFAULT_LENGTH)
            self.max_length = _DEFAULT_LENGTH
        loss_type, self.loss_type = self.loss_type, None  # the base would read "sigmoid" as the link of SimPO
        super().__post_init__()
        self.loss_type = loss_type

    def _set_objective(self) -> None:
        """Translate TRL's loss_type and hyperparameters to an objective with its hyperparameters."""
        name = _OBJECTIVES.get(str(self.loss_type))
        if name is None:
            raise SimpoError(
                f"loss_type: {self.loss_type!r} is not supported by CPOConfig, which has {', '.join(_OBJECTIVES)}; "
                "PreferenceConfig(objective=...) has the others"
            )
        if self.alpha and name == "cpo":
            raise SimpoError("alpha: shapes the reward of loss_type 'simpo' and 'alphapo' only; set it to 0")
        self.objective = "alphapo" if self.alpha else name
        if self.loss_type == "alphapo":
            self.cpo_alpha = 0.0  # as TRL does
        self.sft_weight = self.cpo_alpha
        self.gamma = None if self.objective == "cpo" else self.simpo_gamma
        self.alpha = self.alpha if self.objective == "alphapo" else None
        if self.objective == "cpo":
            self.lam = 0.0  # the SFT term is added to the objective's loss, as a mean over tokens
            self.label_smoothing = self.label_smoothing or None  # type: ignore[assignment]


class CPOTrainer(PortedPreferenceTrainer):
    """TRL's ``CPOTrainer``: its arguments, in its order, with a :class:`CPOConfig`."""

    config_class = CPOConfig
