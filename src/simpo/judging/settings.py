"""Settings for judges and annotators: names, servers, prices, and how models are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simpo.client import ChatClient, Endpoint, Prices
from simpo.client.chat_client import default_cache
from simpo.config import check_values, required, setting
from simpo.errors import SimpoError
from simpo.models.settings import ModelArguments

SCORERS = "exact, ifbench, reasoning_gym:TASK, function:MODULE:NAME, reward:MODEL, logp:MODEL"
JUDGES = f"{SCORERS}, human:FILE, api"
ANNOTATORS = f"{SCORERS}, api"

Annotator = dict[str, float] | str
Normalization = Literal["none", "zscore", "rank"]


def annotator_names(annotator: Annotator, normalization: Normalization | None) -> list[str]:
    """Return the annotators' names, checking the weights; raises :class:`SimpoError` for invalid values."""
    if isinstance(annotator, str):
        if normalization is not None:
            raise SimpoError("annotator_normalization: needs several annotators, {NAME: WEIGHT, ...}; remove it")
        return [annotator]
    if not annotator:
        raise SimpoError("annotator: is empty; give a name, or {NAME: WEIGHT, ...}")
    for name, weight in annotator.items():
        if not 0 < weight < math.inf:
            raise SimpoError(f"annotator: the weight of {name} must be above 0 and finite, not {weight:g}")
    return list(annotator)


@dataclass(frozen=True)
class JudgeOptions:
    """Options for creating judges."""

    client: ChatClient | None = None  # client for the judge `api`; None if no server is configured
    prompt: Path | None = None  # judge prompt file for `api`; None uses the built-in prompt
    max_tokens: int = 1024  # maximum reply length for `api`
    dtype: str | None = None  # dtype of a judge model's weights; None chooses by device
    trust_remote_code: bool = False  # allow running code: a function, or code that comes with a model
    allow_pickle: bool = False  # allow loading pickled weights if a judge model has no safetensors
    strip_thinking: bool = False  # hide the thinking at the start of answers from judges
    log: Callable[[str], None] = print  # receives progress lines

    @classmethod
    def during_training(
        cls, model: ModelArguments, client: ChatClient | None, log: Callable[[str], None] = print
    ) -> JudgeOptions:
        """Return options for judges used while training ``model``; they inherit the model's loading permissions."""
        return cls(client, trust_remote_code=model.trust_remote_code, allow_pickle=model.allow_pickle, log=log)


