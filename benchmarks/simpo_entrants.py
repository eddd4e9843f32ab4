"""simpo's entrants: its trainer as a user runs it, and its forward in a bare loop over comparisons with any K."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.entrants import Entrant
from benchmarks.setting import BETA, GAMMA, Setting, load_comparisons, training_arguments
from simpo.packing.batching import RowSizes, StepPlan
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import choose_path, policy_forward, prepare_policy, state_of
from simpo.training.preference import PreferenceConfig, PreferenceTrainer


def simpo_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    """Build simpo's trainer for ``setting``, with ``folder`` as its output folder."""
    rows = Dataset.from_list([asdict(comparison) for comparison in load_comparisons(setting)])
    args = PreferenceConfig(
        per_device_train_batch_size=setting.pairs_per_step,
        forward_path=entrant.path,
        max_batch_tokens=entrant.max_batch_tokens,
        max_length=setting.max_length,
        torch_compile=entrant.compiled,
        use_liger_kernel=entrant.liger,
        checkpointed_share=entrant.checkpointed or 1.0,
        **_objective(entrant, folder),
        **training_arguments(setting, folder) | {"gradient_checkpointing": entrant.checkpointed > 0},
    )
    trainer = PreferenceTrainer(model, args=args, train_dataset=rows.select_columns(["prompt_ids", "response_ids"]))
    if entrant.path == "auto" and trainer.path != "packed":
        reasons = "; ".join(state_of(prepare_policy(model)).reasons)
        raise RuntimeError(f"simpo did not take the packed path: {reasons}")
    return trainer


def _objective(entrant: Entrant, folder: str) -> dict[str, Any]:
    if entrant.objective == "simpo":
        return {"objective": "simpo", "beta": BETA, "gamma_beta_ratio": GAMMA / BETA}
    return {
        "objective": "dpo",
        "precompute_ref_log_probs": entrant.precomputed,
        "reference_cache": f"{folder}/reference",
    }


def planned_batches(trainer: Any) -> list[list[TokenizedComparison]]:
    """Return the comparisons in each micro-batch of the measured steps, as planned by the trainer."""
    steps = list(trainer.get_train_dataloader())[1:]
    return [list(micro.packed.comparisons) for step in steps for micro in step["micro_batches"]]


class Loop:
    """A training loop around simpo's packed forward, with the same loss whether or not prompts are shared.

    The loss of a comparison is the other responses' mean ``avg`` minus the best response's. It is linear, so the
    responses of one comparison may be in different micro-batches.
    """

    def __init__(self, model: Any, entrant: Entrant, setting: Setting) -> None:
        self.model, self.shared, self.setting = model, entrant.shared, setting
        self.budget = entrant.max_batch_tokens
        self.losses: list[float] = []
        rows = load_comparisons(setting)
        size = setting.pairs_per_step
        self.steps = [list(self._batches(rows[at : at + size])) for at in range(0, len(rows), size)]

    def run(self, on_step_end: Callable[[], None]) -> None:
        """Train on every step."""
        prepare_policy(self.model)
        choose_path(self.model, PackedBatch.build([_shortened(self.steps[0][0][0][0])]))
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.setting.learning_rate, fused=True)
        for step in self.steps:
            total = torch.zeros((), device=self.setting.device)
            for comparisons, weights in step:
                with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.dtype == "bf16"):
                    y = policy_forward(
                        self.model, PackedBatch.build(comparisons).to(self.setting.device), path="packed"
                    )
                loss = (y.avg * weights.to(y.avg)).sum()
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(total.item())
            on_step_end()

    def batches(self) -> list[list[TokenizedComparison]]:
        """Return the comparisons in each micro-batch of the measured steps."""
        return [comparisons for step in self.steps[1:] for comparisons, _ in step]

    def _batches(self, rows: list[TokenizedComparison]) -> Iterator[tuple[list[TokenizedComparison], Tensor]]:
        """Yield the micro-batches of a step with each response's weight in the loss."""
        units = []
        for row in rows:
            others = len(row.response_ids) - 1
            weights = [(1.0 / others if k else -1.0) / len(rows) for k in range(others + 1)]
            if self.shared:
                units.append((row, weights))
            else:
                parts = (TokenizedComparison(row.prompt_ids, [ids]) for ids in row.response_ids)
                units += [(part, [weight]) for part, weight in zip(parts, weights, strict=True)]
        lengths = np.array([unit.packed_length for unit, _ in units])
        budget = self.budget or max(2048 if self.setting.device == "cpu" else 16384, int(lengths.max()))
        plan = StepPlan(RowSizes.unpadded(lengths), rows_per_step=len(units), max_batch_tokens=budget)
        for micro in plan.step(plan.order(0), 0).micro_batches:
            chosen = [units[row] for row in micro.rows]
            yield [unit for unit, _ in chosen], torch.tensor([weight for _, weights in chosen for weight in weights])


def _shortened(row: TokenizedComparison) -> TokenizedComparison:
    """Shorten ``row`` for the self-check, which computes every response several times."""
    return TokenizedComparison(row.prompt_ids[:32], [ids[:16] for ids in row.response_ids])
