"""What all benchmarks share: settings, the run, sampled answers, and a judge behind an API."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from rich.console import Console

from simpo.client import ChatClient, ChatReply, ChatRequest, Endpoint, Prices, confirm_cost
from simpo.client.cache import default_cache
from simpo.client.chat_client import TRIED
from simpo.data.rows import Row
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answer, Answerer, Question, is_answer_file, read_answers, write_rows
from simpo.evaluation.published import published_table, write_markdown
from simpo.generation.sample import EngineName
from simpo.generation.settings import SamplingSettings
from simpo.judging.presentation import ShownAnswers
from simpo.models.settings import ModelArguments
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric, print_results, print_whole
from simpo.runs.signals import stoppable


class Entry(NamedTuple):
    """A benchmark in the list of benchmarks.

    Attributes:
        module: of this package; it is imported on demand, because it is slow to import.
        settings: the name of its settings dataclass there.
        summary: one line for ``simpo evaluate --help``.
    """

    module: str
    settings: str
    summary: str


BENCHMARKS = {
    "academic": Entry(
        "academic",
        "AcademicSettings",
        "Academic benchmarks by lm-eval (pip install 'simpo[academic]'), before and after alignment.",
    ),
    "alpaca_eval": Entry(
        "alpaca_eval",
        "AlpacaEvalSettings",
        "AlpacaEval 2: MODEL or model_outputs.json against gpt4_1106_preview, raw and length-controlled.",
    ),
    "arena_hard": Entry(
        "arena_hard",
        "ArenaHardSettings",
        "Arena-Hard v0.1 and v2: MODEL or its answers in two games per prompt against the baseline.",
    ),
    "gsm8k": Entry(
        "academic",
        "Gsm8kSettings",
        "GSM8K by exact match: a quick check of arithmetic before and after alignment.",
    ),
    "mt_bench": Entry(
        "mt_bench",
        "MTBenchSettings",
        "MT-Bench: both turns of MODEL or of a file of its answers rated from 1 to 10.",
    ),
}


class Benchmark(Protocol):
    """A benchmark whose files have been read."""

    def identity(self) -> dict[str, Any]:
        """What determines the results, as JSON values."""
        ...

    def measure(self, run: RunFolder) -> list[Metric]:
        """Do the work in the folder of the run, continuing what is there."""
        ...


def settings_type(name: str) -> type[RunSettings]:
    """The settings dataclass of a benchmark in :data:`BENCHMARKS`."""
    entry = BENCHMARKS[name]
    return getattr(importlib.import_module(f"simpo.evaluation.{entry.module}"), entry.settings)


def run_benchmark(name: str, settings: RunSettings, *, argv: Sequence[str] = ()) -> Path:
    """Run a benchmark and print its results; a run that was stopped is continued by the same call.

    Args:
        name: one of :data:`BENCHMARKS`.
        settings: an instance of its :func:`settings_type`.
        argv: the command line after the name of the command, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: a setting or a file cannot be used, or a request failed for good.
    """
    results = evaluate(settings, argv=argv)
    print_results(results)
    table = published_table(name)
    if table is not None:
        print_whole(Console(), table)
    if settings.markdown is not None:
        path = Path(settings.markdown).expanduser()
        write_markdown(results, name, settings.model or "existing annotations", path)
        print(f"markdown: {path}")
    print(f"results:  {results}")
    return results


def evaluate(settings: RunSettings, *, argv: Sequence[str] = ()) -> Path:
    """As :func:`run_benchmark`, without printing the results."""
    folder = Path(settings.output_dir).expanduser()
    with stoppable(), RunFolder(folder, command="evaluate") as run:
        benchmark = settings.benchmark(run.log)
        run.begin(benchmark.identity(), argv=argv)
        return run.complete(lambda: benchmark.measure(run))


# ---- Settings.


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass."""
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_file(key: str, path: str | None) -> None:
    """Raise :class:`SimpoError` if a setting names a file that does not exist."""
    if path is not None and not Path(path).expanduser().is_file():
        raise SimpoError(f"{key}: {path}: there is no such file")


