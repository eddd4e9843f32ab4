"""Settings of every kind of training: ``TrainingArguments``, what packed batches add, and the data."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames, ParallelMode

from simpo.config import check_values, setting, setting_of
from simpo.data.settings import RenderSettings, TokenizeSettings
from simpo.data.sources import load_mixture, load_mixture_list, load_rows
from simpo.errors import CombinedError, SimpoError, check_all, third_party
from simpo.packing.model import ForwardPath

logger = logging.getLogger(__name__)

_NO_LABELS = "batches are packed, and there are no labels or logits to gather"
# Keys of TrainingArguments that are not supported: the only value accepted, and why.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, "a step's rows would change; max_batch_tokens bounds the memory of a forward"),
    "save_only_model": (False, "a run could not be continued from such a checkpoint"),
    "neftune_noise_alpha": (None, "its noise is scaled by the length of a padded batch, and nothing is padded"),
    "label_smoothing_factor": (0.0, "it smooths class labels; label_smoothing is the preference objectives' own"),
    "include_num_input_tokens_seen": ("no", "a packed prompt is computed once for all of its responses"),
    "include_for_metrics": ([], _NO_LABELS),
    "label_names": (None, _NO_LABELS),
    "prediction_loss_only": (False, "evaluations report every metric of the objective"),
    "batch_eval_metrics": (False, _NO_LABELS),
    "eval_do_concat_batches": (True, _NO_LABELS),
    "eval_use_gather_object": (False, _NO_LABELS),
    "average_tokens_across_devices": (True, "a step's loss is always the mean over all processes"),
    "bf16_full_eval": (False, "an evaluation would convert the weights that are trained; use bf16"),
    "fp16_full_eval": (False, "an evaluation would convert the weights that are trained; use fp16"),
    "torch_empty_cache_steps": (None, "max_batch_tokens bounds the memory of a forward"),
    "enable_jit_checkpoint": (False, "a run that is stopped by a signal saves a checkpoint in any case"),
    "save_on_each_node": (False, "checkpoints and the model are written once, to a folder that all nodes share"),
    "parallelism_config": (None, "a model is spread over processes with fsdp or deepspeed"),
    "do_predict": (False, "held-out rows are scored before and after training; name them with eval_dataset_name"),
}
# Keys of a configuration that change what is shown, stored or kept of a run, but not what it computes.
_NO_INFLUENCE = {
    "accept_changes", "guard",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "image_folder", "dataset_num_proc", "ddp_timeout", "disable_tqdm", "do_eval", "do_predict", "do_train",
    "log_level", "log_level_replica", "log_on_each_node", "output_dir",
    "per_device_eval_batch_size", "per_device_train_batch_size",  # the rows per step count
    "project", "reference_cache", "report_to", "resume_from_checkpoint", "run_name", "trackio_space_id",
    "gpu_memory_utilization", "max_model_len", "tensor_parallel_size",  # of vLLM
}  # fmt: skip
_NO_INFLUENCE_PREFIXES = ("hub_", "logging_", "push_to_hub", "save_")
# Arguments of torch.utils.checkpoint that a recipe can set.
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug")


@dataclass
class TrainingSettings(TrainingArguments):
    """Settings of every kind of training."""

    truncates_as_paper: ClassVar[bool] = False  # whether responses may be cut, which have to be pairs then

    num_train_epochs: float = setting(1.0, "Passes over the data.", above=0)
    lr_scheduler_type: SchedulerType | str = setting("cosine", "Learning-rate schedule.")
    warmup_steps: float = setting(0.1, "Warm-up steps, or below 1 their share of all steps.")
    logging_steps: float = setting(10, "Log every so many optimizer steps.")

    use_cache: bool = setting(True, "Generation's cache, in the saved model's configuration; training has none.")
    disable_dropout: bool = setting(True, "Train without dropout, as the paper does.")

    max_length: int = setting_of(TokenizeSettings, "max_length")
    max_prompt_length: int | None = setting_of(TokenizeSettings, "max_prompt_length")
    truncation: Literal["prompt", "drop", "paper"] = setting_of(TokenizeSettings, "truncation")
    truncation_mode: Literal["keep_end", "keep_start"] = setting_of(TokenizeSettings, "truncation_mode")
    auto_insert_empty_system_msg: bool = setting_of(TokenizeSettings, "auto_insert_empty_system_msg")
    chat_template_kwargs: dict[str, Any] | None = setting(
        None, "Variables for the chat template, e.g. {enable_thinking: false}; a row's own come first."
    )
    system_message: Literal["template", "fold"] = setting_of(RenderSettings, "system_message")
    image_folder: str | None = setting_of(TokenizeSettings, "image_folder")
    on_bad_row: Literal["skip", "error"] = setting_of(TokenizeSettings, "on_bad_row")
    dataset_num_proc: int | None = setting_of(TokenizeSettings, "num_proc")

    max_batch_tokens: int | None = setting(
        None, "Most tokens of a forward (default: 16384, on a CPU 2048, or the longest row if longer).", least=1
    )
    checkpointed_share: float = setting(
        1.0, "With activation_checkpointing: share of the layers; the others keep their activations.", above=0, most=1
    )
    forward_path: ForwardPath = setting(
        "auto",
        "packed: prompts shared inside attention, nothing padded; cached: shared through the model's own cache; "
        "padded; auto: the first that proves right on the model.",
    )
    guard: Literal["warn", "stop", "off"] = setting(
        "warn", "At signs that training destroys the model: report them, stop the run, or do nothing."
    )
    accept_changes: bool = setting(False, "Continue a killed run although what determines its result has changed.")

    def __post_init__(self) -> None:
        check_all(self._reject, self._initialize)

    def _reject(self) -> None:
        """Reject unsupported values before transformers changes them."""
        rejected = []
        for key, (only, why) in UNSUPPORTED.items():
            value = getattr(self, key, only)
            if value != only and (value or only is True):  # false and an empty list switch a key off as well
                rejected.append(f"{key}: not supported ({why})")
        if isinstance(self.accelerator_config, str | dict):  # an AcceleratorConfig once it has been read
            rejected.append("accelerator_config: not supported (simpo itself shares a step's rows among processes)")
        if rejected:
            raise CombinedError(*rejected)

    def _initialize(self) -> None:
        """Let transformers initialize its part, with an optimizer step as one element of Trainer's loop."""
        # Trainer would upload folders while it trains, with everything in them.
        self.upload_to: str | None = None
        if self.push_to_hub:  # type: ignore[has-type]
            self.upload_to = str(self.hub_model_id or Path(str(self.output_dir)).name)  # type: ignore[has-type]
            self.push_to_hub = False
            logger.warning(
                "push_to_hub: simpo train, sft and reward upload the finished model to %s; from Python, call "
                "simpo.models.hub.push",
                self.upload_to,
            )
        batch = self.per_device_train_batch_size, self.gradient_accumulation_steps  # type: ignore[has-type]
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        # Micro-batches are cut by tokens, not by this.
        self.per_device_train_batch_size *= self.gradient_accumulation_steps  # type: ignore[has-type]
        self.gradient_accumulation_steps = 1
        # Imported here, because it imports transformers' models, and --help does not need them.
        from simpo.models.zero import read_config, unset_batch_sizes  # noqa: PLC0415

        given: Any = self.deepspeed  # type: ignore[has-type]
        if given or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            self.deepspeed = read_config(given, *batch)
        self.remove_unused_columns = False  # the columns are ours, not the model's
        self.logging_nan_inf_filter = False  # a loss that is not finite must be seen
        # otherwise transformers rejects bf16 on a machine without an accelerator
        if not torch.accelerator.is_available():
            self.use_cpu = True
        with third_party(IMPOSSIBLE):
            super().__post_init__()
            workers, ahead = self.dataloader_num_workers, self.dataloader_prefetch_factor
            DataLoader(
                [], num_workers=workers, prefetch_factor=ahead, persistent_workers=self.dataloader_persistent_workers
            )
        if self.deepspeed_plugin is not None and not self.deepspeed:  # the launcher's
            unset_batch_sizes(self.deepspeed_plugin.hf_ds_config.config, *batch)
        if self.n_gpu > 1:
            raise SimpoError(
                f"{self.n_gpu} GPUs are visible and there is no launcher: start with "
                f"'torchrun --nproc_per_node {self.n_gpu} -m simpo.cli ...' or set CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise SimpoError("fsdp: there is one process and nothing to spread; start with torchrun, or leave it out")
        self._check()

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """The settings of the data layer."""
        names = [field.name for field in fields(TokenizeSettings)]
        return TokenizeSettings(
            **{name: getattr(self, name) for name in names if hasattr(self, name)},
            num_proc=self.dataset_num_proc,
            rendering=RenderSettings(self.chat_template_kwargs or {}, self.system_message),
        )

    def _check(self) -> None:
        """Report all mistakes at once."""
        check_all(
            lambda: check_values(self),
            lambda: self.tokenize_settings,  # which checks itself
            self._check_values,
            self._check_optimizer,
            self._check_numbers,
            self._check_checkpointing,
        )

    def _check_values(self) -> None:
        if self.truncation == "paper" and not self.truncates_as_paper:
            raise SimpoError("truncation: 'paper' cuts the responses of pairs; use 'prompt' or 'drop'")
        if self.use_liger_kernel:
            from simpo.models.devices import liger_config  # noqa: PLC0415 - as above

            self.liger_kernel_config = liger_config(self.liger_kernel_config, self.device)  # type: ignore[has-type]
        elif self.liger_kernel_config:
            raise SimpoError("liger_kernel_config: set use_liger_kernel: true, or leave it out")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise SimpoError(
                f"train_sampling_strategy: {self.train_sampling_strategy!r} is not needed (micro-batches are balanced "
                "by tokens in any order); use 'random' or 'sequential'"
            )

    def _check_optimizer(self) -> None:
        """Look for the package of the optimizer, which a plan does not need."""
        optimizer = OptimizerNames(self.optim).value
        bitsandbytes = "bnb" in optimizer or optimizer.startswith(("adamw_8bit", "ademamix", "lion", "paged"))
        if bitsandbytes and find_spec("bitsandbytes") is None:
            raise SimpoError(f"optim: {optimizer} needs bitsandbytes, which is not installed; write optim: adamw_torch")

    def _check_numbers(self) -> None:
        """Check numbers that transformers accepts although training with them would do nothing or nonsense."""
        if self.max_steps != -1 and self.max_steps < 1:  # type: ignore[has-type]
            raise SimpoError(f"max_steps: must be at least 1, or -1 for num_train_epochs, not {self.max_steps}")
        for key in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise SimpoError(f"{key}: must be at least 0, not {getattr(self, key):g}")
        for key in ("seed", "data_seed"):
            if not 0 <= (getattr(self, key) or 0) < 2**32:
                raise SimpoError(f"{key}: must be at least 0 and below 2**32, not {getattr(self, key)}")

    def _check_checkpointing(self) -> None:
        given = self.gradient_checkpointing_kwargs or getattr(self, "activation_checkpointing_kwargs", None) or {}
        if unknown := [name for name in given if name not in _CHECKPOINTING]:
            known = ", ".join(_CHECKPOINTING)
            raise SimpoError(f"gradient_checkpointing_kwargs: {unknown[0]!r} is not one of {known}")


# Ways to name the data that exclude one another; one on the command line replaces the recipe's.
REPLACES = {
    "dataset_name": ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture"),
    "dataset_mixer": ("dataset_name", "dataset_mixture"),
    "dataset_mixture": ("dataset_name", "dataset_mixer", "dataset_splits", "dataset_configs"),
}


@dataclass
class DataArguments:
    """The source of the rows: one data set, or the paper's ``dataset_mixer``, or alignment-handbook's mixture."""

    dataset_name: str | None = setting(None, "Hub id, file or folder of the training data.")
    dataset_config: str | None = setting(None, "Configuration of a hub data set.")
    dataset_train_split: str = setting("train", "Split of dataset_name to train on, or a slice such as train[:90%].")
    eval_dataset_name: str | None = setting(None, "Hub id, file or folder of held-out data.")
    dataset_test_split: str | None = setting(
        None, "Held-out split, of eval_dataset_name (default test) or else dataset_name."
    )
    dataset_mixer: dict[str, float] | None = setting(
        None, "Data sets, and the fraction of each one's training split that is used."
    )
    dataset_splits: list[str] | None = setting(None, "Splits of dataset_mixer's data sets.")
    dataset_configs: list[str] | None = setting(None, "Their configurations, in that order.")
    dataset_mixture: dict[str, Any] | None = setting(None, "Data sets with weights, as alignment-handbook gives them.")
    column_mapping: dict[str, str] | None = setting(
        None, "Columns to rename, e.g. {instruction: prompt, good: chosen, bad: rejected}."
    )
    chat_template: str | None = setting(
        None, "A chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )

    def __post_init__(self) -> None:
        given = [key for key in ("dataset_name", "dataset_mixer", "dataset_mixture") if getattr(self, key) is not None]
        mistakes = []
        if not given:
            mistakes.append("dataset_name: name the data to train on (a hub id, a file or a folder)")
        if len(given) > 1:
            mistakes.append(f"{' and '.join(given)}: give one of them")
        template = self.chat_template or "none"
        if "{" not in template and template.strip().lower() != "none" and not Path(template).expanduser().is_file():
            mistakes.append(
                f"chat_template: {template[:80]!r} is neither a template nor a file of one; leave it out for the "
                "tokenizer's own"
            )
        if mistakes:
            raise CombinedError(*mistakes)


def load_datasets(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the arguments name some; raw, in any shape."""
    held_out, mapping = None, arguments.column_mapping
    name, split = str(arguments.dataset_name), arguments.dataset_test_split
    if arguments.dataset_mixer is not None:
        splits = arguments.dataset_splits or ["train", "test"]
        train, held_out = load_mixture(arguments.dataset_mixer, splits, arguments.dataset_configs, mapping)
    elif arguments.dataset_mixture is not None:
        train, held_out = load_mixture_list(arguments.dataset_mixture, mapping)
    else:
        known: dict[str, Any] = {"config": arguments.dataset_config, "column_mapping": mapping}
        train = load_rows(name, split=arguments.dataset_train_split, **known)
        if split is not None and arguments.eval_dataset_name is None:
            held_out = load_rows(name, split=split, **known)
    if arguments.eval_dataset_name is not None:
        held_out = load_rows(arguments.eval_dataset_name, split=split or "test", column_mapping=mapping, any_split=True)
    return train, held_out


# ---- Settings that determine what a run computes.


Identity = dict[str, str | None]


def settings_identity(config: Any) -> Identity:
    """Every setting of a configuration that influences training."""
    settings = config.to_dict() | getattr(config, "hyperparameters", {})  # the latter with defaults filled in
    found: Identity = {"rows per step": str(config.per_device_train_batch_size * config.world_size)}
    for key, value in sorted(settings.items()):
        if key not in _NO_INFLUENCE and not key.startswith(_NO_INFLUENCE_PREFIXES):
            found[key] = str(value)
    return found


def checkpoint_from_recipe(config: Any) -> str | None:
    """The checkpoint that a recipe names to start from; None if it names none, or means the folder's own."""
    named = config.resume_from_checkpoint
    return None if named is None or str(named).lower() in ("true", "false") else str(named)


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Every key of a recipe's dataclasses with its value, for the record."""
    found: dict[str, Any] = {}
    for part in arguments:
        found |= part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    return found


# ---- Errors of transformers, accelerate or an optimizer about their own settings, before anything is started.


IMPOSSIBLE = "training is impossible with these settings"


def check_optimizer(trainer: Any) -> None:
    """Create the optimizer and schedule once, before training, to find settings that they reject."""
    if trainer.optimizer is None and not trainer.is_deepspeed_enabled:
        with third_party(IMPOSSIBLE):
            trainer.create_optimizer_and_scheduler(num_training_steps=2)
        trainer.optimizer = trainer.lr_scheduler = None
