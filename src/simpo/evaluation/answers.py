"""A model's answers to a benchmark's questions, a judge's replies, and how results are shown."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from simpo.client import ChatClient, ChatReply, ChatRequest, Prices, confirm_cost, stand_in
from simpo.client.chat_client import TRIED
from simpo.data.prompts import Prompts
from simpo.data.settings import RenderSettings
from simpo.data.sources import SUFFIXES
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME, EngineName, Job, PromptArguments, sample_responses
from simpo.generation.settings import SamplingSettings
from simpo.models.identity import model_digest
from simpo.models.loading import Checkpoint, free_memory, load_tokenizer, with_dtype
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import write_text
from simpo.runs.folder import RunRecord
from simpo.runs.lines import read_lines
from simpo.runs.log import Log
from simpo.runs.results import Metric, fingerprint, read_results

# A text, or messages.
Question = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answerer:
    """A model and how it answers.

    Attributes:
        model: which.
        settings: how answers are drawn; one to every question.
        chat_template: template, file with one, or ``none``; None for the model's own.
        engine: what generates.
        rendering: how conversations are rendered.
    """

    model: ModelArguments
    settings: SamplingSettings
    chat_template: str | None = None
    engine: EngineName = "transformers"
    rendering: RenderSettings = field(default_factory=RenderSettings)

    @property
    def name(self) -> str:
        """What results call the model: the last part of its name."""
        return Path(self.model.model_name_or_path).name

    def identity(self) -> dict[str, Any]:
        """What determines the answers: weights, template, settings."""
        tokenizer = load_tokenizer(self.model.model_name_or_path, self.model, chat_template=self.chat_template)
        return {
            "model": model_digest(self.model),
            "dtype": with_dtype(self.model).dtype,
            "engine": self.engine,
            "chat_template": fingerprint(tokenizer.chat_template),
            **({} if self.rendering == RenderSettings() else {"rendering": str(self.rendering)}),
            **dataclasses.asdict(self.settings),
            "max_new_tokens": self.longest,
        }

    @property
    def longest(self) -> int:
        """Tokens that an answer may have.

        Raises:
            SimpoError: there is no such model, or its context leaves no room for a prompt.
        """
        resolved = self.settings.resolved(context=Checkpoint.read(self.model).context, chunk_size=1)
        assert resolved.max_new_tokens is not None
        return resolved.max_new_tokens

    def stand_in(self, name: str = "") -> str:
        """A text as long as an answer may be, to estimate what judging will cost; with another name another one."""
        return stand_in(self.longest, name)

    def fitting(self, source: PromptArguments) -> Prompts:
        """The prompts that will be answered: those that fit the model's context together with the longest answer.

        Raises:
            SimpoError: they cannot be read, or there is no room for any.
        """
        return Job.prepare(self.model, source, self.settings, self.engine, lambda line: None).prompts

    def answer(self, questions: Sequence[Question], folder: Path, *, temperature: float | None = None) -> list[str]:
        """One answer to every question, in their order.

        Args:
            questions: one that occurs twice is answered once.
            folder: of the sampling run, which goes on where it was.
            temperature: instead of the settings' own.

        Raises:
            SimpoError: as ``simpo sample``, or a question does not fit the model's context, which shows before anything
                is sampled.
        """
        prompts = folder.with_name(f"{folder.name}-questions.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        write_text(prompts, "".join(json.dumps({"prompt": question}) + "\n" for question in questions))
        settings = self.settings
        if temperature is not None:
            settings = dataclasses.replace(settings, temperature=temperature)
        asked = PromptArguments(str(prompts), chat_template=self.chat_template, rendering=self.rendering)
        self._check_all_fit(questions, asked)
        sample_responses(self.model, asked, settings, folder, engine=self.engine)
        free_memory()
        found = {_key(record["prompt"]): record["responses"][0] for record in read_lines(folder / FILE_NAME)}
        return [found[_key(question)] for question in questions]

    def _check_all_fit(self, questions: Sequence[Question], source: PromptArguments) -> None:
        fitting = {_key(prompt.content) for prompt in self.fitting(source)}
        missing = [question for question in questions if _key(question) not in fitting]
        if missing:
            raise SimpoError(
                f"{self.model.model_name_or_path}: its context has no room for {len(missing)} of {len(questions)} "
                f"questions and an answer of {self.longest:,} tokens; set a smaller max_new_tokens; the first is "
                f"{str(missing[0])!r:.80}"
            )


def _key(question: object) -> str:
    return json.dumps(question, sort_keys=True)


def is_outputs_file(name: str) -> bool:
    """Whether a command was given a file of answers and not a model."""
    return name.endswith(SUFFIXES)


# ---- A judge behind an API: asked after the user has agreed to what it will cost.

Check = Callable[[Sequence[ChatReply]], None]


@dataclass
class ApiJudge:
    """A model that judges.

    Attributes:
        client: sends what it is asked.
        prices: of its tokens, where they are known.
        yes: whether the user has agreed.
        strip_thinking: show it the answers without the thinking that they begin with.
        max_tokens: longest reply; None for the benchmark's own limit.
    """

    client: ChatClient
    prices: Prices | None = None
    yes: bool = False
    strip_thinking: bool = False
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """The model's name on its server."""
        return self.client.endpoint.model

    @property
    def identity(self) -> dict[str, Any]:
        """What of it determines the verdicts; what is off is left out, so that earlier runs can be continued."""
        given = {"strip_thinking": self.strip_thinking, "judge_max_tokens": self.max_tokens}
        return {"judge": self.name} | {key: value for key, value in given.items() if value}

    def metrics(self, benchmark: str) -> list[Metric]:
        """How many replies it gave at another temperature than the benchmark's, where it did."""
        usage = self.client.usage
        found = Metric(f"{benchmark}/judged_at_default_temperature", usage.default_temperature, n=usage.replies)
        return [found] if usage.default_temperature else []

    def agree_beforehand(self, requests: Sequence[ChatRequest | None], log: Log) -> None:
        """Let the user agree before answers are sampled, which may take long; :meth:`ask` then does not ask again.

        Args:
            requests: with answers as long as they may be; None where there will be nothing to ask.
            log: called with the line.

        Raises:
            SimpoError: the user does not agree, or cannot be asked.
        """
        wanted = self._limited([request for request in requests if request is not None])
        confirm_cost(
            self.client.estimate(wanted),
            yes=self.yes,
            log=lambda line: log(f"the judge, with answers as long as they may be: {line}"),
            prices=self.prices,
        )
        self.yes = True

    def ask(self, requests: Sequence[ChatRequest], log: Log, check_first: Check | None = None) -> list[ChatReply]:
        """The replies in the order of the requests, and what they took.

        Args:
            requests: what is asked.
            log: called with lines of progress.
            check_first: gets the first few replies before more is sent, and raises if they will not do.

        Raises:
            SimpoError: the user does not agree, a request finally failed, the first ones were all refused, or as
                ``check_first``.
        """
        requests = self._limited(requests)
        confirm_cost(self.client.estimate(requests), yes=self.yes, log=log, prices=self.prices)
        few = 0 if check_first is None else max(TRIED, self.client.endpoint.concurrency)
        replies = self.client.complete(requests[:few], despite_refusals=True)
        if check_first is not None and replies:
            check_first(replies)
        replies += self.client.complete(requests[few:], despite_refusals=True, log=log)
        log(self.client.usage.line(self.prices))
        return replies

    def _limited(self, requests: Sequence[ChatRequest]) -> list[ChatRequest]:
        """The requests with the longest reply that the user allows."""
        if self.max_tokens is None:
            return list(requests)
        return [replace(request, max_tokens=self.max_tokens) for request in requests]

    def ask_some(
        self, requests: Sequence[ChatRequest | None], log: Log, check_first: Check | None = None
    ) -> list[ChatReply | None]:
        """As :meth:`ask`; where there is nothing to ask the reply is None."""
        replies = iter(self.ask([request for request in requests if request is not None], log, check_first))
        return [None if request is None else next(replies) for request in requests]


