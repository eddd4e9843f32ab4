"""The recipe of on-policy rounds: prompts, annotator, judges, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from simpo.config import check_values, required, setting, setting_of
from simpo.errors import SimpoError
from simpo.generation.sample import PromptArguments
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.judging.settings import Annotator, AnnotatorArguments, Normalization, annotator_names
from simpo.models.settings import ModelArguments
from simpo.training.identity import checkpoint_from_recipe
from simpo.workflows.pair import PairSettings


@dataclass
class LoopSettings:
    """Keys of ``simpo loop`` that no other command has."""

    prompts: str = required("File, folder or hub id of the prompts that are answered in every round.")
    eval_prompts: str = required(
        "File, folder or hub id of held-out prompts, on which every round is compared with the start."
    )
    annotator: Annotator = setting_of(AnnotatorArguments, "annotator")
    judges: list[str] | None = setting(
        None, "Annotators that decide whether a round is better than the start (default: annotator; of several, each)."
    )
    annotator_normalization: Normalization | None = setting_of(AnnotatorArguments, "annotator_normalization")
    rounds: int = setting(3, "How many times to sample, annotate, pair and train.", least=1)
    prompts_split: str = setting("train", "Split of prompts.")
    eval_prompts_split: str = setting("train", "Split of eval_prompts.")
    eval_n: int = setting(1, "Answers of each model to every held-out prompt.", least=1)
    engine: Literal["transformers", "vllm"] = setting("transformers", "The library that generates the answers.")
    chat_template: str | None = setting(
        None, "Template, file with one, or none for raw text (default: the tokenizer's own)."
    )
    stop_win_rate: float | None = setting(
        None, "Stop after a round whose win rate by the first judge is below this share.", least=0, most=1
    )
    stop_kl: float | None = setting(
        None, "Stop after a round whose KL from the start is above this, in nats per answer.", above=0
    )
    judge_url: str | None = setting(None, "Server of the annotator or judge 'api'.")
    judge_model: str | None = setting(None, "Its model's name on that server.")
    judge_key_env: str = setting("OPENAI_API_KEY", "Environment variable with its key.")
    yes: bool = setting(False, "Send requests to the server without asking.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.judges is not None and not self.judges:
            raise SimpoError("judges: name one, or leave the key out to use the annotator")
        needs_server = "api" in (*self.annotators, *(self.judges or ()))
        if needs_server and None in (self.judge_url, self.judge_model):
            raise SimpoError("judge_url and judge_model: the annotator or judge 'api' needs both")
        if not needs_server and (self.judge_url, self.judge_model) != (None, None):
            raise SimpoError("judge_url and judge_model: only the annotator or judge 'api' uses them; leave them out")

    @property
    def annotators(self) -> list[str]:
        """The name of the annotator, or of each one that is combined."""
        return annotator_names(self.annotator, self.annotator_normalization)


@dataclass(frozen=True)
class LoopRecipe:
    """All parts of the recipe; ``config`` is that of preference training, and its output folder is the loop's."""

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
        if checkpoint_from_recipe(self.config) is not None:
            raise SimpoError("resume_from_checkpoint: every round starts from the previous round's model; leave it out")

    @property
    def training_prompts(self) -> PromptArguments:
        """The prompts whose answers are trained on."""
        return self._prompts(self.settings.prompts, self.settings.prompts_split)

    @property
    def held_out_prompts(self) -> PromptArguments:
        """The prompts on which every round's model is compared with the start."""
        return self._prompts(self.settings.eval_prompts, self.settings.eval_prompts_split)

    def _prompts(self, name: str, split: str) -> PromptArguments:
        rendering = self.config.tokenize_settings.rendering
        return PromptArguments(name, split, self.settings.chat_template, rendering=rendering)

    @property
    def held_out_sampling(self) -> SamplingSettings:
        """The same for every model, with a seed that no round uses for training prompts."""
        return replace(self.sampling, n=self.settings.eval_n, seed=derived_seed(self.sampling.seed, 0))

    @property
    def judges(self) -> list[str]:
        """Names of the judges that compare a round with the start."""
        return self.settings.judges or self.settings.annotators

    def start(self) -> ModelArguments:
        """The start model without the adapter that training would add."""
        return without_adapter(self.model)


def without_adapter(model: ModelArguments) -> ModelArguments:
    """The arguments for loading a model as it is stored, without a new adapter."""
    return ModelArguments(
        model.model_name_or_path,
        model.model_revision,
        model.dtype,
        model.attn_implementation,
        model.trust_remote_code,
        model.allow_pickle,
    )
