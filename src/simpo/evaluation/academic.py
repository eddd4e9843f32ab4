"""Benchmarks with ground truth, before and after alignment: GSM8K, and lm-eval's tasks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from simpo.config import check_values, setting
from simpo.data.rows import rows_of
from simpo.data.sources import has_one_split, load_rows
from simpo.errors import SimpoError, one_line
from simpo.evaluation.answers import Answerer, cell
from simpo.evaluation.runner import AnswerSettings, BenchmarkSettings
from simpo.generation.responses import after_thinking
from simpo.generation.settings import SamplingSettings
from simpo.models.checkpoint import model_digest, with_dtype
from simpo.models.devices import device
from simpo.models.loading import base_model_of, check_model_files
from simpo.models.settings import ModelArguments
from simpo.runs.files import write_text
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import is_intact, write_digest
from simpo.runs.results import Metric, Stage, fingerprint
from simpo.statistics import mean_interval, proportion_interval, share_bounds

# ---- lm-eval.

# Arithmetic, knowledge, truthfulness, instruction following, toxicity, bias.
TASKS = ("gsm8k", "mmlu", "truthfulqa_mc2", "ifeval", "toxigen", "crows_pairs_english")
_PROPORTIONS = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mc1", "mc2", "pass@1")  # in [0, 1]
_METHOD = "1.96 standard errors"


@dataclass(kw_only=True)
class AcademicSettings(BenchmarkSettings):
    """Evaluate a model, and optionally the model it was trained from, on lm-eval's tasks.

    examples:
      simpo evaluate academic outputs/simpo --against outputs/sft --output_dir outputs/academic
      simpo evaluate academic outputs/simpo --tasks gsm8k,truthfulqa_mc2 --limit 100 --output_dir outputs/academic
    """

    against: str | None = setting(None, "Baseline to compute differences to, usually the model before alignment.")
    tasks: str = setting(",".join(TASKS), "lm-eval task names or paths of task files, separated by commas.")
    task_folder: str | None = setting(None, "Folder with your own task files.")
    num_fewshot: int | None = setting(None, "Number of few-shot examples (default: the task's).")
    limit: int | None = setting(None, "Evaluate only this many items per task, for a quick trial (default: all).")
    batch_size: str = setting("auto", "Batch size for lm-eval: a number or auto.")
    no_chat_template: bool = setting(False, "Present items as plain text, without the chat template.")

    def benchmark(self, log: Log) -> Academic:
        """Prepare the benchmark; raises :class:`SimpoError` if lm-eval is not installed or a task is unknown."""
        return Academic(self)


class Academic:
    """Runs lm-eval, storing each model's scores in the run folder so that they are computed only once."""

    def __init__(self, settings: AcademicSettings) -> None:
        self._task_names = settings.tasks.split(",")
        local = settings.task_folder or next((name for name in self._task_names if Path(name).exists()), None)
        if local is not None and not settings.loading.trust_remote_code:
            raise SimpoError(f"{local}: task files can run code; allow it with --trust_remote_code")
        try:
            self._lm_eval: Any = importlib.import_module("lm_eval")
        except ImportError as error:
            raise SimpoError("academic benchmarks need lm-eval: pip install 'simpo[academic]'") from error
        self._settings = settings
        self._tasks = importlib.import_module("lm_eval.tasks").TaskManager(include_path=settings.task_folder)
        unknown = [
            name for name in self._task_names if not self._tasks.match_tasks([name]) and not Path(name).is_file()
        ]
        if unknown:
            raise SimpoError(f"tasks: lm-eval has no {', '.join(unknown)}; see 'lm-eval ls tasks' for the names")
        self._model = settings.model_arguments(settings.model)
        self._against = None if settings.against is None else settings.model_arguments(settings.against)

    def identity(self) -> dict[str, Any]:
        """Return the models and lm-eval's settings."""
        settings = self._settings
        identity = {
            "benchmark": "academic",
            "model": model_digest(self._model),
            "dtype": with_dtype(self._model).dtype,
            "tasks": self._task_names,
            **{key: getattr(settings, key) for key in ("task_folder", "num_fewshot", "limit", "batch_size")},
            "apply_chat_template": not settings.no_chat_template,
            "lm_eval": metadata.version("lm-eval"),
        }
        return identity if self._against is None else identity | {"against": model_digest(self._against)}

    def measure(self, run: RunFolder) -> list[Metric]:
        """Score the model and, if there is a baseline, the baseline and the differences."""
        before = None if self._against is None else self._scores(self._against, run.path / "scores-before.json")
        after = self._scores(self._model, run.path / "scores-after.json")
        if before is None:
            return score_metrics(after, None)
        return score_metrics(before, "before") + score_metrics(after, "after") + differences(before, after)

    def _scores(self, model: ModelArguments, path: Path) -> dict[str, Score]:
        """Read the scores from ``path``, or evaluate the model and write them first."""
        if not is_intact(path):
            scores = read_scores(self._evaluate(model))
            write_text(path, json.dumps({name: dataclasses.asdict(score) for name, score in scores.items()}) + "\n")
            write_digest(path)
        return {name: Score(**score) for name, score in json.loads(path.read_text(encoding="utf-8")).items()}

    def _evaluate(self, model: ModelArguments) -> Mapping[str, Any]:
        """Run lm-eval on a model, or on an adapter with its base model."""
        check_model_files(model)
        base = base_model_of(model)
        model_args = {
            "pretrained": base.model_name_or_path,
            "revision": base.model_revision,
            "dtype": with_dtype(model).dtype,
            "trust_remote_code": model.trust_remote_code,
        }
        if base is not model:
            model_args |= {"peft": model.model_name_or_path, "tokenizer": model.model_name_or_path}
        settings = self._settings
        try:
            return self._lm_eval.simple_evaluate(
                model="hf",
                model_args=model_args,
                tasks=self._task_names,
                task_manager=self._tasks,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                device=str(device()),
                apply_chat_template=not settings.no_chat_template,
                log_samples=True,
            )
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise SimpoError(f"lm-eval: {model.model_name_or_path}: {one_line(error)}") from error


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    value: float
    error: float | None  # standard error; None if lm-eval reports none
    n: int | None  # number of items; None for a group of tasks
    items: dict[str, float]  # value of every item by id if the metric is their mean, otherwise empty