def server_client(
    url: str | None,
    model: str | None,
    key_env: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    timeout: float = 60.0,
    *,
    cache: Path | None = None,
) -> ChatClient | None:
    """Create the client for a judge's server, or return None if none is configured."""
    if url is None or model is None:
        return None
    return ChatClient(Endpoint(url, model, key_env, concurrency, timeout), cache or default_cache())


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Settings for the judge ``api``, a model behind an OpenAI-compatible server."""

    judge_url: str | None = setting(None, "URL of the judge's server, e.g. https://api.openai.com/v1.")
    judge_model: str | None = setting(None, "Name of the judge model on that server.")
    judge_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable that holds the API key (local servers do not need one)."
    )
    judge_concurrency: int = setting(8, "Maximum number of requests in flight.")
    judge_timeout: float = setting(60.0, "Timeout for a reply, in seconds.")
    judge_max_tokens: int | None = setting(
        None, "Maximum reply length in tokens (default: the benchmark's); raise it for reasoning models.", least=1
    )
    judge_prompt: Path | None = setting(None, "File with a judge prompt (default: the built-in one).")
    cache: Path | None = setting(None, "Folder for cached replies (default: ~/.cache/simpo/replies).")
    prices: tuple[float, float] | None = setting(
        None, "Dollars per million prompt and completion tokens, to estimate the judge's cost."
    )
    yes: bool = setting(False, "Send the requests without asking.")
    strip_thinking: bool = setting(False, "Hide the thinking at the start of answers from judges.")

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise SimpoError("judge_url and judge_model: set both or neither")
        check_values(self)

    def client(self) -> ChatClient | None:
        """Create the client, or return None if no server is configured; raises :class:`SimpoError` for bad values."""
        connection = (self.judge_key_env, self.judge_concurrency, self.judge_timeout)
        return server_client(self.judge_url, self.judge_model, *connection, cache=self.cache)

    def token_prices(self) -> Prices | None:
        """Return the token prices, or None if not given; raises :class:`SimpoError` if one is invalid."""
        return None if self.prices is None else Prices(*self.prices)


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(ApiSettings):
    """Settings for judges, including local models and functions."""

    judge_max_tokens: int = setting(1024, "Maximum reply length of the judge api, in tokens.", least=1)
    dtype: str | None = setting(None, "Dtype of model weights (default: bfloat16 on an accelerator, float32 on a CPU).")
    trust_remote_code: bool = setting(False, "Allow running a judge's function and code that comes with models.")
    allow_pickle: bool = setting(False, "Allow loading pickled weights if a judge model has no safetensors.")

    def options(self) -> JudgeOptions:
        """Return the options for creating judges; raises :class:`SimpoError` as :meth:`client` does."""
        return JudgeOptions(
            self.client(),
            self.judge_prompt,
            self.judge_max_tokens,
            self.dtype,
            self.trust_remote_code,
            self.allow_pickle,
            self.strip_thinking,
        )


@dataclass
class GenerationArguments:
    """Settings for answering held-out prompts at every evaluation and judging the answers."""

    eval_generations: int = setting(0, "Number of held-out prompts to answer at every evaluation; 0 is off.", least=0)
    eval_judge: str | None = setting(None, f"Judge that compares these answers with the initial model's: {ANNOTATORS}.")
    eval_judge_url: str | None = setting(None, "URL of the server for eval_judge api; the key is in OPENAI_API_KEY.")
    eval_judge_model: str | None = setting(None, "Name of that judge model on the server.")
    yes: bool = setting(False, "Send the requests of eval_judge api without asking.")

    def __post_init__(self) -> None:
        server = (self.eval_judge_url, self.eval_judge_model)
        check_values(self)
        if self.eval_judge is not None and not self.eval_generations:
            raise SimpoError("eval_judge: has nothing to judge; set eval_generations")
        if self.eval_judge == "api" and None in server:
            raise SimpoError("eval_judge: api needs eval_judge_url and eval_judge_model")
        if self.eval_judge != "api" and server != (None, None):
            raise SimpoError("eval_judge_url and eval_judge_model: are used by eval_judge api only; remove them")
        if self.yes and self.eval_judge != "api":
            raise SimpoError("yes: only eval_judge api has a cost to confirm; remove it")


@dataclass(frozen=True, kw_only=True)
class AnnotatorSettings:
    """Settings for the annotator that scores a model's answers for training, and for the server behind ``api``."""

    annotator: Annotator = required(
        f"Annotator that scores the answers: {ANNOTATORS}; or several with weights: {{NAME: WEIGHT, ...}}."
    )
    annotator_normalization: Normalization | None = setting(
        None, "How several annotators' scores are normalized within a prompt (default: zscore)."
    )
    judge_url: str | None = setting(None, "URL of the server for the annotator or judge 'api'.")
    judge_model: str | None = setting(None, "Name of its model on that server.")
    judge_key_env: str = setting("OPENAI_API_KEY", "Environment variable that holds its API key.")

    def __post_init__(self) -> None:
        check_values(self)
        server = (self.judge_url, self.judge_model)
        if "api" in self.annotators_and_judges:
            if None in server:
                raise SimpoError("judge_url and judge_model: the annotator or judge 'api' needs both")
        elif server != (None, None):
            raise SimpoError("judge_url and judge_model: are used by the annotator or judge 'api' only; remove them")

    @property
    def annotators(self) -> list[str]:
        """Names of the annotators."""
        return annotator_names(self.annotator, self.annotator_normalization)

    @property
    def annotators_and_judges(self) -> list[str]:
        """Names of everything that may use the server."""
        return self.annotators

    def client(self) -> ChatClient | None:
        """Create the client, or return None if no server is configured."""
        return server_client(self.judge_url, self.judge_model, self.judge_key_env)


@dataclass(frozen=True, kw_only=True)
class AnnotatorArguments(AnnotatorSettings):
    """Settings for the annotators of ``simpo online``."""

    gold_annotator: str | None = setting(
        None, f"Annotator that is only monitored, not trained on, to reveal overoptimization: {SCORERS}."
    )
    annotator_yes: bool = setting(False, "Send the annotator's requests without asking.")

    def __post_init__(self) -> None:
        if self.gold_annotator in self.annotators:
            raise SimpoError(f"gold_annotator: {self.gold_annotator} is already trained on; use another annotator")
        if self.gold_annotator == "api":
            raise SimpoError(
                "gold_annotator: api compares a prompt's answers with one another, so its mean score is one half for "
                "every policy; use an annotator that scores single answers"
            )
        super().__post_init__()
