"""``SimPOConfig`` and ``SimPOTrainer`` of the paper's repository (princeton-nlp/SimPO, ``scripts/``)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from simpo.compat.keys import PortedConfig
from simpo.compat.trainer import PortedTrainer

logger = logging.getLogger(__name__)

_DEFAULT_LENGTHS = {"max_length": 512, "max_prompt_length": 128}


@dataclass
class SimPOConfig(PortedConfig):
    """The paper's keys with the defaults of its code, including the learning rate of 5e-5 of ``TrainingArguments``.

    Truncation and scoring of assistant headers follow that code.

    Raises:
        SimpoError: a value that is out of bounds or not supported; the message names the key.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate; the paper's are 3e-7 to 1e-6."})
    logging_steps: float = field(default=500, metadata={"help": "Optimizer steps between logs."})
    max_length: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Longest prompt with response, in tokens (512 if not set)."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Length that overlong prompts are cut to (128 if not set)."}
    )
    max_target_length: int | None = field(default=None, metadata={"help": "Has no effect here."})
    truncation: Literal["prompt", "drop", "paper"] = field(
        default="paper", metadata={"help": "What happens to overlong rows."}
    )
    paper_tokenization: bool = field(default=True, metadata={"help": "Score the assistant header with the response."})
    beta: float = field(default=2.0, metadata={"help": "Scale of the reward."})
    gamma_beta_ratio: float = field(default=0.25, metadata={"help": "Target margin over beta."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a label is wrong."})
    loss_type: str | None = field(default="sigmoid", metadata={"help": "The link: sigmoid or hinge."})

    def __post_init__(self) -> None:
        for key, length in _DEFAULT_LENGTHS.items():
            if getattr(self, key) is None:
                logger.warning("%s is not set: %d, as in the paper's code", key, length)
                setattr(self, key, length)
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type


class SimPOTrainer(PortedTrainer):
    """The paper's ``SimPOTrainer``: its arguments, in its order, with a :class:`SimPOConfig`."""

    config_class = SimPOConfig
