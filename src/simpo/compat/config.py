"""What the configurations of TRL and of the paper's code have in common."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import SchedulerType, TrainingArguments

from simpo.errors import SimpoError
from simpo.training.config import PreferenceConfig

logger = logging.getLogger(__name__)

_NOT_SUPPORTED = {
    "generate_during_eval": "sample from a checkpoint afterwards; set it to False",
    "is_encoder_decoder": "only causal language models are trained; leave it out",
}
# Key, the value that says nothing, and why any other one changes nothing.
_MEANINGLESS = (
    ("max_completion_length", None, "it limits encoder-decoder models only"),
    ("max_target_length", None, "it limits encoder-decoder models only"),
    ("label_pad_token_id", -100, "no labels are made"),
    ("padding_value", None, "padding is never scored"),
)
# What the paper's models were trained with, and from where on models were seen to repeat themselves.
_BETA, _RATIO = (2.0, 10.0), (0.1, 0.8)
_COLLAPSE = 1e-5


@dataclass
class PortedConfig(PreferenceConfig):  # type: ignore[misc, valid-type]
    """Keys and defaults of both: those of ``TrainingArguments``, from which they are made.

    Raises:
        SimpoError: a key that cannot be honoured; the message names it.
    """

    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the pairs."})
    lr_scheduler_type: SchedulerType | str = field(default="linear", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Means nothing here."})
    label_pad_token_id: int = field(default=-100, metadata={"help": "Means nothing here."})
    padding_value: int | None = field(default=None, metadata={"help": "Means nothing here."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Not supported."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How a model that is given by name is loaded."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        for key, why in _NOT_SUPPORTED.items():
            if getattr(self, key):
                raise SimpoError(f"{key}: not supported ({why})")
        for key, silent, why in _MEANINGLESS:
            if getattr(self, key, silent) != silent:
                logger.warning("%s means nothing here: %s", key, why)
        accumulated = self.gradient_accumulation_steps > 1
        super().__post_init__()
        for line in self._departures(accumulated):
            logger.warning(line)

    def _departures(self, accumulated: bool) -> list[str]:
        """Where the settings are not the paper's SimPO, or not what the original would compute from them."""
        lines = []
        if self.objective == "simpo":
            beta, ratio = self.hyperparameters["beta"], self.hyperparameters["gamma_beta_ratio"]
            if not _BETA[0] <= beta <= _BETA[1]:
                lines.append(f"beta {beta:g} is used, but it is not SimPO's: the paper's {_span(_BETA)}")
            if not _RATIO[0] <= ratio <= _RATIO[1]:
                lines.append(f"gamma is {ratio:g} times beta: the paper's gamma/beta {_span(_RATIO)}")
        if self.sft_weight:
            lines.append(f"an SFT term of weight {self.sft_weight:g} is added: pure SimPO has none (weight 0)")
            if accumulated or self.world_size > 1:
                lines.append(
                    "the SFT term is the mean over the chosen tokens of a whole optimizer step; the original takes "
                    "the mean of each device batch"
                )
        if self.learning_rate >= _COLLAPSE:
            lines.append(f"learning_rate {self.learning_rate:g}: models were seen to collapse from {_COLLAPSE:g} on")
        return lines


def _span(bounds: tuple[float, float]) -> str:
    return f"is between {bounds[0]:g} and {bounds[1]:g}"
