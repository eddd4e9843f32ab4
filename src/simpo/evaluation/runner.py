"""The common framework of all benchmarks: settings, sampling, API judges, and published results."""

from __future__ import annotations

import csv
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from rich.console import Console
from rich.table import Table

from simpo.client import ChatReply, ChatRequest, confirm_cost
from simpo.client.chat_client import PROBE_REQUESTS
from simpo.config import required, setting
from simpo.data.rows import Row
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answer, Answerer, Question, is_answer_file, read_answers, write_rows
from simpo.generation.sample import EngineName
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import ThinkingFilter
from simpo.judging.settings import ApiSettings
from simpo.models.settings import ModelArguments
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric, make_table, print_full_width, print_results
from simpo.runs.terminal import interruptible


class Entry(NamedTuple):
    """An entry in the table of benchmarks."""

    module: str  # in this package; imported on demand because it is slow to import
    settings: str  # name of its settings dataclass
    summary: str  # one line for `simpo evaluate --help`


BENCHMARKS = {
    "academic": Entry("academic", "AcademicSettings", "lm-eval before and after alignment; needs simpo[academic]."),
    "alpaca_eval": Entry("alpaca_eval", "AlpacaEvalSettings", "Length-controlled win rate against gpt4_1106_preview."),
    "arena_hard": Entry("arena_hard", "ArenaHardSettings", "Arena-Hard v0.1 and v2: two games per prompt."),
    "gsm8k": Entry("academic", "Gsm8kSettings", "A quick check of arithmetic before and after alignment."),
    "mt_bench": Entry("mt_bench", "MTBenchSettings", "Both turns of 80 conversations, rated from 1 to 10."),
    "rewardbench": Entry("rewardbench", "RewardBenchSettings", "RewardBench 2 for reward models: best of 4, and Ties."),
}


class Benchmark(Protocol):
    """A benchmark that is ready to run."""

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the results, as JSON values."""
        ...

    def measure(self, run: RunFolder) -> list[Metric]:
        """Run the benchmark in the run folder, resuming an unfinished run."""
        ...


def settings_type(name: str) -> type[BenchmarkSettings]:
    """Return the settings dataclass of a benchmark in :data:`BENCHMARKS`."""
    entry = BENCHMARKS[name]
    return getattr(importlib.import_module(f"simpo.evaluation.{entry.module}"), entry.settings)


def run_benchmark(name: str, settings: BenchmarkSettings, *, argv: Sequence[str] = ()) -> Path:
    """Run a benchmark and print its results; repeating the call resumes an interrupted run.

    ``name`` is one of :data:`BENCHMARKS`, and ``settings`` an instance of its :func:`settings_type`. Returns the path
    of ``results.json``.
    """
    results = evaluate(settings, argv=argv)
    print_results(results)
    table = published_table(name)
    if table is not None:
        print_full_width(Console(), table)
    print(f"results:  {results}")
    return results


def evaluate(settings: BenchmarkSettings, *, argv: Sequence[str] = ()) -> Path:
    """Run a benchmark as :func:`run_benchmark` does, but without printing its results."""
    with interruptible(), RunFolder(settings.output_dir.expanduser(), command="evaluate") as run:
        benchmark = settings.benchmark(run.log)
        run.begin(benchmark.identity(), argv=argv)
        return run.complete(lambda: benchmark.measure(run))


# ---- Settings.


@dataclass(kw_only=True)
class BenchmarkSettings(ABC):
    """The model and the run folder."""

    model: str = required("Hub name or folder of the model.", positional="MODEL")
    loading: ModelArguments = field(
        default_factory=lambda: ModelArguments(""),
        metadata={"only": ("model_revision", "dtype", "trust_remote_code", "allow_pickle")},
    )
    output_dir: Path = required("Run folder; reuse it to continue an interrupted run.")

    def model_arguments(self, model: str) -> ModelArguments:
        """Return the loading arguments for ``model``."""
        return replace(self.loading, model_name_or_path=model)

    @abstractmethod
    def benchmark(self, log: Log) -> Benchmark:
        """Read the benchmark's files and prepare it; ``log`` receives notes about them."""


@dataclass(kw_only=True)
class AnswerSettings(BenchmarkSettings):
    """Settings for sampling answers."""

    sampling: SamplingSettings = field(
        default=SamplingSettings(temperature=0.7, top_p=1.0), metadata={"without": ("n", "top_k")}
    )
    engine: EngineName = setting("transformers", "Engine that generates the answers.")
    chat_template: str | None = setting(None, "Chat template, a file with one, or none (default: the model's own).")
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def answerer(self, model: str) -> Answerer:
        """Return an answerer for ``model`` with these settings."""
        return Answerer(self.model_arguments(model), self.sampling, self.chat_template, self.engine, self.rendering)


