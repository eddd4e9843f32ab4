"""PPO-ptx: the loss of language modeling on other data, added to every step of online training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.packing.model import policy_forward
from simpo.training.batches import ComparisonRows, describe_rows
from simpo.training.metrics import RunningMeans
from simpo.training.sft import scored_tokens

PTX = "ptx"  # the label of the data set in messages


class Pretraining:
    """Demonstrations whose average negative log-probability per token is part of every step's loss.

    Ouyang et al. 2022, arXiv 2203.02155, equation 2, the term with gamma. The rows of a step depend on its number
    alone, so that a training that is continued takes the same ones. ``name`` is the hub id, file or folder of the data
    set; ``means`` are those of the loss per token.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self._trainer = trainer
        self.rows = trainer._tokenized(load_rows(name, split="train"), trainer.processing_class, trainer.args, PTX)
        plan = trainer._plan(self.rows, trainer.args.ptx_batch_size or trainer.args.train_batch_size, training=True)
        self._plan = replace(plan, weights=scored_tokens(self.rows), drop_last=False)
        self._comparisons = ComparisonRows(self.rows)
        self.means = RunningMeans(("ptx/loss",), trainer.args.device)

    def backward(self, model: nn.Module) -> None:
        """Add the gradient of the next step's rows; ranks exchange theirs with the step's last micro-batch."""
        trainer, args = self._trainer, self._trainer.args
        epoch, number = divmod(trainer.state.global_step, self._plan.steps)
        step = self._plan.step(self._plan.order(epoch), number, args.process_index)
        model.train()
        for micro in step.micro_batches:
            batch = self._comparisons[micro, step.weight].to(args.device)
            with trainer._gradient_sync(model, last=False):
                with trainer.compute_loss_context_manager():
                    losses = -policy_forward(model, batch.packed, path=trainer.path).avg
                    weights = batch.packed.weights.to(losses)
                    loss = (losses * weights).sum() * (args.ptx_weight * args.world_size / step.weight)
                if not losses.isfinite().all():
                    where = describe_rows(self.rows, batch.rows)
                    raise SimpoError(f"ptx_dataset_name: the loss is not finite; rows: {where}; nothing was updated")
                trainer.accelerator.backward(loss)
            self.means.add(losses.detach()[:, None], batch.packed.weights)
