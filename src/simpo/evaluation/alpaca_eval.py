"""AlpacaEval 2: raw and length-controlled win rates against gpt4_1106_preview, by a weighted pairwise judge."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download

from simpo.client import ChatReply, ChatRequest
from simpo.config import setting
from simpo.data.rows import Row
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import Answer, Question, cell, read_by_key, read_rows, write_rows
from simpo.evaluation.preferences import Baselines, length_controlled, win_rates
from simpo.evaluation.runner import Benchmark, JudgedBenchmark, JudgedSettings
from simpo.generation.responses import after_thinking
from simpo.judging.protocol import fill, read_prompt_file
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric
from simpo.statistics import share_bounds

REPOSITORY = "tatsu-lab/alpaca_eval"


@dataclass(kw_only=True)
class AlpacaEvalSettings(JudgedSettings):
    """AlpacaEval 2 for a model, a file of its outputs, or existing annotations.

    examples:
      simpo evaluate alpaca_eval outputs/simpo --judge_url https://api.openai.com/v1 \\
          --judge_model gpt-4-1106-preview --output_dir outputs/alpaca_eval
      simpo evaluate alpaca_eval --annotations annotations.json --output_dir outputs/alpaca_eval
    """

    model: str = setting(
        "", "Hub name or folder of the model, or a file with its outputs.", positional="MODEL_OR_OUTPUTS"
    )
    annotations: Path | None = setting(None, "Compute metrics from this annotations.json instead of judging a model.")
    reference_outputs: Path | None = setting(None, "Instructions and the baseline's outputs (default: from the hub).")
    gamed: Path | None = setting(None, "df_gamed.csv with the gamed baselines (default: from the hub).")
    difficulty: Path | None = setting(None, "instruction_difficulty.csv (default: difficulties in df_gamed.csv).")
    plain: bool = setting(False, "Let the judge name the better answer, if it reports no log-probabilities.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == (self.annotations is not None):
            raise SimpoError("give either a model (or a file with its outputs) or --annotations")

    def benchmark(self, log: Log) -> Benchmark:
        """Prepare the benchmark; raises :class:`SimpoError` if a file is unusable."""
        return AlpacaEval(self, log) if self.annotations is None else ExistingAnnotations(self, log)

    def length_control(self, count: int, log: Log) -> Baselines | None:
        """Load what length control needs for ``count`` instructions; None, with a note, if the download fails."""
        try:
            baselines = read_baselines(self.gamed, self.difficulty)
        except SimpoError as error:
            if self.gamed is not None:
                raise
            log(f"note: no length-controlled win rate: {error}; compute it later with --annotations")
            return None
        available = len(baselines.difficulties)
        if count > available:
            raise SimpoError(f"{count} instructions, but difficulties for {available} only; use the benchmark's own")
        if count < available:
            log(
                f"note: the {available} difficulties are looked up by position: the length-controlled win rate is "
                f"correct only if your {count} instructions are the benchmark's first, in the same order"
            )
        return baselines

    def length_control_identity(self) -> dict[str, Any]:
        """Return digests of the files used for length control, None for files from the hub."""
        return {
            key: None if (path := getattr(self, key)) is None else file_digest(path) for key in ("gamed", "difficulty")
        }


# ---- The benchmark.


@dataclass(frozen=True)
class Annotation:
    """The judge's preference between the baseline's answer and the model's."""

    question: Question  # includes the baseline's answer
    answer: Answer  # the model's answer
    annotator: str  # name of the judge
    preference: float  # in [1, 2]: 2 if the model is preferred, NaN if there is no preference
    raw_completion: str | None = None  # the judge's reply; None if it was not asked


