"""``SimPOConfig`` and ``SimPOTrainer`` of the paper's repository (princeton-nlp/SimPO, ``scripts/``)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from simpo.compat.keys import PortedConfig, without_effect
from simpo.compat.trainer import PortedPreferenceTrainer
from simpo.config import setting

logger = logging.getLogger(__name__)

_DEFAULT_LENGTHS = {"max_length": 512, "max_prompt_length": 128}


@dataclass
class SimPOConfig(PortedConfig):
    """The paper's keys with the defaults of its code, including the learning rate of 5e-5 of ``TrainingArguments``.

    Truncation and scoring of assistant headers follow that code.
    """

    learning_rate: float = setting(5e-5, "Peak learning rate; the paper's are 3e-7 to 1e-6.")
    logging_steps: float = setting(500, "Optimizer steps between logs.")
    max_length: int | None = setting(  # type: ignore[assignment]
        None, "Longest prompt with response, in tokens (512 if not set)."
    )
    max_prompt_length: int | None = setting(None, "Length that overlong prompts are cut to (128 if not set).")
    max_target_length: int | None = without_effect(None, "it limits encoder-decoder models only")
    truncation: Literal["prompt", "drop", "paper"] = setting("paper", "How overlong rows are handled.")
    paper_tokenization: bool = setting(True, "Score the assistant header with the response.")
    beta: float = setting(2.0, "Scale of the reward.")
    gamma_beta_ratio: float = setting(0.25, "Target margin over beta.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "The link: sigmoid or hinge.")

    def __post_init__(self) -> None:
        for key, length in _DEFAULT_LENGTHS.items():
            if getattr(self, key) is None:
                logger.warning("%s is not set: %d, as in the paper's code", key, length)
                setattr(self, key, length)
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type


class SimPOTrainer(PortedPreferenceTrainer):
    """The paper's ``SimPOTrainer``: its arguments, in its order, with a :class:`SimPOConfig`."""

    config_class = SimPOConfig
