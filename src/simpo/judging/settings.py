"""Settings of judges: the server of an API judge, what it may cost, and how judging models are loaded."""

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
    """The name of the annotator, or of each one that is combined."""
    if isinstance(annotator, str):
        if normalization is not None:
            raise SimpoError("annotator_normalization: only for several annotators, {NAME: WEIGHT, ...}; leave it out")
        return [annotator]
    if not annotator:
        raise SimpoError("annotator: there is none; write a name, or {NAME: WEIGHT, ...}")
    for name, weight in annotator.items():
        if not 0 < weight < math.inf:
            raise SimpoError(f"annotator: the weight of {name} must be above 0 and finite, not {weight:g}")
    return list(annotator)


@dataclass(frozen=True)
class JudgeOptions:
    """The settings of judges other than their names."""

    client: ChatClient | None = None  # sends the requests of the judge `api`; None if no server was named
    prompt: Path | None = None  # file with its judge prompt; None for the one in the package
    max_tokens: int = 1024  # longest reply of `api`
    dtype: str | None = None  # type of a judging model's weights; None chooses by the device
    trust_remote_code: bool = False  # run code: a function, or code that comes with a model
    allow_pickle: bool = False  # read a judging model's weights from pickles where it has no safetensors
    strip_thinking: bool = False  # show judges the answers without the thinking that they begin with
    log: Callable[[str], None] = print  # receives lines of progress

    @classmethod
    def during_training(
        cls, model: ModelArguments, client: ChatClient | None, log: Callable[[str], None] = print
    ) -> JudgeOptions:
        """Options for judges used in training ``model``: what its recipe allows applies to their models, too."""
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
    """The client of a judge's server; None if no server is named, and an error if it cannot be used."""
    if url is None or model is None:
        return None
    return ChatClient(Endpoint(url, model, key_env, concurrency, timeout), cache or default_cache())


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The judge ``api``: a model behind an OpenAI-compatible server."""

    judge_url: str | None = setting(None, "Server of the judge, e.g. https://api.openai.com/v1.")
    judge_model: str | None = setting(None, "The judge's name on that server.")
    judge_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable that holds the key; a server on this machine needs none."
    )
    judge_concurrency: int = setting(8, "Requests at a time.")
    judge_timeout: float = setting(60.0, "Seconds that a reply may take.")
    judge_max_tokens: int | None = setting(
        None, "Longest reply in tokens (default: the benchmark's); a judge that thinks needs more.", least=1
    )
    judge_prompt: Path | None = setting(None, "File with a judge prompt (default: the one in this package).")
    cache: Path | None = setting(
        None, "Folder of replies, which are not requested again (default: ~/.cache/simpo/replies)."
    )
    prices: tuple[float, float] | None = setting(
        None, "Dollars per million tokens read and written, to estimate what the judge costs."
    )
    yes: bool = setting(False, "Send the requests without asking.")
    strip_thinking: bool = setting(False, "Show judges the answers without the thinking that they begin with.")

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise SimpoError("judge_url and judge_model: name both or none")
        check_values(self)

    def client(self) -> ChatClient | None:
        """The client of the server, None if no server is named; raises :class:`SimpoError` if it cannot be used."""
        connection = (self.judge_key_env, self.judge_concurrency, self.judge_timeout)
        return server_client(self.judge_url, self.judge_model, *connection, cache=self.cache)

    def token_prices(self) -> Prices | None:
        """The prices of the judge's tokens, if they are known; raises :class:`SimpoError` for a negative one."""
        return None if self.prices is None else Prices(*self.prices)


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(ApiSettings):
    """Judges that are models on this machine, or functions."""

    judge_max_tokens: int = setting(1024, "Longest reply of the judge api, in tokens.", least=1)
    dtype: str | None = setting(None, "Type of weights (default: bfloat16 on an accelerator, float32 on a CPU).")
    trust_remote_code: bool = setting(False, "Run a judge's function, and code that comes with models.")
    allow_pickle: bool = setting(False, "Read judging models' weights from pickles where they have no safetensors.")

    def options(self) -> JudgeOptions:
        """The judges' options; raises :class:`SimpoError` as :meth:`client`."""
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
    """Answers to held-out prompts at every evaluation, and the judge that compares them with the start model's."""

    eval_generations: int = setting(0, "Held-out prompts that are answered at every evaluation; 0 is off.", least=0)
    eval_judge: str | None = setting(None, f"Judge of those answers against the start model's: {ANNOTATORS}.")
    eval_judge_url: str | None = setting(None, "Server of eval_judge api; its key is in OPENAI_API_KEY.")
    eval_judge_model: str | None = setting(None, "That judge's name on the server.")
    yes: bool = setting(False, "Send requests of eval_judge api without asking.")

    def __post_init__(self) -> None:
        server = (self.eval_judge_url, self.eval_judge_model)
        check_values(self)
        if self.eval_judge is not None and not self.eval_generations:
            raise SimpoError("eval_judge: there is nothing to judge; set eval_generations")
        if self.eval_judge == "api" and None in server:
            raise SimpoError("eval_judge: api needs eval_judge_url and eval_judge_model")
        if self.eval_judge != "api" and server != (None, None):
            raise SimpoError("eval_judge_url and eval_judge_model: only eval_judge api uses them")
        if self.yes and self.eval_judge != "api":
            raise SimpoError("yes: only eval_judge api has a cost to confirm; leave it out")