class AlpacaEval(JudgedBenchmark):
    """Compares a model's answers with the baseline's through a pairwise judge."""

    name = "alpaca_eval"
    key_name = "instruction"
    answer_file = "model_outputs.json"
    settings: AlpacaEvalSettings

    def __init__(self, settings: AlpacaEvalSettings, log: Log) -> None:
        self._prompt = PairwisePrompt(settings.api.judge_prompt)
        reference = settings.reference_outputs
        if reference is None:
            reference = hub_file("alpaca_eval_gpt4_baseline.json", "--reference_outputs")
        self._reference, self._weighted = reference, not settings.plain
        questions = read_reference(reference)
        self._baselines = settings.length_control(len(questions), log)
        self._length_control = settings.length_control_identity()
        self.check_first = self._check_logprobs if self._weighted else None
        super().__init__(settings, questions, self._prompt.digest)

    def extra_identity(self) -> dict[str, Any]:
        """Return the baseline's outputs, how preferences are read, and the files for length control."""
        return {
            "benchmark": self.name,
            "reference_outputs": file_digest(self._reference),
            "weighted": self._weighted,
            **self._length_control,
        }

    @classmethod
    def parse_answer(cls, row: Row, where: str) -> tuple[str, Answer]:
        """Parse a row of ``model_outputs.json``."""
        return cell(row, "instruction", where), _output(row, where)

    @classmethod
    def answer_row(cls, question: Question, answer: Answer) -> Row:
        """Return a row of ``model_outputs.json``."""
        return {
            "dataset": question.category,
            "instruction": question.key,
            "output": answer.text,
            "generator": answer.model,
        }

    def requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[ChatRequest | None]:
        """Build one request per pair, or None for identical answers, which are a draw."""
        return [
            None
            if question.baseline.text == answer.text
            else self._prompt.request(question.key, question.baseline.text, answer.text, weighted=self._weighted)
            for question, answer in zip(questions, answers, strict=True)
        ]

    def read_judgments(
        self, questions: Sequence[Question], answers: Sequence[Answer], replies: Sequence[Any], run: RunFolder
    ) -> list[Metric]:
        """Read preferences, write ``annotations.json``, and compute the leaderboard's metrics."""
        preferences = [
            preference(question.key, reply, weighted=self._weighted)
            for question, reply in zip(questions, replies, strict=True)
        ]
        without = [reply for reply, value in zip(replies, preferences, strict=True) if reply and math.isnan(value)]
        if self._weighted and (unsure := sum(bool(reply.first_token_logprobs) for reply in without)):
            run.log(
                f"note: {unsure} replies name an answer with a probability below {MIN_MASS} and do not count; "
                "reasoning judges need --plain and --judge_max_tokens"
            )
        if not self._weighted and (cut := sum(reply.cut_off for reply in without)):
            run.log(
                f"note: {cut} replies were cut off before they named an answer; reasoning judges need a higher "
                "--judge_max_tokens"
            )
        annotator = f"{'weighted' if self._weighted else 'plain'}_{self.judge_name}"
        annotations = [
            Annotation(question, answer, annotator, value, None if reply is None else reply.text)
            for question, answer, value, reply in zip(questions, answers, preferences, replies, strict=True)
        ]
        write_annotations(run.path / "annotations.json", annotations)
        return leaderboard_metrics(annotations, self._baselines, run.log)

    def _check_logprobs(self, replies: Sequence[ChatReply]) -> None:
        if not any(reply.first_token_logprobs for reply in replies):
            raise SimpoError(
                f"{self.client.endpoint.base_url}: the server reports no log-probabilities; use one that does (with "
                "another --cache), or judge without them: --plain"
            )


class ExistingAnnotations:
    """Computes metrics from existing annotations, without a judge."""

    def __init__(self, settings: AlpacaEvalSettings, log: Log) -> None:
        assert settings.annotations is not None
        self._annotations = read_annotations(settings.annotations)
        self._baselines = settings.length_control(len(self._annotations), log)
        self._identity = {
            "benchmark": "alpaca_eval",
            "annotations": file_digest(settings.annotations),
            "judge": ", ".join(sorted({annotation.annotator for annotation in self._annotations})),
            **settings.length_control_identity(),
        }

    def identity(self) -> dict[str, Any]:
        """Return digests of the annotations and of the files for length control."""
        return self._identity

    def measure(self, run: RunFolder) -> list[Metric]:
        """Compute the leaderboard's metrics."""
        return leaderboard_metrics(self._annotations, self._baselines, run.log)


# ---- The pairwise judge: the order of the answers, the request, and how replies are read.

_SECTION = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)
_FIRST, _SECOND = "m", "M"  # the names of the answers, in the order in which they are shown
_TOP_LOGPROBS = 5
MIN_MASS = 0.5  # if the two names together are less likely than this, the judge was about to write something else