def read_scores(output: Mapping[str, Any]) -> dict[str, Score]:
    """Extract scores, keyed by ``task/metric`` or ``task/metric:filter``, from lm-eval's output.

    ``output`` is the return value of ``lm_eval.simple_evaluate``: ``results`` and, if requested, ``samples`` and
    ``n-samples``.
    """
    scores = {}
    for task, results in output["results"].items():
        for key, value in results.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = results.get(f"{metric}_stderr,{rule}")
            items = _items(output.get("samples", {}).get(task, ()), metric, rule)
            if items and not math.isclose(np.mean(list(items.values())), value, abs_tol=1e-9):
                items = {}  # the metric is not the mean over items
            name = f"{task}/{metric}" if rule == "none" else f"{task}/{metric}:{rule}"
            n = output.get("n-samples", {}).get(task, {}).get("effective")
            scores[name] = Score(float(value), float(error) if _is_number(error) else None, n, items)
    return scores


def _items(samples: Sequence[Mapping[str, Any]], metric: str, rule: str) -> dict[str, float]:
    rows = [sample for sample in samples if sample.get("filter", "none") == rule]
    if not all(_is_number(row.get(metric)) or isinstance(row.get(metric), bool) for row in rows):
        return {}
    return {str(row["doc_id"]): float(row[metric]) for row in rows}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def score_metrics(scores: Mapping[str, Score], stage: Stage | None) -> list[Metric]:
    """Return scores with intervals of 1.96 standard errors; for proportions, Wilson intervals within [0, 1]."""
    metrics = []
    for name, score in scores.items():
        low = high = method = None
        if score.error is not None:
            half, method = 1.96 * score.error, _METHOD
            is_proportion = name.rpartition("/")[2].partition(":")[0] in _PROPORTIONS
            low, high = share_bounds(score.value, half) if is_proportion else (score.value - half, score.value + half)
        metrics.append(Metric(f"academic/{name}", score.value, stage, score.n, low, high, method))
    return metrics


def differences(before: Mapping[str, Score], after: Mapping[str, Score]) -> list[Metric]:
    """Return after minus before for every score that both models have.

    The interval is paired if both have the same items, since the same items tend to be hard for both models. Otherwise
    it is computed from the two standard errors and is wider than necessary.
    """
    metrics = []
    for key in (key for key in before if key in after):
        first, second, name = before[key], after[key], f"academic/{key}/difference"
        value = second.value - first.value
        if first.items and first.items.keys() == second.items.keys():
            interval = mean_interval([second.items[item] - first.items[item] for item in first.items])
            metrics.append(Metric.of(name, interval, method=f"paired, {interval.method}"))
        elif first.error is None or second.error is None:
            metrics.append(Metric(name, value, None, second.n))
        else:
            half = 1.96 * math.hypot(first.error, second.error)
            metrics.append(Metric(name, value, None, second.n, value - half, value + half, f"unpaired, {_METHOD}"))
    return metrics