@dataclass(kw_only=True)
class RunSettings(ABC):
    """What every benchmark takes."""

    model: str | None = field(metadata={"help": "Hub name or folder of the model.", "positional": "MODEL"})
    output_dir: str = field(metadata={"help": "Folder of the run; the same one continues it."})
    markdown: str | None = setting(None, "Also write the results, and published ones, to this Markdown file.")
    dtype: str | None = setting(None, "Type of the weights (default: bfloat16 on an accelerator, float32 on a CPU).")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")

    @abstractmethod
    def benchmark(self, log: Log) -> Benchmark:
        """Read the files of the benchmark; ``log`` takes notes about them."""


@dataclass(kw_only=True)
class AnswerSettings(RunSettings):
    """How a model answers; without effect where its answers are read from a file."""

    temperature: float | None = setting(0.7, "Divides the logits; 0 is greedy.")
    top_p: float = setting(1.0, "Draw from the smallest set of tokens with this probability; 1 is off.")
    max_new_tokens: int | None = setting(
        None, "Longest answer in tokens (default: 2048, or half the model's context if that is less)."
    )
    seed: int = setting(42, "Seed of sampling.")
    chunk_size: int | None = setting(None, "Answers generated and stored together (default: by the device).")
    engine: EngineName = setting("transformers", "What generates: transformers or vllm.")
    chat_template: str | None = setting(None, "Chat template, a file with one, or none (default: the model's own).")
    chat_template_kwargs: dict[str, Any] = setting({}, 'Variables for the chat template, {"enable_thinking": false}.')
    system_message: Literal["template", "fold"] = setting(
        "template", "fold writes system messages into the first user message, for templates without a system role."
    )
    model_revision: str = setting("main", "Branch, tag or commit of the model on the hub.")

    def __post_init__(self) -> None:
        self._sampling()  # a value out of bounds is an error here, where the parser of settings can say where it is

    def answerer(self, model: str) -> Answerer:
        """A model that answers as the settings say."""
        arguments = ModelArguments(
            model,
            model_revision=self.model_revision,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        rendering = RenderSettings(self.chat_template_kwargs, self.system_message)
        return Answerer(arguments, self._sampling(), self.chat_template, self.engine, rendering)

    def _sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=0.7 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            chunk_size=self.chunk_size,
        )