def switched(instruction: str) -> bool:
    """Whether the model's answer is shown first, drawn from the instruction exactly as in the benchmark."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]  # noqa: S311


class PairwisePrompt:
    """A judge prompt with placeholders ``{instruction}``, ``{output_1}`` and ``{output_2}``.

    Messages are delimited by ``<|im_start|>role ... <|im_end|>``, as in the benchmark's own file; a text without these
    is a single user message. If ``path`` is None, the built-in prompt is used.
    """

    def __init__(self, path: Path | None) -> None:
        shipped = resources.files("simpo.evaluation") / "prompts" / "alpaca_eval.txt"
        text, self.digest = read_prompt_file(path, shipped, ("instruction", "output_1", "output_2"))
        marked = _SECTION.findall(text)
        if marked and _SECTION.sub("", text).strip():
            raise SimpoError(
                f"{path}: the judge prompt has text outside its messages (<|im_start|>role ... <|im_end|>)"
            )
        for role, _ in marked:
            if role not in ("system", "user", "assistant"):
                raise SimpoError(f"{path}: {role!r} is not a role; use system, user or assistant")
        sections = marked or [("user", text.strip())]
        self._messages = [{"role": role, "content": content} for role, content in sections]

    def request(self, instruction: str, baseline: str, answer: str, *, weighted: bool) -> ChatRequest:
        """Build a request with the two answers in the order given by :func:`switched`.

        The weighted judge is asked for the log-probabilities of one token; the plain one answers greedily.
        """
        first, second = (answer, baseline) if switched(instruction) else (baseline, answer)
        values = {"instruction": instruction, "output_1": first, "output_2": second}
        messages = [message | {"content": fill(message["content"], values)} for message in self._messages]
        if weighted:
            return ChatRequest(messages, max_tokens=1, temperature=1.0, top_logprobs=_TOP_LOGPROBS)
        return ChatRequest(messages, max_tokens=1)


def preference(instruction: str, reply: ChatReply | None, *, weighted: bool) -> float:
    """Return the preference in [1, 2]: 2 if the model's answer wins, NaN if the judge gave none.

    A reply of None means that the answers are identical, which is a draw.
    """
    if reply is None:
        return 1.5
    shown = weighted_preference(reply.first_token_logprobs) if weighted else plain_preference(reply.text)
    return 3 - shown if switched(instruction) else shown


def weighted_preference(logprobs: dict[str, float] | None) -> float:
    """Compute ``2 - P(m) / (P(m) + P(M))`` for the first token; a name missing from the top tokens counts as 0.

    NaN if the two together have a probability below :data:`MIN_MASS`. Names surrounded by white space count only if
    the bare names have less than that.
    """
    for strip in ("", None):  # first strip nothing, then white space
        first, second = (
            sum(math.exp(logprob) for token, logprob in (logprobs or {}).items() if token.strip(strip) == name)
            for name in (_FIRST, _SECOND)
        )
        if first + second >= MIN_MASS:
            return 2 - first / (first + second)
    return math.nan


def plain_preference(text: str) -> float:
    """Return 1 or 2 for the name that the judge wrote after any thinking, or NaN if it wrote neither."""
    return {_FIRST: 1.0, _SECOND: 2.0}.get((after_thinking(text) or "").strip(), math.nan)


# ---- Metrics.


def leaderboard_metrics(annotations: Sequence[Annotation], baselines: Baselines | None, log: Log) -> list[Metric]:
    """Compute the leaderboard's metrics under its names, and count empty answers and missing preferences.

    Intervals are 1.96 standard errors wide on either side, kept within 0 to 100.
    """
    preferences = np.array([annotation.preference for annotation in annotations])
    theirs = [annotation.question.baseline.text for annotation in annotations]
    ours = [annotation.answer.text for annotation in annotations]
    total, without = len(preferences), int(np.isnan(preferences).sum())
    empty = sum(not text.strip() for text in ours)
    if without:
        log(f"note: {without} of {total} answers have no preference and do not count")
    if empty:
        log(f"note: {empty} of {total} answers are empty; they were judged like any other")

    metrics = []
    if without == total:
        metrics.append(Metric("alpaca_eval/win_rate", None, n=0))
    else:
        if baselines is not None:
            their_lengths, our_lengths = (np.array([len(text) for text in texts]) for texts in (theirs, ours))
            controlled = length_controlled(preferences, their_lengths, our_lengths, baselines)
            metrics += [
                _with_interval("length_controlled_winrate", controlled.win_rate, controlled.standard_error, total),
                Metric("alpaca_eval/lc_standard_error", controlled.standard_error, n=total),
            ]
        rates = win_rates(preferences[~np.isnan(preferences)])
        judged = total - without
        metrics.append(_with_interval("win_rate", rates.pop("win_rate"), rates["standard_error"], judged))
        metrics += [Metric(f"alpaca_eval/{name}", value, n=judged) for name, value in rates.items()]
    return [
        *metrics,
        Metric("alpaca_eval/avg_length", int(np.mean([len(text) for text in ours])), n=total),
        Metric("alpaca_eval/without_preference", without, n=total),
        Metric("alpaca_eval/empty_answers", empty, n=total),
    ]


def _with_interval(name: str, value: float, error: float, n: int) -> Metric:
    """Return a percentage with an interval of 1.96 standard errors, or without one if the error is NaN."""
    if math.isnan(error):
        return Metric(f"alpaca_eval/{name}", value, n=n)
    low, high = share_bounds(value / 100, 1.96 * error / 100)
    return Metric(f"alpaca_eval/{name}", value, None, n, 100 * low, 100 * high, "Wilson, 1.96 standard errors")


# ---- Files.


def hub_file(name: str, option: str) -> Path:
    """Download a file of the benchmark from the hub, or find it in the cache; errors suggest ``option`` instead."""
    with third_party(f"{REPOSITORY}: {name} cannot be downloaded from the hub; pass a local copy with {option}"):
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))


def read_reference(path: Path) -> list[Question]:
    """Read instructions with the baseline's outputs, ``{instruction, output, generator, dataset}``."""

    def parse(row: Row, where: str) -> tuple[str, Question]:
        instruction = cell(row, "instruction", where)
        reference = _output(row, where)
        return instruction, Question(instruction, (instruction,), where, row.get("dataset"), reference)

    return [question for question, _ in read_by_key(path, "instruction", parse).values()]


