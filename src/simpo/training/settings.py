"""Settings shared by every trainer: ``TrainingArguments``, additions for packed batches, and the data."""

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

_NO_LABELS = "batches are packed, so there are no labels or logits to gather"
# Keys of TrainingArguments that are not supported: the only value accepted, and why.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, "it would change the rows of a step; max_batch_tokens limits memory instead"),
    "save_only_model": (False, "a run could not be resumed from such a checkpoint"),
    "neftune_noise_alpha": (None, "its noise depends on the length of padded batches, and nothing is padded here"),
    "label_smoothing_factor": (0.0, "it smooths class labels; preference objectives have label_smoothing"),
    "include_num_input_tokens_seen": ("no", "a packed prompt is computed once for all of its responses"),
    "include_for_metrics": ([], _NO_LABELS),
    "label_names": (None, _NO_LABELS),
    "prediction_loss_only": (False, "evaluations report every metric of the objective"),
    "batch_eval_metrics": (False, _NO_LABELS),
    "eval_do_concat_batches": (True, _NO_LABELS),
    "eval_use_gather_object": (False, _NO_LABELS),
    "average_tokens_across_devices": (True, "the loss of a step is always the mean over all processes"),
    "bf16_full_eval": (False, "an evaluation would convert the weights being trained; use bf16"),
    "fp16_full_eval": (False, "an evaluation would convert the weights being trained; use fp16"),
    "torch_empty_cache_steps": (None, "max_batch_tokens limits memory instead"),
    "enable_jit_checkpoint": (False, "a run stopped by a signal saves a checkpoint anyway"),
    "save_on_each_node": (False, "checkpoints and the model are written once, to a folder shared by all nodes"),
    "parallelism_config": (None, "use fsdp or deepspeed to shard a model across processes"),
    "do_predict": (False, "held-out rows are scored before and after training; set eval_dataset_name"),
}
# Keys that change what a run shows, stores or keeps, but not what it computes.
_NOT_IN_IDENTITY = {
    "accept_changes", "guard",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "image_folder", "dataset_num_proc", "ddp_timeout", "disable_tqdm", "do_eval", "do_predict", "do_train",
    "log_level", "log_level_replica", "log_on_each_node", "output_dir",
    "per_device_eval_batch_size", "per_device_train_batch_size",  # the number of rows per step is included instead
    "project", "reference_cache", "report_to", "resume_from_checkpoint", "run_name", "trackio_space_id",
    "gpu_memory_utilization", "max_model_len", "tensor_parallel_size",  # vLLM's
}  # fmt: skip
_NOT_IN_IDENTITY_PREFIXES = ("hub_", "logging_", "push_to_hub", "save_")
_MAX_WORKERS = 1024  # processes that load data
# Arguments of torch.utils.checkpoint that a recipe may set.
_CHECKPOINT_ARGUMENTS = ("use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug")