# ---- What others measured: the paper's models on the same benchmarks, to compare one's own metrics with.


SOURCE = "princeton-nlp/SimPO, README.md: judge gpt-4-1106-preview; GSM8K and MMLU by ZeroEval"


# Methods that are shown on a terminal; an export has all.
_SHOWN = ("SFT", "DPO", "SimPO")


# Columns by benchmark, and what they are called.
_COLUMNS = {
    "alpaca_eval": {"alpaca_eval_lc": "LC win rate", "alpaca_eval_wr": "win rate", "alpaca_eval_length": "length"},
    "arena_hard": {"arena_hard": "Arena-Hard v0.1"},
    "gsm8k": {"gsm8k": "GSM8K"},
    "academic": {"gsm8k": "GSM8K", "mmlu": "MMLU"},
}


def published_rows(benchmark: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the published figures of a benchmark; no rows where nothing is published."""
    columns = _COLUMNS.get(benchmark, {})
    text = (resources.files("simpo.evaluation") / "published.csv").read_text(encoding="utf-8")
    rows = [
        [row["setting"], row["method"], row["model"], *(row[column] for column in columns)]
        for row in csv.DictReader(text.splitlines())
        if any(row[column] for column in columns)
    ]
    return ["setting", "method", "model", *columns.values()], rows


def published_table(benchmark: str) -> Table | None:
    """The figures of the main methods for a terminal; None where there are none."""
    (setting, method, _, *columns), rows = published_rows(benchmark)
    if not rows:
        return None
    table = Table(setting, method, title="published", caption=Text(SOURCE), box=SIMPLE_HEAD)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        if row[1] in _SHOWN:
            table.add_row(*map(Text, (row[0], row[1], *row[3:])))
    return table


# ---- Figures of an evaluation, and what others published, as Markdown.


def write_markdown(results: Path, benchmark: str, model: str, path: Path) -> None:
    """Write the figures of a run, who judged, and the published figures to a Markdown file.

    Args:
        results: the run's ``results.json``, next to its ``run.json``.
        benchmark: its name on the command line.
        model: what the heading calls the model.
        path: the file to write.

    Raises:
        SimpoError: the results cannot be read, or the file cannot be written.
    """
    found = read_results(results)
    own = [_cells(metric) for metric in found.metrics]
    parts = [f"## {model} on {benchmark}", _table(["metric", "stage", "value", "interval", "n"], own)]
    identity = RunRecord.read(results.parent).identity
    if "judge" in identity:
        parts.append(f"Judge: {identity['judge']}")
    if "judge_prompt" in identity:
        parts.append(f"SHA-256 of the judge prompt: `{identity['judge_prompt']}`")
    headings, rows = published_rows(benchmark)
    if rows:
        parts += [f"Published ({SOURCE}):", _table(headings, rows)]
    write_text(path, "\n\n".join([*parts, f"Fingerprint of the run: `{found.fingerprint}`"]) + "\n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _cells(metric: Metric) -> list[str]:
    interval = ""
    if metric.low is not None and metric.high is not None:
        interval = f"{metric.low:.4g} to {metric.high:.4g} ({metric.method})"
    value = "-" if metric.value is None else f"{metric.value:.4g}"
    return [metric.name, metric.stage or "", value, interval, "" if metric.n is None else str(metric.n)]