def _output(row: Row, where: str) -> Answer:
    return Answer(str(row.get("generator") or "model"), (cell(row, "output", where),))


def read_annotations(path: Path) -> list[Annotation]:
    """Read annotations in file order; a preference of 0, which older versions write for a draw, becomes 1.5."""

    def parse(row: Row, where: str) -> tuple[str, Annotation]:
        instruction = cell(row, "instruction", where)
        value = row.get("preference")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and (value == 0 or 1 <= value <= 2)):
            raise SimpoError(f"{where}: preference: expected a number from 1 to 2, got {value!r:.60}")
        baseline = Answer(str(row.get("generator_1") or "baseline"), (cell(row, "output_1", where),))
        model = str(row.get("generator_2") or row.get("generator") or "model")
        return instruction, Annotation(
            Question(instruction, (instruction,), where, row.get("dataset"), baseline),
            Answer(model, (cell(row, "output_2", where),)),
            str(row.get("annotator") or "unknown"),
            math.nan if value is None else float(value) or 1.5,
        )

    return [annotation for annotation, _ in read_by_key(path, "instruction", parse).values()]


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write ``annotations.json``; a missing preference is written as null."""
    rows = [
        {
            "instruction": annotation.question.key,
            "dataset": annotation.question.category,
            "output_1": annotation.question.baseline.text,
            "generator_1": annotation.question.baseline.model,
            "output_2": annotation.answer.text,
            "generator_2": annotation.answer.model,
            "annotator": annotation.annotator,
            "preference": None if math.isnan(annotation.preference) else annotation.preference,
            "raw_completion": annotation.raw_completion,
        }
        for annotation in annotations
    ]
    write_rows(path, rows)


def read_baselines(gamed: Path | None, difficulty: Path | None) -> Baselines:
    """Read the gamed baselines and the difficulties, from the hub unless files are given.

    The gamed file has the columns ``index``, ``std_delta_len``, ``instruction_difficulty`` and a preference in [0, 1],
    whose name starts with ``preference``. A ``difficulty`` file with the columns ``index`` and
    ``instruction_difficulty`` overrides its difficulties.
    """
    rows = read_rows(hub_file("df_gamed.csv", "--gamed") if gamed is None else gamed)
    columns = ("std_delta_len", "instruction_difficulty", "preference")
    numbers = np.array([[_number(row, name, where) for name in columns] for row, where in rows])
    length, difficulties, y = numbers.T
    outside = (y < 0) | (y > 1)
    if outside.any():
        raise SimpoError(f"{rows[int(outside.argmax())][1]}: preference: expected a number from 0 to 1")
    source = rows if difficulty is None else read_rows(difficulty)
    by_index = {
        int(_number(row, "index", where)): _number(row, "instruction_difficulty", where) for row, where in source
    }
    if sorted(by_index) != list(range(len(by_index))):
        raise SimpoError(f"{source[0][1]}: index: expected numbers from 0 to {len(by_index) - 1}, each once")
    x = np.column_stack([np.tanh(length), difficulties, np.zeros(len(y))])
    return Baselines(np.array([by_index[index] for index in range(len(by_index))]), x, y)


def _number(row: Row, name: str, where: str) -> float:
    """Parse a cell, which is text in CSV files, as a finite number; raises :class:`SimpoError` if it is not one."""
    key = next((key for key in row if key == name or (name == "preference" and key.startswith(name))), None)
    try:
        value = float(row[key]) if key is not None and not isinstance(row[key], bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise SimpoError(f"{where}: {name}: expected a number; the row has {', '.join(sorted(row))}")
    return value
