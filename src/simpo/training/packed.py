"""``PackedTrainer``: transformers' ``Trainer`` on packed batches, with its own loss and micro-batch loop."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from simpo.data.images import text_tokenizer
from simpo.data.rows import as_dataset
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.models.adapters import check_adapter, disable_dropout, prevent_repacking
from simpo.models.checkpoint import Limits
from simpo.models.devices import check_liger, compile_layers, explain_oom
from simpo.models.loading import load_model, stop_at_end_of_turn
from simpo.models.settings import ModelArguments
from simpo.objectives import Responses
from simpo.packing.batching import RowSizes, StepPlan, check_budget, default_batch_tokens
from simpo.packing.layout import PackedBatch
from simpo.packing.model import ForwardPath, choose_path, policy_forward, prepare_policy, resolve_path, state_of
from simpo.packing.routing import balance_weight, record_routing
from simpo.packing.selfcheck import Path
from simpo.runs.results import Metric
from simpo.training.batches import (
    ComparisonRows,
    PlannedBatch,
    PlanSampler,
    check_rows,
    collate,
    comparisons_of,
    comparisons_to_check,
    describe_rows,
    image_reader,
    response_counts,
    row_sizes,
    step_loader,
    widest_float,
)
from simpo.training.callbacks import CheckpointShare, RunCallback
from simpo.training.checkpoints import ResumableTrainer
from simpo.training.metrics import WEIGHT, RunningMeans, Scores
from simpo.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

_SCORING_ROWS = 512  # rows batched together when scoring responses
_OUTSIDE_MICRO_BATCHES = (
    "optim: ran out of memory outside the forward and backward pass, most likely while allocating optimizer states; "
    "use an optimizer with smaller states (adamw_torch_8bit, adafactor), or shard them across GPUs (recipes/launch)"
)


class Description(NamedTuple):
    """How the log and the model card describe a run."""

    objective: str  # line in the log
    method: str  # for the card's first sentence: MODEL [method] on DATA
    tags: list[str]  # tags of the card


class PackedTrainer(ResumableTrainer):
    """Trains a model on comparisons of one prompt with K responses; subclasses define the loss.

    The loss of a step is the weighted mean of its rows' losses, however they are split over micro-batches and ranks.
    Overrides how ``Trainer`` builds batches (``get_train_dataloader``, ``get_eval_dataloader``), computes their loss
    (``compute_loss``), and loops over micro-batches (``training_step``) and evaluation rows (``evaluation_loop``).

    Args:
        model: a model, or the hub name or folder of one.
        args: the configuration (default: that of ``config_type``).
        train_dataset: rows in any shape that :mod:`simpo.data` recognizes, or tokenized rows.
        eval_dataset: likewise, or several datasets by name.
        processing_class: the tokenizer, or the processor for rows with images; required unless rows are tokenized.
        callbacks, optimizers: as for ``Trainer``.

    Raises:
        SimpoError: the data or configuration cannot be trained on; during training, a loss or gradient is not finite
            (raised before the optimizer changes the weights).
    """

    config_type: ClassVar[type[TrainingSettings]]
    command: ClassVar[str]  # the command that runs this trainer
    row_noun: ClassVar[str]  # what its rows are called, in the plural
    takes_images: ClassVar[bool] = False
    takes_loading: ClassVar[bool] = False  # whether it takes ``loading``, how the model was loaded, to load more models
    pipeline: ClassVar[str] = "text-generation"  # the hub's task name for its models

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingSettings | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = self.config_type() if args is None else args
        model = self.load(model) if isinstance(model, str) else model
        if isinstance(model, PeftModel):
            check_adapter(model)
        prevent_repacking(model)
        if args.disable_dropout:
            disable_dropout(model)
        if args.use_liger_kernel:
            check_liger(model, args.liger_kernel_config)
        processing_class = processing_class if self.takes_images else text_tokenizer(processing_class)
        train_dataset = self._tokenize(train_dataset, processing_class, args, "train")
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        held_out = {name: self._tokenize(rows, processing_class, args, name) for name, rows in held_out.items()}
        self.images = image_reader(model, processing_class, (train_dataset, *held_out.values()), args)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=held_out if isinstance(eval_dataset, dict) else held_out["eval"],
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for label, rows in {"train": train_dataset, **held_out}.items():
            if rows is not None:
                check_rows(Limits.of(self.model.config), rows, label)
        stop_at_end_of_turn(self.model, text_tokenizer(processing_class))
        self._balance = balance_weight(self.model)
        if self._balance and args.torch_compile:
            raise SimpoError(
                "torch_compile: cannot be combined with output_router_logits, because its loss needs the router outputs"
            )
        self._routing = RunningMeans(("router/aux_loss", "router/max_load"), self.args.device)
        self._other_means["router"] = self._routing
        self.path = self._choose_path()
        if args.torch_compile:
            compile_layers(self.model, args, self.accelerator)
        if args.checkpointed_share < 1:
            self.add_callback(CheckpointShare(args.checkpointed_share))
        self._step: list[tuple[PlannedBatch, Tensor]] = []  # micro-batches of the current step and the losses per row

    # ---- For subclasses to define.

    @classmethod
    def load(cls, model: str | ModelArguments) -> PreTrainedModel | PeftModel:
        """Load the kind of model this trainer trains, from a hub name or a folder."""
        return load_model(model)

    @classmethod
    @abstractmethod
    def describe(cls, args: Any) -> Description:
        """Describe a run with these settings, for the log and the model card."""

    @classmethod
    @abstractmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize a dataset, called ``label`` in messages; already tokenized rows are returned unchanged."""

    @abstractmethod
    def loss_and_metrics(self, y: Any, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Return per-row losses ``[C]`` (differentiable) and metrics ``[C, N]`` for the responses ``y``.

        The metrics are detached and in the order of :attr:`metric_names`, the loss first. NaN means that a metric does
        not apply to the row.
        """

    @abstractmethod
    def compare(self, before: Scores, after: Scores) -> list[Metric]:
        """Return held-out results, given the scores of the initial model and of the trained model."""

    def summary(self) -> list[Metric]:
        """Return any other results of a finished run."""
        return []

    def row_weights(self, rows: Dataset) -> np.ndarray | None:
        """Return each row's weight in the mean over its step, ``[rows]``, or None if all rows count equally."""
        return None

    def add_columns(self, rows: Dataset) -> Dataset:
        """Add the columns this trainer needs to tokenized rows. Every rank must call this."""
        return rows

    @property
    def step_rows(self) -> Dataset:
        """The rows to which the row numbers in a step's micro-batches refer."""
        return self.add_columns(self.train_dataset)

    def before_step(self, model: nn.Module, batches: Sequence[PlannedBatch]) -> None:
        """Compute anything that needs all micro-batches of a step, before its first forward pass."""

    def before_evaluation(self, batches: Sequence[PlannedBatch]) -> None:
        """Compute anything that needs all micro-batches in one element of :meth:`get_eval_dataloader`."""

    def forward_rows(self, model: nn.Module, batch: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Run one forward pass and return losses and metrics as :meth:`loss_and_metrics` does."""
        return self.loss_and_metrics(self.responses(model, batch.packed), batch)

    def responses(self, model: nn.Module, packed: PackedBatch) -> Responses:
        """Return the responses' log-probabilities, ``[R]`` each, for :meth:`loss_and_metrics`."""
        return policy_forward(model, packed, path=self.path)

    # ---- Data.

    def _all_rows(self) -> list[Dataset]:
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [rows for rows in (self.train_dataset, *held_out) if rows is not None]

    @classmethod
    def _tokenize(
        cls, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str
    ) -> Dataset | None:
        if dataset is None:
            return None
        dataset = as_dataset(dataset, f"{label}_dataset")
        if "prompt_ids" not in dataset.column_names and tokenizer is None:
            raise SimpoError("processing_class: missing; pass the tokenizer, or tokenized rows")
        prepared = cls.prepare(dataset, tokenizer, args, label)
        rows, report = prepared.dataset, prepared.report
        if report.remarkable or (report.notices and "prompt_ids" not in dataset.column_names):
            logger.warning("\n".join(report.lines()))
        if args.max_batch_tokens is not None:  # checked before anything is written
            path: Path = "packed" if args.forward_path == "auto" else args.forward_path
            check_budget(row_sizes(rows, path).lengths, args.max_batch_tokens)
        return rows

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader with one element per optimizer step: this rank's micro-batches from the shared plan."""
        if self.train_dataset is None:
            raise SimpoError("train_dataset: missing; pass the rows to train on")
        rows = self.add_columns(self.train_dataset)
        plan = self._plan(rows, self.args.train_batch_size, training=True)
        if plan.steps == 0:
            raise SimpoError(
                f"dataloader_drop_last: {len(rows)} rows do not fill one step of {plan.rows_per_step}, so nothing "
                "would be trained; lower per_device_train_batch_size"
            )
        # The trainer's step count determines the epoch, also after a resume.
        return step_loader(rows, plan, lambda: self.state.global_step // plan.steps, self.args, self.images)

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """Return a loader of the rows in order, with ``per_device_eval_batch_size`` rows per rank and element."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise SimpoError("eval_dataset: missing; pass the rows to evaluate on")
        rows = self._tokenize(rows, self.processing_class, self.args, "eval")
        check_rows(Limits.of(self.model.config), rows, "eval")
        rows = self.add_columns(rows)
        plan = self._plan(rows, self.args.eval_batch_size, training=False)
        return step_loader(rows, plan, lambda: 0, self.args, self.images)

    get_test_dataloader = get_eval_dataloader

    def _sizes(self, rows: Dataset) -> RowSizes:
        """Return how many tokens each row takes in a forward pass."""
        rule = state_of(prepare_policy(self.model)).lengths
        return row_sizes(rows, "packed" if self.path == "auto" else self.path, rule)

    def _plan(self, rows: Dataset, rows_per_device: int, *, training: bool) -> StepPlan:
        """Return the plan, which is the same on every rank."""
        args, sizes = self.args, self._sizes(rows)
        budget = args.max_batch_tokens
        if budget is None:
            budget = default_batch_tokens(int(sizes.lengths.max()), cpu=args.device.type == "cpu")
        seed = args.seed if args.data_seed is None else args.data_seed
        return StepPlan(
            sizes=sizes,
            rows_per_step=rows_per_device * args.world_size,
            max_batch_tokens=budget,
            world_size=args.world_size,
            seed=seed if training and args.train_sampling_strategy == "random" else None,
            drop_last=training and args.dataloader_drop_last,
            weights=self.row_weights(rows),
        )

    def _choose_path(self) -> ForwardPath:
        """Verify the fast path on a few real rows, in the training precision."""
        model, datasets = prepare_policy(self.model), self._all_rows()
        if not datasets:
            return self.args.forward_path
        sample = PackedBatch.build(comparisons_to_check(model, datasets, self.images))
        with self.accelerator.autocast(), self.forwards():
            choose_path(model, sample)
        path = resolve_path(model, sample, self.args.forward_path)
        if path == "padded" and state_of(model).separate_rows and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise SimpoError(
                f"{'fsdp' if self.is_fsdp_enabled else 'deepspeed'}: this model's result for a row depends on the rest "
                "of its batch, so every response needs a separate forward pass; sharded training requires the same "
                "number of passes on every process: train without it"
            )
        votes = self._sum_over_ranks(torch.tensor([int(path == name) for name in get_args(Path)]).to(self.args.device))
        # Ranks on different paths would wait for one another forever.
        return path if self.args.world_size in votes else "padded"

    # ---- Loss.

    def compute_loss(  # noqa: D102 - documented by Trainer
        self,
        model: nn.Module,
        inputs: PlannedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = inputs.to(self.args.device)
        with nullcontext() if self.args.torch_compile else record_routing(self.model, batch.packed) as routing:
            losses, metrics = self.forward_rows(model, batch)
        weights = batch.packed.weights.to(losses)
        loss = (losses * weights).sum()
        if routing is not None and (self._balance or not routing.is_empty):
            weight, balance = weights.sum(), routing.loss()
            self._routing.add(torch.stack([balance.detach(), routing.max_load()])[None], weight[None])
            if self._balance:
                loss = loss + self._balance * balance * weight
        # DDP averages gradients over ranks, so multiply by world_size to get the sum over the step's total weight.
        loss = loss * (self.args.world_size / batch.step_weight)
        return (loss, metrics) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in the base class; running out of memory raises an error with advice."""
        with explain_oom(lambda: _OUTSIDE_MICRO_BATCHES):
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward for all micro-batches of one optimizer step and return its loss, ``[]``."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers
        total = torch.zeros((), device=self.args.device)
        batches = inputs["micro_batches"]
        self._step = []
        self.before_step(model, batches)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self._gradient_sync(model, last=last), explain_oom(partial(self._memory_advice, batch)):
                with self.compute_loss_context_manager():
                    loss, metrics = self.compute_loss(model, batch, return_outputs=True)
                self._step.append((batch, metrics[:, 0]))
                if self.is_deepspeed_enabled and last:  # DeepSpeed updates the weights in the last backward of a step
                    invalid = sum((~losses.isfinite()).sum() for _, losses in self._step)
                    if self._sum_over_ranks(torch.as_tensor(invalid, device=self.args.device)):
                        raise SimpoError(self._not_finite())
                self.accelerator.backward(loss)
            total += loss.detach()
            self._tokens += batch.packed.tokens
            self._means.add(metrics, batch.packed.weights)
        return total

    @contextmanager
    def _gradient_sync(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Synchronize gradients only after the last micro-batch (FSDP reduce-scatters after each, to save memory)."""
        self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps when this is true
        postpone = not last and not isinstance(self.model, FSDPModule)
        with self.accelerator.no_sync(model) if postpone else nullcontext():
            yield

    def _memory_advice(self, batch: PlannedBatch) -> str:
        """Return advice for a micro-batch that did not fit into memory."""
        lengths = self._sizes(self.step_rows).lengths
        tokens, longest = int(lengths[list(batch.rows)].sum()), int(lengths.max())
        problem = f"max_batch_tokens: a micro-batch of {tokens} tokens does not fit into memory"
        if tokens // 2 >= longest:
            return f"{problem}; set it to {tokens // 2}"
        lower = f"; set it to {longest}, the longest row, and" if tokens > longest else ":"
        return f"{problem}{lower} set activation_checkpointing: true, lower max_length or use a smaller dtype or model"

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return this rank's FLOPs per step as transformers counts them: 6 per token and non-embedding weight."""
        tokens = sum(batch.packed.tokens for batch in inputs["micro_batches"])
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    # ---- A non-finite loss or gradient ends the run.

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm, which Trainer requests before every optimizer step, and check that it is finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16: overflows are expected, and the scaler skips the step
        if not scaled and norm is not None and not math.isfinite(float(norm)):
            raise SimpoError(self._not_finite())
        return norm

    def _not_finite(self) -> str:
        """Describe the problem with the current step and the rows that cause it; the same on every rank."""
        invalid = [batch.rows[int(place)] for batch, losses in self._step for place in (~losses.isfinite()).nonzero()]
        local = [invalid, [row for batch, _ in self._step for row in batch.rows]]
        gathered = map(gather_object, local) if self.args.world_size > 1 else local
        rows, step = (sorted(set(numbers)) for numbers in gathered)  # fillers occur several times
        quantity = "loss"
        if not rows:
            quantity = "gradient"
            rows = [row for row in step if not self._has_finite_gradient(row)] if self.args.world_size == 1 else step
        places = describe_rows(self.step_rows, rows)
        hint = " (all rows of the step: check the model and the learning rate)" if len(rows) == len(step) > 1 else ""
        updated = self.is_deepspeed_enabled and quantity == "gradient"  # DeepSpeed's backward updates the weights
        outcome = "the weights were updated, but the last checkpoint is intact" if updated else "nothing was updated"
        return (
            f"step {self.state.global_step + 1}: the {quantity} is not finite; rows: {places}{hint}; {outcome}: "
            "fix or remove these rows"
        )

    def _has_finite_gradient(self, row: int) -> bool:
        batch = ComparisonRows(self.step_rows, self.images).unplanned_batch([row])
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, batch)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)

    # ---- Evaluation.

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Average the metrics over the rows of ``dataloader``; predictions are metrics and weights, ``[rows, N + 1]``.

        Trainer's own loop would prepare the model for evaluation; accelerate would then consider it prepared for
        training as well and not wrap it in DDP.
        """
        values = torch.from_numpy(np.stack(list(self._scores(dataloader).values()), axis=1))
        means = RunningMeans(self.metric_names, values.device)
        means.add(values[:, :-1], values[:, -1])
        metrics = means.take(lambda sums: sums)
        for callback in self.callback_handler.callbacks if self.is_in_train else ():
            if isinstance(callback, RunCallback):
                metrics |= callback.evaluate(self)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(values.numpy(), None, metrics, len(values))

    def score_rows(self, dataset: Dataset) -> Scores:
        """Return the metrics of every row of ``dataset``, in order; unlike ``predict``, report nothing to trackers."""
        scores = self._scores(self.get_test_dataloader(dataset))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_predict(self.args, self.state, self.control)  # closes the progress bar
        return scores

    def _scores(self, dataloader: DataLoader) -> Scores:
        """Return metrics and weights of every row; ``dataloader`` yields each row on exactly one rank."""
        names, device = (*self.metric_names, WEIGHT), self.args.device
        values = torch.zeros(len(dataloader.dataset), len(names), dtype=widest_float(device), device=device)  # type: ignore[arg-type]
        self.model.eval()
        if callable(to_eval := getattr(self.optimizer, "eval", None)):  # schedule-free optimizers
            to_eval()
        self.callback_handler.eval_dataloader = dataloader  # progress bars show its length
        with torch.no_grad(), self.accelerator.autocast(), self.forwards():
            for inputs in dataloader:
                self.before_evaluation(inputs["micro_batches"])
                for batch in inputs["micro_batches"]:
                    metrics = self.compute_loss(self.model, batch, return_outputs=True)[1]
                    if batch.packed.weights.any():  # not a filler
                        columns = [metrics.to(values), batch.packed.weights[:, None].to(values)]
                        values[torch.tensor(batch.rows, device=device)] = torch.cat(columns, dim=1)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return dict(zip(names, self._sum_over_ranks(values).double().cpu().numpy().T, strict=True))

    def response_logps(self, rows: Dataset) -> Tensor:
        """Return all responses' log-probabilities under the model, ``[R]`` float64. Every rank must call this."""
        return self.compute_for_responses(rows, lambda batch: self.responses(self.model, batch).logp)

    def compute_for_responses(
        self,
        rows: Dataset,
        compute: Callable[[PackedBatch], Tensor],
        counts: np.ndarray | None = None,
        columns: Sequence[int] = (),
    ) -> Tensor:
        """Apply ``compute`` to packed batches of ``rows`` and return its values for all rows, concatenated, in float64.

        Every rank must call this. ``counts`` ``[rows]`` is the number of values per row (default: one per response),
        each of shape ``columns``.
        """
        plan, device = self._plan(rows, _SCORING_ROWS // self.args.world_size, training=False), self.args.device
        counts = response_counts(rows) if counts is None else counts
        ends = np.cumsum(counts)
        values = torch.zeros(int(ends[-1]), *columns, dtype=widest_float(device), device=device)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self.forwards():
            for step in PlanSampler(plan, lambda: 0, self.args.process_index):
                for micro, _ in step:
                    results = compute(PackedBatch.build(comparisons_of(rows, micro.rows, self.images)).to(device))
                    if any(micro.weights):  # not a filler
                        index = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in micro.rows])
                        values[torch.from_numpy(index).to(device)] = results.to(values)
        return self._sum_over_ranks(values)