@dataclass
class TrainingSettings(TrainingArguments):
    """Settings shared by every trainer."""

    truncates_as_paper: ClassVar[bool] = False  # whether ``truncation: paper``, which is only for pairs, is allowed

    num_train_epochs: float = setting(1.0, "Passes over the data.", above=0, most=1e6)
    lr_scheduler_type: SchedulerType | str = setting("cosine", "Learning-rate schedule.")
    warmup_steps: float = setting(0.1, "Number of warm-up steps, or their share of all steps if below 1.")
    logging_steps: float = setting(10, "Number of optimizer steps between logs.")

    use_cache: bool = setting(True, "Use a cache for generation (written to the saved model's configuration).")
    disable_dropout: bool = setting(True, "Train without dropout, as the paper does.")

    max_length: int = setting_of(TokenizeSettings, "max_length")
    max_prompt_length: int | None = setting_of(TokenizeSettings, "max_prompt_length")
    truncation: Literal["prompt", "drop", "paper"] = setting_of(TokenizeSettings, "truncation")
    truncation_mode: Literal["keep_end", "keep_start"] = setting_of(TokenizeSettings, "truncation_mode")
    auto_insert_empty_system_msg: bool = setting_of(TokenizeSettings, "auto_insert_empty_system_msg")
    chat_template_kwargs: dict[str, Any] | None = setting(
        None, "Variables for the chat template, e.g. {enable_thinking: false}; a row's own values take precedence."
    )
    system_message: Literal["template", "fold"] = setting_of(RenderSettings, "system_message")
    image_folder: str | None = setting_of(TokenizeSettings, "image_folder")
    on_bad_row: Literal["skip", "error"] = setting_of(TokenizeSettings, "on_bad_row")
    dataset_num_proc: int | None = setting_of(TokenizeSettings, "num_proc")

    max_batch_tokens: int | None = setting(
        None, "Maximum tokens per forward pass (default: 16384, 2048 on a CPU; at least the longest row).", least=1
    )
    checkpointed_share: float = setting(
        1.0,
        "With activation_checkpointing: share of layers to checkpoint; the others keep activations.",
        above=0,
        most=1,
    )
    forward_path: ForwardPath = setting(
        "auto",
        "packed: share prompts inside attention, without padding; cached: share them through the model's own cache; "
        "padded: no sharing; auto: the first of these that proves correct on the model.",
    )
    guard: Literal["warn", "stop", "off"] = setting("warn", "At signs of collapse: warn, stop the run, or do nothing.")
    accept_changes: bool = setting(False, "Continue a killed run even if settings that affect its result have changed.")

    def __post_init__(self) -> None:
        check_all(self._reject, self._initialize)

    def _reject(self) -> None:
        """Reject unsupported values before transformers changes them."""
        rejected = []
        for key, (only, reason) in UNSUPPORTED.items():
            value = getattr(self, key, only)
            if value != only and (value or only is True):  # false and an empty list also turn a key off
                rejected.append(f"{key}: not supported ({reason})")
        if isinstance(self.accelerator_config, str | dict):  # transformers later turns it into an AcceleratorConfig
            rejected.append("accelerator_config: not supported (simpo distributes the rows of a step itself)")
        if rejected:
            raise CombinedError(*rejected)

    def _initialize(self) -> None:
        """Let transformers initialize its part; one iteration of Trainer's loop is a full optimizer step."""
        # Trainer would upload folders during training, with everything in them.
        self.upload_to: str | None = None
        if self.push_to_hub:  # type: ignore[has-type]
            self.upload_to = str(self.hub_model_id or Path(str(self.output_dir)).name)  # type: ignore[has-type]
            self.push_to_hub = False
            logger.warning(
                "push_to_hub: simpo train, sft, reward and online upload the finished model to %s; from Python, call "
                "simpo.models.hub.push",
                self.upload_to,
            )
        batch = self.per_device_train_batch_size, self.gradient_accumulation_steps  # type: ignore[has-type]
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        # Micro-batches are formed by number of tokens, not by these keys.
        self.per_device_train_batch_size *= self.gradient_accumulation_steps  # type: ignore[has-type]
        self.gradient_accumulation_steps = 1
        # Imported here because it imports transformers' models, which --help does not need.
        from simpo.models.zero import read_config, unset_batch_sizes  # noqa: PLC0415

        given: Any = self.deepspeed  # type: ignore[has-type]
        if given or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            self.deepspeed = read_config(given, *batch)
        self.remove_unused_columns = False  # the columns are simpo's, not arguments of the model
        self.logging_nan_inf_filter = False  # a non-finite loss must be visible
        # Otherwise, transformers rejects bf16 on machines without an accelerator.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        with third_party(IMPOSSIBLE):
            super().__post_init__()
            workers, prefetch = self.dataloader_num_workers, self.dataloader_prefetch_factor
            DataLoader(
                [], num_workers=workers, prefetch_factor=prefetch, persistent_workers=self.dataloader_persistent_workers
            )
        if self.deepspeed_plugin is not None and not self.deepspeed:  # configured by the launcher
            unset_batch_sizes(self.deepspeed_plugin.hf_ds_config.config, *batch)
        if self.n_gpu > 1:
            raise SimpoError(
                f"{self.n_gpu} GPUs are visible, but there is no launcher: start with "
                f"'torchrun --nproc_per_node {self.n_gpu} -m simpo.cli ...' or set CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.fsdp and self.parallel_mode != ParallelMode.DISTRIBUTED:
            raise SimpoError("fsdp: there is only one process to shard across; start with torchrun, or leave it out")
        self._check()

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """The settings for tokenizing the data."""
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
            lambda: self.tokenize_settings,  # its constructor checks the values
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
                f"train_sampling_strategy: {self.train_sampling_strategy!r} is not supported (micro-batches are always "
                "balanced by tokens); use 'random' or 'sequential'"
            )

    def _check_optimizer(self) -> None:
        """Check that the optimizer's package is installed; planning a run does not need it."""
        optimizer = OptimizerNames(self.optim).value
        bitsandbytes = "bnb" in optimizer or optimizer.startswith(("adamw_8bit", "ademamix", "lion", "paged"))
        if bitsandbytes and find_spec("bitsandbytes") is None:
            raise SimpoError(f"optim: {optimizer} needs bitsandbytes, which is not installed; use adamw_torch")

    def _check_numbers(self) -> None:
        """Reject numbers that transformers accepts although training with them makes no sense."""
        if self.max_steps != -1 and self.max_steps < 1:  # type: ignore[has-type]
            raise SimpoError(f"max_steps: must be at least 1, or -1 for num_train_epochs, not {self.max_steps}")
        for key in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise SimpoError(f"{key}: must be at least 0, not {getattr(self, key):g}")
        for key in ("seed", "data_seed"):
            if not 0 <= (getattr(self, key) or 0) < 2**32:
                raise SimpoError(f"{key}: must be at least 0 and below 2**32, not {getattr(self, key)}")
        if self.dataloader_num_workers > _MAX_WORKERS:
            raise SimpoError(f"dataloader_num_workers: at most {_MAX_WORKERS}, not {self.dataloader_num_workers}")

    def _check_checkpointing(self) -> None:
        given = self.gradient_checkpointing_kwargs or getattr(self, "activation_checkpointing_kwargs", None) or {}
        if unknown := [name for name in given if name not in _CHECKPOINT_ARGUMENTS]:
            known = ", ".join(_CHECKPOINT_ARGUMENTS)
            raise SimpoError(f"gradient_checkpointing_kwargs: {unknown[0]!r} is not one of {known}")


