"""The recipe of on-policy rounds: what is asked, who judges, when to stop; sampling, pairs and training have theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from simpo.errors import SimpoError
from simpo.generation.sample import PromptArguments
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.models.settings import ModelArguments
from simpo.training.identity import named_checkpoint
from simpo.workflows.pair import PairSettings


@dataclass
class LoopSettings:
    """Keys of ``simpo loop`` that no other command has."""

    prompts: str = field(metadata={"help": "File, folder or hub id of the prompts that are answered in every round."})
    eval_prompts: str = field(metadata={"help": "The same of held-out prompts, on which every round meets the start."})
    annotator: str = field(metadata={"help": "What scores the answers that pairs are made of; see simpo annotate."})
    judges: list[str] | None = field(
        default=None, metadata={"help": "Who says whether a round beats the start (default: the annotator alone)."}
    )
    rounds: int = field(default=3, metadata={"help": "How often to sample, annotate, pair and train."})
    prompts_split: str = field(default="train", metadata={"help": "Split of prompts."})
    eval_prompts_split: str = field(default="train", metadata={"help": "Split of eval_prompts."})
    eval_n: int = field(default=1, metadata={"help": "Answers of each model to every held-out prompt."})
    engine: Literal["transformers", "vllm"] = field(default="transformers", metadata={"help": "What generates."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Template, file with one, or none for raw text (default: the tokenizer's own)."}
    )
    stop_win_rate: float | None = field(
        default=None, metadata={"help": "Stop after a round that wins less than this share, by the first judge."}
    )
    stop_kl: float | None = field(
        default=None,
        metadata={"help": "Stop after a round that is further from the start than this, in nats an answer."},
    )
    judge_url: str | None = field(default=None, metadata={"help": "Server of the annotator or judge 'api'."})
    judge_model: str | None = field(default=None, metadata={"help": "Its model's name there."})
    judge_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with its key."})
    yes: bool = field(default=False, metadata={"help": "Send requests to the server without asking."})

    def __post_init__(self) -> None:
        for key in ("rounds", "eval_n"):
            if getattr(self, key) < 1:
                raise SimpoError(f"{key}: must be at least 1, not {getattr(self, key)}")
        if self.engine not in ("transformers", "vllm"):
            raise SimpoError(f"engine: {self.engine!r} is not one of 'transformers', 'vllm'")
        if self.judges is not None and not self.judges:
            raise SimpoError("judges: name one, or leave the key out for the annotator")
        asks_a_server = "api" in (self.annotator, *(self.judges or ()))
        if asks_a_server and None in (self.judge_url, self.judge_model):
            raise SimpoError("judge_url and judge_model: annotator or judge 'api' needs both")
        if not asks_a_server and (self.judge_url, self.judge_model) != (None, None):
            raise SimpoError("judge_url and judge_model: of annotator or judge 'api' alone; leave them out")
        if self.stop_win_rate is not None and not 0 <= self.stop_win_rate <= 1:
            raise SimpoError(f"stop_win_rate: must be a share from 0 to 1, not {self.stop_win_rate}")
        if self.stop_kl is not None and not 0 < self.stop_kl < math.inf:
            raise SimpoError(f"stop_kl: must be a number above 0, not {self.stop_kl}")


@dataclass(frozen=True)
class LoopRecipe:
    """All parts of the recipe; ``config`` is that of preference training, whose output folder is the loop's.

    Raises:
        SimpoError: one answer a prompt, which cannot be compared; adapters for an engine that takes none; or a
            checkpoint, from which every round would start instead of from the last one's model.
    """

    settings: LoopSettings
    sampling: SamplingSettings
    pairs: PairSettings
    model: ModelArguments
    config: Any

    def __post_init__(self) -> None:
        if self.sampling.n < 2:
            raise SimpoError(f"n: {self.sampling.n} answer to a prompt cannot be compared; set n to 2 or more")
        if self.settings.engine == "vllm" and self.model.use_peft:
            raise SimpoError("engine: vllm samples from whole models, no adapters; use transformers or use_peft: false")
        if named_checkpoint(self.config) is not None:
            raise SimpoError("resume_from_checkpoint: every round starts from the last one's model; leave it out")

    @property
    def asked(self) -> PromptArguments:
        """What is answered in every round, to be trained on."""
        return self._prompts(self.settings.prompts, self.settings.prompts_split)

    @property
    def held_out(self) -> PromptArguments:
        """What every round's model and the start answer, to be compared."""
        return self._prompts(self.settings.eval_prompts, self.settings.eval_prompts_split)

    def _prompts(self, name: str, split: str) -> PromptArguments:
        rendering = self.config.tokenize_settings.rendering
        return PromptArguments(name, split, self.settings.chat_template, rendering=rendering)

    @property
    def held_out_sampling(self) -> SamplingSettings:
        """The same for every model, and another seed than any round's."""
        return replace(self.sampling, n=self.settings.eval_n, seed=derived_seed(self.sampling.seed, 0))

    @property
    def judges(self) -> list[str]:
        """Names of those who compare a round with the start."""
        return self.settings.judges or [self.settings.annotator]


def as_it_is(model: ModelArguments) -> ModelArguments:
    """A model without the adapter that training would put on it."""
    return ModelArguments(
        model.model_name_or_path, model.model_revision, model.dtype, model.attn_implementation, model.trust_remote_code
    )