@dataclass(frozen=True, kw_only=True)
class AnnotatorSettings:
    """The annotator of the answers that a model is trained on, and the server of an annotator or judge ``api``."""

    annotator: Annotator = required(
        f"What scores the answers: {ANNOTATORS}; or several with weights: {{NAME: WEIGHT, ...}}."
    )
    annotator_normalization: Normalization | None = setting(
        None, "How the scores of several annotators are normalized among a prompt's answers (default: zscore)."
    )
    judge_url: str | None = setting(None, "Server of the annotator or judge 'api'.")
    judge_model: str | None = setting(None, "Its model's name on that server.")
    judge_key_env: str = setting("OPENAI_API_KEY", "Environment variable with its key.")

    def __post_init__(self) -> None:
        check_values(self)
        server = (self.judge_url, self.judge_model)
        if "api" in self.annotators_and_judges:
            if None in server:
                raise SimpoError("judge_url and judge_model: the annotator or judge 'api' needs both")
        elif server != (None, None):
            raise SimpoError("judge_url and judge_model: only the annotator or judge 'api' uses them; leave them out")

    @property
    def annotators(self) -> list[str]:
        """The name of the annotator, or of each one that is combined."""
        return annotator_names(self.annotator, self.annotator_normalization)

    @property
    def annotators_and_judges(self) -> list[str]:
        """The names of all that may use the server."""
        return self.annotators

    def client(self) -> ChatClient | None:
        """The client of the server, None if no server is named."""
        return server_client(self.judge_url, self.judge_model, self.judge_key_env)


@dataclass(frozen=True, kw_only=True)
class AnnotatorArguments(AnnotatorSettings):
    """The annotators of ``simpo online``."""

    gold_annotator: str | None = setting(
        None, f"What scores the same answers without being trained on, to show overoptimization: {SCORERS}."
    )
    annotator_yes: bool = setting(False, "Send the annotator's requests without asking.")

    def __post_init__(self) -> None:
        if self.gold_annotator in self.annotators:
            raise SimpoError(f"gold_annotator: {self.gold_annotator} is trained on; name another annotator")
        if self.gold_annotator == "api":
            raise SimpoError(
                "gold_annotator: api compares a prompt's answers with one another, so that its mean score is one half "
                "under every policy; name an annotator that scores single answers"
            )
        super().__post_init__()