@dataclass(kw_only=True)
class JudgedSettings(AnswerSettings):
    """Settings for benchmarks with an API judge; the model may also be a file of its answers."""

    model: str = required("Hub name or folder of the model, or a file with its answers.", positional="MODEL_OR_ANSWERS")
    api: ApiSettings = field(default=ApiSettings())

    def __post_init__(self) -> None:
        files = {"judge_prompt": self.api.judge_prompt, **vars(self)}
        for key, value in files.items():
            paths = value if isinstance(value, list) else [value]
            missing = [path for path in paths if isinstance(path, Path) and not path.expanduser().is_file()]
            if missing and key != "output_dir":
                raise SimpoError(f"{key}: {missing[0]}: there is no such file")
        if self.model and self.api.judge_url is None and self.api.judge_model is None:
            raise SimpoError("this benchmark needs a judge; set --judge_url and --judge_model")
        if self.answer_file is not None and not self.answer_file.is_file():
            raise SimpoError(f"model: {self.answer_file}: there is no such file of answers")

    @property
    def answer_file(self) -> Path | None:
        """The file of answers, if one was given instead of a model."""
        return Path(self.model).expanduser() if is_answer_file(self.model) else None


# ---- Benchmarks with an API judge.


class JudgedBenchmark(ABC):
    """A benchmark in which a model answers questions and a model behind an API judges the answers.

    Attributes:
        name: name of the benchmark and prefix of its metrics.
        key_name: column that identifies a question in the benchmark's files.
        answer_file: name of the file of answers in the run folder.
        compares: whether references are a baseline's answers, which are prepared for the judge like the model's.
        check_first: called with the first few replies before more are requested; raises an error if they are unusable.
    """

    name: ClassVar[str]
    key_name: ClassVar[str]
    answer_file: ClassVar[str]
    compares: ClassVar[bool] = True
    check_first: Callable[[Sequence[ChatReply]], None] | None = None

    def __init__(self, settings: JudgedSettings, questions: Sequence[Question], prompt_digest: str) -> None:
        """Read the answers if the settings give a file with them."""
        client = settings.api.client()
        assert client is not None
        client.endpoint.api_key()  # fail on a missing key now rather than after sampling
        self.settings, self.client, self.questions, self.prompt_digest = settings, client, questions, prompt_digest
        self.judge_name, self._confirmed = client.endpoint.model, settings.api.yes
        self.answerer = None if settings.answer_file else settings.answerer(settings.model)
        if settings.answer_file:
            locations = {question.key: question.where for question in questions}
            self._given = read_answers(settings.answer_file, self.key_name, self.parse_answer, locations)

    @classmethod
    @abstractmethod
    def parse_answer(cls, row: Row, where: str) -> tuple[Any, Answer]:
        """Parse a row of a file of answers into the question's key and the answer."""

    @classmethod
    @abstractmethod
    def answer_row(cls, question: Question, answer: Answer) -> Row:
        """Return the row for a file of answers."""

    @abstractmethod
    def requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Sequence[ChatRequest | None]:
        """Build the requests to the judge; None in place of a request that is not needed."""

    @abstractmethod
    def read_judgments(
        self, questions: Sequence[Question], answers: Sequence[Answer], replies: Sequence[Any], run: RunFolder
    ) -> list[Metric]:
        """Read the replies to :meth:`requests`, write the judgments to the run folder, and compute metrics."""

    @abstractmethod
    def extra_identity(self) -> dict[str, Any]:
        """Return what determines the verdicts on given answers, other than the judge and its prompt."""

    def sample(self, answerer: Answerer, folder: Path) -> list[tuple[str, ...]]:
        """Sample all turns of the answer to every question."""
        return [(text,) for text in answerer.answer([question.turns[0] for question in self.questions], folder)]

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the results; options that are off are omitted."""
        api, file = self.settings.api, self.settings.answer_file
        identity = {**self.extra_identity(), "judge": self.judge_name, "judge_prompt": self.prompt_digest}
        optional = {"strip_thinking": api.strip_thinking, "judge_max_tokens": api.judge_max_tokens}
        identity |= {key: value for key, value in optional.items() if value}
        if self.answerer is not None:
            return identity | self.answerer.identity()
        return identity | {"outputs": file_digest(str(file))}

    def measure(self, run: RunFolder) -> list[Metric]:
        """Sample answers if none were given, have them judged, and store everything in the run folder."""
        answers = self._given if self.answerer is None else self._sampled(self.answerer, run)
        rows = [self.answer_row(*pair) for pair in zip(self.questions, answers, strict=True)]
        write_rows(run.path / self.answer_file, rows)
        thinking_filter = ThinkingFilter(self.settings.api.strip_thinking)
        shown = [answer.for_judge(thinking_filter) for answer in answers]
        questions = self.questions
        if self.compares:
            questions = [replace(each, reference=each.baseline.for_judge(thinking_filter)) for each in questions]
        thinking = thinking_filter.metrics(f"{self.name}/", run.log)
        replies = self._ask(self.requests(questions, shown), run.log)
        metrics = self.read_judgments(questions, shown, replies, run) + thinking
        usage = self.client.usage
        if usage.default_temperature:
            name = f"{self.name}/judged_at_default_temperature"
            metrics.append(Metric(name, usage.default_temperature, n=usage.replies))
        return metrics

    def _sampled(self, answerer: Answerer, run: RunFolder) -> list[Answer]:
        """Sample answers, after confirming the cost of judging them because sampling can take long."""
        if not (run.path / self.answer_file).exists():
            text = answerer.placeholder_answer()
            expected = [Answer(answerer.name, (text,) * len(question.turns)) for question in self.questions]
            to_send = self._to_send(self.requests(self.questions, expected))
            self._confirm(to_send, lambda line: run.log(f"the judge, if answers have maximum length: {line}"))
        return [Answer(answerer.name, turns) for turns in self.sample(answerer, run.path / "answers")]

    def _ask(self, requests: Sequence[ChatRequest | None], log: Log) -> list[ChatReply | None]:
        """Send the requests and return the replies in the same order; None where there is no request."""
        to_send = self._to_send(requests)
        self._confirm(to_send, log)
        probes = 0 if self.check_first is None else max(PROBE_REQUESTS, self.client.endpoint.concurrency)
        received = self.client.complete(to_send[:probes], despite_refusals=True)
        if self.check_first is not None and received:
            self.check_first(received)
        received += self.client.complete(to_send[probes:], despite_refusals=True, log=log)
        log(self.client.usage.line(self.settings.api.token_prices()))
        replies = iter(received)
        return [None if request is None else next(replies) for request in requests]

    def _confirm(self, to_send: Sequence[ChatRequest], log: Log) -> None:
        prices = self.settings.api.token_prices()
        confirm_cost(self.client.estimate(to_send), yes=self._confirmed, log=log, prices=prices)
        self._confirmed = True

    def _to_send(self, requests: Sequence[ChatRequest | None]) -> list[ChatRequest]:
        longest = self.settings.api.judge_max_tokens
        wanted = [request for request in requests if request is not None]
        return wanted if longest is None else [replace(request, max_tokens=longest) for request in wanted]


# ---- Published results.

_README = "princeton-nlp/SimPO, README.md: judge gpt-4-1106-preview; GSM8K and MMLU by ZeroEval"
# Empty cells were illegible in our copy of the paper's tables. For RRHF, SLiC-HF, R-DPO, KTO and CPO, the paper and its
# repository report different AlpacaEval and Arena-Hard results; we show the repository's.
_PAPER = "arXiv 2405.14734, tables 4 and 5: scores from 1 to 10"
_SOURCES = {"mt_bench": _PAPER, "alpaca_eval": f"{_README}; ablations: arXiv 2405.14734, table 5"}
_SOURCES["arena_hard"] = _SOURCES["alpaca_eval"]
_SOURCES["rewardbench"] = "model cards of the allenai/*-RM-RB2 models, revision main"
_SHOWN = ("SFT", "DPO", "SimPO", "reward model")  # methods to print; published.csv has more
_REWARDBENCH = ("score", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
# Benchmark -> columns of published.csv and their headings.
_COLUMNS = {
    "alpaca_eval": {"alpaca_eval_lc": "LC win rate", "alpaca_eval_wr": "win rate", "alpaca_eval_length": "length"},
    "arena_hard": {"arena_hard": "Arena-Hard v0.1"},
    "gsm8k": {"gsm8k": "GSM8K"},
    "mt_bench": {"mt_bench_gpt4_turbo": "judge GPT-4 Turbo", "mt_bench_gpt4": "judge GPT-4"},
    "academic": {"gsm8k": "GSM8K", "mmlu": "MMLU"},
    "rewardbench": {f"rewardbench_{name.lower().replace(' ', '_')}": name for name in _REWARDBENCH},
}


def published_rows(benchmark: str) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a benchmark's published results; no rows if nothing is published."""
    columns = _COLUMNS.get(benchmark, {})
    text = (resources.files("simpo.evaluation") / "published.csv").read_text(encoding="utf-8")
    rows = [
        [row["setting"], row["method"], row["model"], *(row[column] for column in columns)]
        for row in csv.DictReader(text.splitlines())
        if any(row[column] for column in columns)
    ]
    return ["setting", "method", "model", *columns.values()], rows


def published_table(benchmark: str) -> Table | None:
    """Format the published results of the main methods as a table; None if there are none."""
    headings, rows = published_rows(benchmark)
    if not rows:
        return None
    shown = [row[:2] + row[3:] for row in rows if row[1] in _SHOWN]  # without the models' names
    caption = _SOURCES.get(benchmark, _README)
    return make_table(headings[:2] + headings[3:], shown, names=2, title="published", caption=caption)