# Mutually exclusive ways to specify the data; one on the command line replaces the recipe's.
REPLACES = {
    "dataset_name": ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture"),
    "dataset_mixer": ("dataset_name", "dataset_mixture"),
    "dataset_mixture": ("dataset_name", "dataset_mixer", "dataset_splits", "dataset_configs"),
}


@dataclass
class DataArguments:
    """Where rows come from: one dataset, the paper's ``dataset_mixer``, or alignment-handbook's mixture."""

    dataset_name: str | None = setting(None, "Hub id, file or folder of the training data.")
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.")
    dataset_train_split: str = setting("train", "Split of dataset_name to train on, or a slice such as train[:90%].")
    eval_dataset_name: str | None = setting(None, "Hub id, file or folder of held-out data.")
    dataset_test_split: str | None = setting(
        None, "Held-out split of eval_dataset_name (default: test) or, without that, of dataset_name."
    )
    dataset_mixer: dict[str, float] | None = setting(
        None, "Datasets to mix, each with the fraction of its training split to use."
    )
    dataset_splits: list[str] | None = setting(None, "Splits of the datasets in dataset_mixer.")
    dataset_configs: list[str] | None = setting(None, "Configurations of the datasets in dataset_mixer, in order.")
    dataset_mixture: dict[str, Any] | None = setting(None, "Weighted datasets in alignment-handbook's format.")
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
            mistakes.append("dataset_name: missing; set it to the training data (a hub id, a file or a folder)")
        if len(given) > 1:
            mistakes.append(f"{' and '.join(given)}: set only one of them")
        template = self.chat_template or "none"
        if "{" not in template and template.strip().lower() != "none" and not Path(template).expanduser().is_file():
            mistakes.append(
                f"chat_template: {template[:80]!r} is neither a template nor a template file; leave it out to use the "
                "tokenizer's own"
            )
        if mistakes:
            raise CombinedError(*mistakes)


def load_datasets(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Load the raw training rows and, if the arguments specify any, held-out rows (otherwise None)."""
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


# ---- Settings that determine the result of a run.


Identity = dict[str, str | None]


def settings_identity(config: Any) -> Identity:
    """Return every setting of a configuration that affects the result of training."""
    settings = config.to_dict() | getattr(config, "hyperparameters", {})  # hyperparameters with defaults filled in
    identity: Identity = {"rows per step": str(config.per_device_train_batch_size * config.world_size)}
    for key, value in sorted(settings.items()):
        if key not in _NOT_IN_IDENTITY and not key.startswith(_NOT_IN_IDENTITY_PREFIXES):
            identity[key] = str(value)
    if config.load_best_model_at_end:  # only a saved model can be the best
        identity |= {key: str(settings[key]) for key in ("save_strategy", "save_steps")}
    return identity


def checkpoint_from_recipe(config: Any) -> str | None:
    """Return the checkpoint a recipe starts from, or None if it names none or means one in the run folder."""
    named = config.resume_from_checkpoint
    return None if named is None or str(named).lower() in ("true", "false") else str(named)


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Return every key and value of a recipe's dataclasses, for the run's record."""
    values: dict[str, Any] = {}
    for part in arguments:
        values |= part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    return values


# ---- Errors from transformers, accelerate or an optimizer about their settings, raised before anything starts.


IMPOSSIBLE = "training is impossible with these settings"


def check_optimizer(trainer: Any) -> None:
    """Create the optimizer and schedule once before training, to detect settings they reject."""
    if trainer.optimizer is None and not trainer.is_deepspeed_enabled:
        with third_party(IMPOSSIBLE):
            trainer.create_optimizer_and_scheduler(num_training_steps=2)
        trainer.optimizer = trainer.lr_scheduler = None
