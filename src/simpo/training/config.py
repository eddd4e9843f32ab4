"""The configuration of a preference run: transformers' ``TrainingArguments`` and what alignment adds."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import torch
from transformers import SchedulerType, TrainingArguments

from simpo.data.tokenize import TokenizeSettings
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES, Objective

_UNSUPPORTED = {
    "auto_find_batch_size": (False, "a step's pairs would change; max_batch_tokens bounds the memory of a forward"),
    "label_smoothing_factor": (0.0, "it smooths class labels; label_smoothing is the preference objectives' own"),
}


@dataclass
class PreferenceSettings(TrainingArguments):
    """Everything of :class:`PreferenceConfig` but the objectives' hyperparameters, which the registry declares."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper's are 3e-7 to 1e-6."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})

    use_cache: bool = field(
        default=True, metadata={"help": "What the saved model's configuration says; training has none."}
    )

    objective: str = field(default="simpo", metadata={"help": "Row of the table of objectives."})
    loss_type: str | None = field(
        default=None, metadata={"help": "Alias: the link (the paper's dialect) or the objective (TRL's)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the chosen response's average negative log-probability."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, as the paper does."})

    max_length: int = field(default=2048, metadata={"help": "Longest prompt with response, in tokens."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "What an overlong prompt is cut to (default: max_length * 1800 / 2048)."}
    )
    truncation: Literal["prompt", "drop", "paper"] = field(
        default="prompt", metadata={"help": "What happens to overlong comparisons."}
    )
    truncation_mode: Literal["keep_end", "keep_start"] = field(
        default="keep_end", metadata={"help": "Which end of an overlong prompt stays."}
    )
    paper_tokenization: bool = field(
        default=False, metadata={"help": "Score the assistant header with the response, as the paper's code does."}
    )
    auto_insert_empty_system_msg: bool = field(
        default=False, metadata={"help": "Put an empty system message first where the template has a place for one."}
    )
    on_bad_row: Literal["skip", "error"] = field(
        default="skip", metadata={"help": "Skip and count bad rows (an error above 1%), or stop at the first."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    max_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of one forward (default: 16384 on an accelerator, 2048 on a CPU, or the longest)."},
    )
    forward_path: Literal["auto", "packed", "padded"] = field(
        default="auto", metadata={"help": "How comparisons are computed; auto checks what the model allows."}
    )

    def __post_init__(self) -> None:
        for key, (only, why) in _UNSUPPORTED.items():
            if getattr(self, key) != only:
                raise SimpoError(f"{key}: not supported ({why})")
        self._fold_accumulation()
        self.remove_unused_columns = False  # the columns are ours, not the model's
        self.logging_nan_inf_filter = False  # a loss that is not finite must be seen
        # without it transformers takes bf16 on a machine without accelerator for a mistake
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        if self.n_gpu > 1:
            raise SimpoError(
                f"{self.n_gpu} GPUs are visible and there is no launcher: start with "
                f"'torchrun --nproc_per_node {self.n_gpu} -m simpo.cli ...' or set CUDA_VISIBLE_DEVICES to one of them"
            )
        self._resolve_loss_type()
        self._check()

    @property
    def row(self) -> Objective:
        """The chosen objective."""
        return OBJECTIVES[self.objective]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's hyperparameters, all of them, defaults filled in."""
        given = {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}
        return self.row.resolve(given)

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """What the data layer needs to know."""
        return TokenizeSettings(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            truncation_mode=self.truncation_mode,
            truncation=self.truncation,
            paper_tokenization=self.paper_tokenization,
            auto_insert_empty_system_msg=self.auto_insert_empty_system_msg,
            on_bad_row=self.on_bad_row,
            num_proc=self.dataset_num_proc,
        )

    def _fold_accumulation(self) -> None:
        """Make an optimizer step one element of Trainer's loop; micro-batches are cut by tokens, not by this."""
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        self.per_device_train_batch_size *= self.gradient_accumulation_steps  # type: ignore[has-type]
        self.gradient_accumulation_steps = 1

    def _resolve_loss_type(self) -> None:
        if self.loss_type is None:
            return
        if self.loss_type in OBJECTIVES:
            self.objective = self.loss_type
        elif getattr(self, "link", None) in (None, self.loss_type):
            self.link = self.loss_type
        else:
            raise SimpoError(f"loss_type {self.loss_type!r} and link {self.link!r} disagree; give one of them")
        self.loss_type = None

    def _check(self) -> None:
        if self.objective not in OBJECTIVES:
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        try:
            self.hyperparameters  # noqa: B018 - resolving is the check
        except ValueError as error:
            raise SimpoError(str(error)) from error
        if self.forward_path not in ("auto", "packed", "padded"):
            raise SimpoError(f"forward_path: {self.forward_path!r} is not one of 'auto', 'packed', 'padded'")
        if not self.sft_weight >= 0:
            raise SimpoError(f"sft_weight: must be >= 0, not {self.sft_weight}")
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise SimpoError(f"max_batch_tokens: must be at least 1, not {self.max_batch_tokens}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise SimpoError(
                f"train_sampling_strategy: {self.train_sampling_strategy!r} is not needed (micro-batches are balanced "
                "by tokens in any order); use 'random' or 'sequential'"
            )
        self.tokenize_settings  # noqa: B018 - its constructor checks the keys


def hyperparameter_names() -> list[str]:
    """Every name under which some objective's hyperparameter can be given."""
    return list(_hyperparameter_types())


def _hyperparameter_types() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in OBJECTIVES.values():
        found |= {name: parameter.type for name, parameter in row.hyperparameters.items()}
        found |= {name: row.hyperparameters[spelling.of].type for name, spelling in row.spellings.items()}
    return found


def _help(name: str) -> str:
    rows = [
        f"{row.name} (default {row.hyperparameters[name].default})" if name in row.hyperparameters else row.name
        for row in OBJECTIVES.values()
        if name in row.hyperparameters or name in row.spellings
    ]
    return "Hyperparameter of " + ", ".join(rows) + "."


PreferenceConfig = make_dataclass(
    "PreferenceConfig",
    [
        (name, kind | None, field(default=None, metadata={"help": _help(name)}))
        for name, kind in _hyperparameter_types().items()
    ],
    bases=(PreferenceSettings,),
)
PreferenceConfig.__module__ = __name__  # so that it pickles
PreferenceConfig.__doc__ = """Configuration of a preference run.

All keys of ``transformers.TrainingArguments``, those of :class:`PreferenceSettings`, and the hyperparameters of the
objectives (``beta``, ``gamma_beta_ratio``, ...), whose names, types and defaults the registry declares; None stands for
the objective's own default.

Pairs per optimizer step are ``per_device_train_batch_size * gradient_accumulation_steps * world_size``, as everywhere
in transformers; the first two are folded into one, because micro-batches are cut by ``max_batch_tokens``.

Raises:
    SimpoError: a value that is out of bounds, unknown or contradictory; the message names the key.
"""
