"""The kinds of training that a command runs: what differs between them, for one workflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simpo.runs.results import Metric
from simpo.training.batches import Scores
from simpo.training.held_out import compare_conversations, compare_preferences, compare_rewards
from simpo.training.packed import PackedTrainer
from simpo.training.reward import RewardTrainer
from simpo.training.sft import SFTTrainer
from simpo.training.trainer import PreferenceTrainer


@dataclass(frozen=True)
class Task:
    """One kind of training.

    Attributes:
        command: the command that runs it.
        trainer: what does the work.
        compare: from the configuration, and the scores before and after, held-out figures.
        rows: what its rows are called.
        describe: from the configuration, what is being optimized, in a few words.
        method: from the configuration, how the model card says what was done.
        tags: from the configuration, the model card's tags.
        pipeline: what the hub calls the use of such a model.
    """

    command: str
    trainer: type[PackedTrainer]
    compare: Callable[[Any, Scores, Scores], list[Metric]]
    rows: str
    describe: Callable[[Any], str]
    method: Callable[[Any], str]
    tags: Callable[[Any], list[str]]
    pipeline: str = "text-generation"

    @property
    def generates(self) -> bool:
        """Whether what is trained writes texts."""
        return self.pipeline == "text-generation"


def _describe_objective(config: Any) -> str:
    weights = {key: getattr(config, key) for key in ("sft_weight", "kl_weight") if getattr(config, key)}
    settings = ", ".join(f"{key} {value}" for key, value in (config.hyperparameters | weights).items())
    return f"objective: {config.objective} ({settings})" if settings else f"objective: {config.objective}"


PREFERENCES = Task(
    command="train",
    trainer=PreferenceTrainer,
    compare=lambda config, before, after: compare_preferences(before, after, has_reference=config.row.needs_reference),
    rows="pairs",
    describe=_describe_objective,
    method=lambda config: f"aligned by **{config.objective}** ({config.row.paper})",
    tags=lambda config: ["simpo", "preference-optimization", config.objective],
)

SUPERVISED = Task(
    command="sft",
    trainer=SFTTrainer,
    compare=lambda config, before, after: compare_conversations(before, after),
    rows="conversations",
    describe=lambda config: "objective: average negative log-probability of the assistant's tokens",
    method=lambda config: "fine-tuned on demonstrations, on the assistant's turns only,",
    tags=lambda config: ["simpo", "sft"],
)

REWARDS = Task(
    command="reward",
    trainer=RewardTrainer,
    compare=lambda config, before, after: compare_rewards(before, after),
    rows="comparisons",
    describe=lambda config: f"objective: Bradley-Terry likelihood of the preferences (margin: {config.margin})",
    method=lambda config: "with one number for an output became a **reward model** by the Bradley-Terry likelihood",
    tags=lambda config: ["simpo", "reward-model"],
    pipeline="text-classification",
)