@dataclass(kw_only=True)
class JudgedSettings(AnswerSettings):
    """The judge of a benchmark: a model behind an OpenAI-compatible server."""

    model: str | None = field(
        metadata={
            "help": "Hub name or folder of the model, or a file of its answers.",
            "positional": "MODEL_OR_ANSWERS",
        }
    )
    judge_url: str | None = setting(None, "Server of the judge, e.g. https://api.openai.com/v1.")
    judge_model: str | None = setting(None, "Name of the judge on that server.")
    judge_key_env: str = setting(
        "OPENAI_API_KEY", "Environment variable with the key; a server on this machine needs none."
    )
    judge_concurrency: int = setting(8, "Requests at a time.")
    judge_timeout: float = setting(60.0, "Seconds that a reply may take.")
    judge_max_tokens: int | None = setting(
        None, "Longest reply in tokens (default: the benchmark's; a judge that thinks needs more)."
    )
    judge_prompt: str | None = setting(None, "File with the judge prompt, e.g. the benchmark's own (default: ours).")
    cache: str | None = setting(None, f"Folder of replies that are not requested again (default: {default_cache()}).")
    prices: list[float] | None = setting(None, "Dollars per million tokens read and written, to show the cost.")
    yes: bool = setting(False, "Send the requests without asking.")
    strip_thinking: bool = setting(False, "Show the judge the answers without the thinking that they begin with.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("judge_prompt", self.judge_prompt)
        if self.judge_max_tokens is not None and self.judge_max_tokens < 1:
            raise SimpoError(f"judge_max_tokens: must be at least 1, not {self.judge_max_tokens}")
        if self.prices is not None and len(self.prices) != 2:
            raise SimpoError(f"prices: expected two, of tokens read and written, not {len(self.prices)}")
        if (self.judge_url is None) != (self.judge_model is None):
            raise SimpoError("judge_url and judge_model: name both or none")
        if self.model is not None and is_answer_file(self.model) and not Path(self.model).expanduser().is_file():
            raise SimpoError(f"model: {self.model}: there is no such file of answers")

    def judge(self) -> ApiJudge:
        """The judge; raises :class:`SimpoError` if none is named or its key is missing."""
        if self.judge_url is None or self.judge_model is None:
            raise SimpoError("this benchmark needs a judge: name it with --judge_url and --judge_model")
        endpoint = Endpoint(
            self.judge_url, self.judge_model, self.judge_key_env, self.judge_concurrency, self.judge_timeout
        )
        endpoint.api_key()  # a missing key is an error now and not after the answers have been sampled
        client = ChatClient(endpoint, default_cache() if self.cache is None else Path(self.cache).expanduser())
        prices = None if self.prices is None else Prices(*self.prices)
        return ApiJudge(client, prices, self.yes, self.judge_max_tokens)


# ---- Benchmarks with a judge behind an API.


@dataclass
class ApiJudge:
    """A model that judges; it is asked after the user has confirmed the cost.

    Attributes:
        client: sends the requests.
        prices: of its tokens, where they are known.
        yes: whether the user has confirmed the cost.
        max_tokens: longest reply; None for the benchmark's own limit.
    """

    client: ChatClient
    prices: Prices | None = None
    yes: bool = False
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self.client.endpoint.model

    def confirm_beforehand(self, requests: Sequence[ChatRequest | None], log: Log) -> None:
        """Ask the user to confirm the cost before answers are sampled, which may take long.

        Args:
            requests: about answers as long as they may be; None where there will be nothing to ask.
            log: called with the estimate.

        Raises:
            SimpoError: the user declines, or cannot be asked.
        """
        estimate = self.client.estimate(self._to_send(requests))
        confirm_cost(
            estimate,
            yes=self.yes,
            log=lambda line: log(f"the judge, with answers as long as they may be: {line}"),
            prices=self.prices,
        )
        self.yes = True

    def ask(
        self,
        requests: Sequence[ChatRequest | None],
        log: Log,
        check_first: Callable[[Sequence[ChatReply]], None] | None = None,
    ) -> list[ChatReply | None]:
        """The replies in the order of the requests; None where there is nothing to ask.

        Args:
            requests: what to ask.
            log: called with the estimate, the progress and the usage.
            check_first: gets the first few replies before more is sent, and raises if they cannot be used.

        Raises:
            SimpoError: the user declines, a request failed for good, the first ones were all refused, or as
                ``check_first``.
        """
        to_send = self._to_send(requests)
        confirm_cost(self.client.estimate(to_send), yes=self.yes, log=log, prices=self.prices)
        few = 0 if check_first is None else max(TRIED, self.client.endpoint.concurrency)
        received = self.client.complete(to_send[:few], despite_refusals=True)
        if check_first is not None and received:
            check_first(received)
        received += self.client.complete(to_send[few:], despite_refusals=True, log=log)
        log(self.client.usage.line(self.prices))
        replies = iter(received)
        return [None if request is None else next(replies) for request in requests]

    def _to_send(self, requests: Sequence[ChatRequest | None]) -> list[ChatRequest]:
        wanted = [request for request in requests if request is not None]
        if self.max_tokens is None:
            return wanted
        return [replace(request, max_tokens=self.max_tokens) for request in wanted]


class JudgedBenchmark(ABC):
    """A benchmark whose questions a model answers and whose judge is a model behind an API.

    Attributes:
        name: of the benchmark, with which the names of its metrics begin.
        key_name: what its files call the key of a question.
        answer_file: the file of answers in the run folder.
        compares: whether references are answers of a baseline, which are shown to the judge like the model's.
        settings: what the user chose.
        questions: with what answers are compared with.
        judge: who judges.
        prompt_digest: SHA-256 of the file with the judge prompt.
    """

    name: ClassVar[str]
    key_name: ClassVar[str]
    answer_file: ClassVar[str]
    compares: ClassVar[bool] = True

    def __init__(
        self, settings: JudgedSettings, judge: ApiJudge, questions: Sequence[Question], prompt_digest: str
    ) -> None:
        """Read the answers, if the settings name a file of them.

        Raises:
            SimpoError: the file does not hold one answer to each of the questions and no other.
        """
        assert settings.model is not None
        self.settings, self.judge, self.questions, self.prompt_digest = settings, judge, questions, prompt_digest
        self.answerer: Answerer | None = None
        if is_answer_file(settings.model):
            places = {question.key: question.where for question in questions}
            self._given = read_answers(Path(settings.model).expanduser(), self.key_name, self.parse_answer, places)
        else:
            self.answerer = settings.answerer(settings.model)

    @classmethod
    @abstractmethod
    def parse_answer(cls, row: Row, where: str) -> tuple[Any, Answer]:
        """The key of the question and the answer in a row of a file of answers."""

    @classmethod
    @abstractmethod
    def answer_row(cls, question: Question, answer: Answer) -> Row:
        """The row of a file of answers."""

    @abstractmethod
    def requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Sequence[ChatRequest | None]:
        """What the judge is asked; None where there is nothing to ask."""

    @abstractmethod
    def judge_answers(self, questions: Sequence[Question], answers: Sequence[Answer], run: RunFolder) -> list[Metric]:
        """Ask the judge, write the judgments to the folder of the run, and compute the metrics."""

    def own_identity(self) -> dict[str, Any]:
        """What determines the verdicts on given answers in addition to the judge and its prompt."""
        return {"benchmark": self.name}

    def sample(self, answerer: Answerer, folder: Path) -> list[tuple[str, ...]]:
        """Sample the turns of the answer to every question."""
        return [(text,) for text in answerer.answer([question.turns[0] for question in self.questions], folder)]

    def identity(self) -> dict[str, Any]:
        """What determines the results; options that are off are left out."""
        optional = {"strip_thinking": self.settings.strip_thinking, "judge_max_tokens": self.judge.max_tokens}
        if self.answerer is None:
            answers = {"outputs": file_digest(str(self.settings.model))}
        else:
            answers = self.answerer.identity()
        return {
            **self.own_identity(),
            "judge": self.judge.name,
            **{key: value for key, value in optional.items() if value},
            "judge_prompt": self.prompt_digest,
            **answers,
        }

    def measure(self, run: RunFolder) -> list[Metric]:
        """Sample answers if none were given, have them judged, and write everything down."""
        answers = self._given if self.answerer is None else self._sampled(self.answerer, run)
        rows = [self.answer_row(*pair) for pair in zip(self.questions, answers, strict=True)]
        write_rows(run.path / self.answer_file, rows)
        show = ShownAnswers(self.settings.strip_thinking)
        shown = [answer.shown(show) for answer in answers]
        questions = self.questions
        if self.compares:
            questions = [replace(question, reference=question.baseline.shown(show)) for question in questions]
        thinking = show.metrics(f"{self.name}/", run.log)
        metrics = self.judge_answers(questions, shown, run) + thinking
        usage = self.judge.client.usage
        if usage.default_temperature:
            name = f"{self.name}/judged_at_default_temperature"
            metrics.append(Metric(name, usage.default_temperature, n=usage.replies))
        return metrics

    def _sampled(self, answerer: Answerer, run: RunFolder) -> list[Answer]:
        if not (run.path / self.answer_file).exists():
            text = answerer.stand_in()
            expected = [Answer(answerer.name, (text,) * len(question.turns)) for question in self.questions]
            self.judge.confirm_beforehand(self.requests(self.questions, expected), run.log)
        return [Answer(answerer.name, turns) for turns in self.sample(answerer, run.path / "answers")]