# ---- GSM8K.

_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANSWER_MARKER = "####"
_PROMPT = "{}\n\nThink step by step. End with a line that has nothing but #### and the number, like this: #### 42"

Problem = tuple[str, Decimal]  # a question and its numerical answer


@dataclass(kw_only=True)
class Gsm8kSettings(AnswerSettings):
    """Evaluate a model, and optionally the model it was trained from, on GSM8K by exact match.

    examples:
      simpo evaluate gsm8k outputs/simpo --against outputs/sft --output_dir outputs/gsm8k
      simpo evaluate gsm8k outputs/simpo --limit 200 --engine vllm --output_dir outputs/gsm8k
    """

    against: str | None = setting(None, "Baseline to compute the difference to, usually the model before alignment.")
    data: str = setting("openai/gsm8k", "File with question and answer columns, or a hub dataset.")
    split: str = setting("test", "Split of a hub dataset.")
    limit: int | None = setting(None, "Evaluate only the first so many problems (default: all).", least=1)
    sampling: SamplingSettings = field(
        default=SamplingSettings(temperature=0.0, top_p=1.0), metadata={"without": ("n", "top_k")}
    )

    def __post_init__(self) -> None:
        check_values(self)

    def benchmark(self, log: Log) -> Gsm8k:
        """Prepare the benchmark; raises :class:`SimpoError` if the problems cannot be read."""
        against = None if self.against is None else self.answerer(self.against)
        return Gsm8k(read_problems(self.data, self.split, self.limit), self.answerer(self.model), against)


@dataclass(frozen=True)
class Gsm8k:
    """Samples answers and computes their accuracy."""

    problems: Sequence[Problem]
    model: Answerer
    against: Answerer | None

    def identity(self) -> dict[str, Any]:
        """Return the problems and the models."""
        problems = fingerprint([[question, str(number)] for question, number in self.problems])
        identity = {"benchmark": "gsm8k", "problems": problems, **self.model.identity()}
        if self.against is not None:
            identity |= {f"against/{key}": value for key, value in self.against.identity().items()}
        return identity

    def measure(self, run: RunFolder) -> list[Metric]:
        """Return the model's accuracy and, if there is a baseline, its accuracy and the paired difference."""
        if self.against is None:
            return self._accuracy(self.model, run.path / "answers", None)[0]
        before, was_right = self._accuracy(self.against, run.path / "answers-against", "before")
        after, is_right = self._accuracy(self.model, run.path / "answers", "after")
        interval = mean_interval(is_right.astype(float) - was_right)
        return [*before, *after, Metric.of("gsm8k/difference", interval, method=f"paired, {interval.method}")]

    def _accuracy(self, model: Answerer, folder: Path, stage: Stage | None) -> tuple[list[Metric], np.ndarray]:
        """Return a model's metrics, and whether its answer to each problem is correct."""
        texts = model.answer([_PROMPT.format(question) for question, _ in self.problems], folder)
        numbers = [final_number(text) for text in texts]
        correct = np.array([answer == number for (_, number), answer in zip(self.problems, numbers, strict=True)])
        metrics = [
            Metric.of("gsm8k/accuracy", proportion_interval(int(correct.sum()), len(correct)), stage),
            Metric("gsm8k/without_number", sum(number is None for number in numbers), stage, len(numbers)),
        ]
        return metrics, correct


def read_problems(data: str, split: str, limit: int | None) -> list[Problem]:
    """Read questions and numerical answers from a file with ``{question, answer}`` rows or a hub dataset."""
    dataset = load_rows(data, split=split, config=None if has_one_split(data) else "main", any_split=True)
    dataset = dataset.select(range(min(limit or len(dataset), len(dataset))))
    problems = []
    for row, where in rows_of(dataset[:], range(len(dataset)), data):
        question, answer = cell(row, "question", where), cell(row, "answer", where)
        number = final_number(answer) if _ANSWER_MARKER in answer else None
        if number is None:
            raise SimpoError(f"{where}: answer: has no number after {_ANSWER_MARKER}")
        problems.append((question, number))
    return problems


def final_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, else the last number in the text, or None if there is none.

    Thousands separators, dollar signs and any numbers in the model's thinking are ignored.
    """
    text = after_thinking(text) or ""
    marked = _NUMBER.findall(text.rpartition(_ANSWER_MARKER)[2]) if _ANSWER_MARKER in text else []
    matches = marked[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(matches[0].replace(",", "").replace("$", "")) if matches else None
