"""Arena-Hard v0.1 and v2: pairwise comparisons with a baseline, in two games per prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from simpo.client import ChatRequest
from simpo.config import required, setting
from simpo.config.text import load_yaml
from simpo.data.rows import Row
from simpo.errors import SimpoError, third_party
from simpo.evaluation.answers import Answer, Question, cell, read_answers, read_by_key, write_rows
from simpo.evaluation.preferences import fit_logistic, is_determined
from simpo.evaluation.runner import JudgedBenchmark, JudgedSettings
from simpo.generation.responses import after_thinking
from simpo.generation.settings import SamplingSettings
from simpo.judging.protocol import fill, read_prompt_file
from simpo.judging.settings import ApiSettings
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric
from simpo.statistics import Interval, share_interval

Version = Literal["v0.1", "v2"]

_V01 = "arena-hard-v0.1"  # v0.1's only category
_O3_MINI = "o3-mini-2025-01-31"
# The baseline for each category.
BASELINES = {
    _V01: "gpt-4-0314",
    "hard_prompt": _O3_MINI,
    "coding": _O3_MINI,
    "math": _O3_MINI,
    "creative_writing": "gemini-2.0-flash-001",
}


@dataclass(kw_only=True)
class ArenaHardSettings(JudgedSettings):
    """Arena-Hard for a model or a file of its answers, in two games per prompt against the baseline.

    examples:
      simpo evaluate arena_hard outputs/simpo --questions question.jsonl --baseline gpt-4-0314.jsonl \\
          --judge_url https://api.openai.com/v1 --judge_model gpt-4-1106-preview --output_dir outputs/arena_hard
      simpo evaluate arena_hard recipe.yaml --version v2
    """

    version: Version = setting("v0.1", "Version of the benchmark; v0.1 is the paper's.")
    questions: Path = required("The benchmark's question.jsonl.")
    baseline: list[Path] = required("Files with the baseline's answers; v2 needs two.", repeat=True)
    sampling: SamplingSettings = field(
        default=SamplingSettings(temperature=0.0, top_p=1.0), metadata={"without": ("n", "top_k")}
    )
    api: ApiSettings = field(default=ApiSettings(judge_timeout=600.0))  # judgments are long

    def benchmark(self, log: Log) -> ArenaHard:
        """Prepare the benchmark; raises :class:`SimpoError` if a file is unusable."""
        return ArenaHard(self, log)


# ---- The benchmark.


@dataclass(frozen=True)
class Judgment:
    """The two games for one question."""

    question: Question  # includes the baseline's answer, which is shown first in the first game
    answer: Answer  # the model's answer, which is shown first in the second game
    texts: tuple[str, str]  # the judge's replies
    verdicts: tuple[str | None, str | None]  # the verdicts in them; None if there is none


class ArenaHard(JudgedBenchmark):
    """Compares a model's answers with the baseline's, with each shown first once."""

    name = "arena_hard"
    key_name = "uid"
    answer_file = "model_answer.jsonl"
    settings: ArenaHardSettings

    def __init__(self, settings: ArenaHardSettings, log: Log) -> None:
        self._prompt = ArenaPrompt(settings.api.judge_prompt)
        questions = attach_baselines(read_questions(settings.questions, settings.version), settings.baseline, log)
        super().__init__(settings, questions, self._prompt.digest)

    def extra_identity(self) -> dict[str, Any]:
        """Return the version and its files."""
        return {
            "benchmark": f"{self.name} {self.settings.version}",
            "questions": file_digest(self.settings.questions),
            "baselines": ", ".join(map(file_digest, self.settings.baseline)),
        }

    @classmethod
    def parse_answer(cls, row: Row, where: str) -> tuple[str, Answer]:
        """Parse a row ``{uid, model, messages}``, or v0.1's earlier ``{question_id, model_id, choices}``."""
        with third_party(f"{where}: expected a row with uid, model and messages"):
            if "choices" in row:
                turn = row["choices"][0]["turns"][0]
                model, text, tokens = cell(row, "model_id", where), turn["content"], turn.get("token_len")
            else:
                content = row["messages"][-1]["content"]
                model, text = cell(row, "model", where), content["answer"] if isinstance(content, dict) else content
                tokens = (row.get("metadata") or {}).get("token_len")
        if not isinstance(text, str):
            raise SimpoError(f"{where}: answer: expected text, got {text!r:.60}")
        if not isinstance(tokens, int | None):
            raise SimpoError(f"{where}: token_len: expected a whole number, got {tokens!r:.60}")
        return _uid(row, where), Answer(model, (text,), tokens)

    @classmethod
    def answer_row(cls, question: Question, answer: Answer) -> Row:
        """Return a row ``{uid, model, messages}``."""
        return {
            "uid": question.key,
            "model": answer.model,
            "messages": [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": answer.text}},
            ],
        }

    def requests(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[ChatRequest]:
        """Build two requests per question: first with the baseline's answer shown first, then with the model's."""
        return [
            self._prompt.request(question, first.text, second.text, self.settings.version)
            for question, answer in zip(questions, answers, strict=True)
            for first, second in ((question.baseline, answer), (answer, question.baseline))
        ]

    def read_judgments(
        self, questions: Sequence[Question], answers: Sequence[Answer], replies: Sequence[Any], run: RunFolder
    ) -> list[Metric]:
        """Read verdicts, write ``model_judgment.jsonl``, and compute scores per category."""
        judgments = []
        for question, answer, first, second in zip(questions, answers, replies[::2], replies[1::2], strict=True):
            verdicts = (
                read_verdict(first.complete_text, self.settings.version),
                read_verdict(second.complete_text, self.settings.version),
            )
            judgments.append(Judgment(question, answer, (first.text, second.text), verdicts))
        rows = [
            {
                "uid": judgment.question.key,
                "category": judgment.question.category,
                "judge": self.judge_name,
                "model": judgment.answer.model,
                "baseline": judgment.question.baseline.model,
                "games": [
                    {"score": verdict, "judgment": {"answer": text}}
                    for verdict, text in zip(judgment.verdicts, judgment.texts, strict=True)
                ],
            }
            for judgment in judgments
        ]
        write_rows(run.path / "model_judgment.jsonl", rows)
        return category_metrics(judgments, self.settings.version, run.log)


class ArenaPrompt:
    """A judge prompt: YAML with ``system_prompt`` and ``prompt_template``, as in the benchmark's settings.

    The template has placeholders ``{QUESTION}``, ``{ANSWER_A}`` and ``{ANSWER_B}`` (v2) or ``{question_1}``,
    ``{answer_1}`` and ``{answer_2}`` (v0.1). ``system_prompts`` can override the system prompt per category. If
    ``path`` is None, the built-in prompt is used.
    """

    def __init__(self, path: Path | None) -> None:
        shipped = resources.files("simpo.evaluation") / "prompts" / "arena_hard.yaml"
        text, self.digest = read_prompt_file(path, shipped, ())
        with third_party(f"{path}: not YAML"):
            document = load_yaml(text, str(path))
        settings = document if isinstance(document, dict) else {}
        template, system = settings.get("prompt_template"), settings.get("system_prompt")
        if isinstance(template, list) and template:
            template = template[0]
        if not isinstance(template, str) or not isinstance(system, str):
            raise SimpoError(f"{path}: a judge prompt for Arena-Hard needs system_prompt and prompt_template")
        for names in (("QUESTION", "question_1"), ("ANSWER_A", "answer_1"), ("ANSWER_B", "answer_2")):
            if not any(f"{{{name}}}" in template for name in names):
                raise SimpoError(f"{path}: prompt_template lacks the placeholder {{{names[0]}}}")
        self._template, self._system = template, system
        self._by_category: dict[str | None, str] = settings.get("system_prompts") or {}
        if not isinstance(self._by_category, dict) or not all(isinstance(x, str) for x in self._by_category.values()):
            raise SimpoError(f"{path}: system_prompts: expected one text per category")

    def request(self, question: Question, first: str, second: str, version: Version) -> ChatRequest:
        """Build the request for one game, with the answers in the order in which they are shown."""
        text = question.turns[0]
        values = {"QUESTION": text, "ANSWER_A": first, "ANSWER_B": second}
        values |= {"question_1": text, "answer_1": first, "answer_2": second}
        messages = [
            {"role": "system", "content": self._by_category.get(question.category, self._system)},
            {"role": "user", "content": fill(self._template, values)},
        ]
        return ChatRequest(messages, max_tokens=4096 if version == "v0.1" else 16000)


# ---- Files.


def read_questions(path: Path, version: Version) -> list[Question]:
    """Read questions ``{uid, category, prompt}``, or v0.1's earlier ``{question_id, category, turns: [{content}]}``."""

    def parse(row: Row, where: str) -> tuple[str, Question]:
        category = cell(row, "category", where)
        actual = "v0.1" if category == _V01 else "v2"
        if actual != version:
            raise SimpoError(f"{where}: category {category!r} is not in {version}; use --version {actual}")
        if "turns" not in row:
            prompt = cell(row, "prompt", where)
        else:
            turns = cell(row, "turns", where, list)
            if not turns or not isinstance(turns[0], dict):
                raise SimpoError(f"{where}: turns: expected a list with the user's message, got {turns!r:.60}")
            prompt = cell(turns[0], "content", f"{where}: turns")
        return _uid(row, where), Question(_uid(row, where), (prompt,), where, category)

    return [question for question, _ in read_by_key(path, "uid", parse).values()]


def _uid(row: Row, where: str) -> str:
    return cell(row, "uid" if "uid" in row else "question_id", where)


def attach_baselines(questions: Sequence[Question], files: Sequence[Path], log: Log) -> list[Question]:
    """Add the baseline's answers to the questions; if there are several files, each category uses its own baseline."""
    locations = {question.key: question.where for question in questions}
    answer_sets = [read_answers(path, "uid", ArenaHard.parse_answer, locations) for path in files]
    if len(answer_sets) == 1:
        pairs = zip(questions, answer_sets[0], strict=True)
        attached = [replace(question, reference=answer) for question, answer in pairs]
        for category in dict.fromkeys(question.category for question in questions):
            used = {question.baseline.model for question in attached if question.category == category}
            if used != {BASELINES.get(str(category))}:
                log(f"note: the baseline for {category} is {', '.join(sorted(used))}, not the benchmark's")
        return attached
    by_model = {answer.model: answers for answers in answer_sets for answer in answers}
    missing = {BASELINES.get(str(question.category), "") for question in questions} - by_model.keys()
    if missing:
        raise SimpoError(f"baseline: no file has answers by {', '.join(sorted(missing))}")
    return [
        replace(question, reference=by_model[BASELINES[str(question.category)]][index])
        for index, question in enumerate(questions)
    ]


# ---- Verdicts, battles and metrics.

_MARKED = re.compile(r"\[\[([AB<>=]+)\]\]")
_LOOSELY_MARKED = re.compile(r"\[([AB<>=]+)\]")
_STRONG = 3  # number of battles that a strong verdict counts as
# The outcome of each verdict for the answer shown first, and the number of battles it counts as.
_OUTCOMES = {"A>>B": (1.0, _STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, _STRONG)}
_REVERSED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}


def read_verdict(text: str, version: Version) -> str | None:
    """Return the verdict, ``A>>B``, ``A>B``, ``A=B``, ``B>A`` or ``B>>A``, or None if the judge gave none.

    v0.1 accepts a verdict in double brackets unless there are several different ones. v2 uses the last one, ignoring
    case, written in either direction, and in single brackets if there is none in double brackets. Thinking is ignored.
    """
    text = after_thinking(text) or ""
    if version == "v0.1":
        verdicts = set(_MARKED.findall(text))
        return verdicts.pop() if len(verdicts) == 1 and verdicts <= _OUTCOMES.keys() else None
    matches = _MARKED.findall(text.upper()) or _LOOSELY_MARKED.findall(text.upper())
    last = matches[-1] if matches else ""
    verdict = _REVERSED.get(last, last)
    return verdict if verdict in _OUTCOMES else None


def battles(first: str | None, second: str | None, version: Version) -> list[float]:
    """Return the model's outcome, in [0, 1], in each battle of a prompt's two games.

    The baseline is shown first in the game with the ``first`` verdict, the model in the game with the ``second``. If
    only one game has a verdict, v0.1 counts it and v2 does not.
    """
    if version == "v2" and (first is None or second is None):
        return []
    outcomes = []
    for verdict, model_first in ((first, False), (second, True)):
        if verdict is not None:
            outcome, count = _OUTCOMES[verdict]
            outcomes += [outcome if model_first else 1 - outcome] * count
    return outcomes


def category_metrics(judgments: Sequence[Judgment], version: Version, log: Log) -> list[Metric]:
    """Compute scores per category in percent: the benchmark's, one over prompts, and one with style control."""
    metrics = []
    for category in dict.fromkeys(judgment.question.category for judgment in judgments):
        played = [judgment for judgment in judgments if judgment.question.category == category]
        counted = [(judgment, outcomes) for judgment in played if (outcomes := battles(*judgment.verdicts, version))]
        name = f"arena_hard/{category}"
        if counted:
            prompts = [outcomes for _, outcomes in counted]
            lengths = [len(judgment.answer.text) for judgment, _ in counted]
            metrics += [
                Metric.of(f"{name}/score", bootstrap_score(prompts, version)),
                Metric.of(f"{name}/score_over_prompts", score_over_prompts(prompts)),
                Metric(f"{name}/score_in_baseline_style", _score_in_baseline_style(counted), n=len(prompts)),
                Metric(f"{name}/avg_length", float(np.mean(lengths)), n=len(lengths)),
            ]
        else:
            metrics.append(Metric(f"{name}/score", None, n=0))
        missing = sum(verdict is None for judgment in played for verdict in judgment.verdicts)
        metrics.append(Metric(f"{name}/games_without_verdict", missing, n=2 * len(played)))
        if missing:
            left_out = len(played) - len(counted)
            log(f"note: {category}: {missing} games have no verdict; {left_out} prompts are excluded because of this")
    return metrics


def _score_in_baseline_style(counted: Sequence[tuple[Judgment, list[float]]]) -> float:
    """Compute the style-controlled score; lengths are in tokens if known for every answer, otherwise in characters."""
    pairs = [(judgment.answer, judgment.question.baseline) for judgment, outcomes in counted for _ in outcomes]
    known = all(answer.tokens is not None for pair in pairs for answer in pair)
    styles = (
        [style_of(answer.text, answer.tokens if known else None) for answer in side]
        for side in zip(*pairs, strict=True)
    )
    outcomes = np.array([outcome for _, outcomes in counted for outcome in outcomes])
    return style_controlled_score(outcomes, style_differences(*styles))


# ---- Arena-Hard's scores.
#
# The benchmark fits Bradley-Terry strengths by unpenalized logistic regression. As every battle is against the
# baseline, a model's fitted win probability is simply its mean outcome, which is what we compute.

_RESAMPLES = 100
_PERCENTILES: dict[Version, tuple[float, float]] = {"v0.1": (2.5, 97.5), "v2": (5, 95)}


def bootstrap_score(prompts: Sequence[Sequence[float]], version: Version, seed: int = 42) -> Interval:
    """Compute the benchmark's score in percent and its bootstrap interval.

    The benchmark resamples battles independently, although battles for the same prompt, and the three that a strong
    verdict counts as, are not independent. The interval is therefore too narrow; trust :func:`score_over_prompts`
    instead. v0.1 reports the mean of the battles with the 2.5th and 97.5th percentiles, v2 the mean of the bootstrap
    means with the 5th and 95th.

    ``prompts`` holds the outcomes, in [0, 1], of each prompt's battles.
    """
    pooled = np.concatenate([np.asarray(outcomes, dtype=np.float64) for outcomes in prompts])
    draws = np.random.default_rng(seed).integers(len(pooled), size=(_RESAMPLES, len(pooled)))
    means = pooled[draws].mean(axis=1)
    percentiles = _PERCENTILES[version]
    low, high = np.percentile(means, percentiles)
    value = pooled.mean() if version == "v0.1" else means.mean()
    method = "bootstrap of battles, {:g} to {:g}%".format(*percentiles)
    return Interval(100 * float(value), 100 * float(low), 100 * float(high), len(prompts), method)


def score_over_prompts(prompts: Sequence[Sequence[float]]) -> Interval:
    """Compute the mean outcome in percent, with a 95% interval that treats each prompt as one observation.

    ``prompts`` holds the outcomes, in [0, 1], of each prompt's battles, at least one per prompt.
    """
    means, counts = [float(np.mean(outcomes)) for outcomes in prompts], [len(outcomes) for outcomes in prompts]
    score = share_interval(means, counts)
    low, high = (None if bound is None else 100 * bound for bound in (score.low, score.high))
    return Interval(100 * score.value, low, high, score.n, f"over prompts: {score.method}")


# ---- Arena-Hard's style control: the score the model would have if its answers had the baseline's style.

_CODE = re.compile(r"```[^`]*```")
_HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
_LISTS = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def style_of(text: str, length: int | None = None) -> tuple[int, ...]:
    """Return an answer's length and its counts of headers, list items and bold passages outside code blocks.

    The length is ``length`` if given, otherwise the number of characters.
    """
    prose = _CODE.sub("", text)
    counts = (len(pattern.findall(prose)) for pattern in (_HEADERS, _LISTS, _BOLD))
    return len(text) if length is None else length, *counts


def style_differences(model: Sequence[tuple[int, ...]], baseline: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return features ``[N, 4]``: relative differences in length and in header, list and bold-text density."""
    ours, theirs = (np.array(styles, dtype=np.float64) for styles in (model, baseline))
    total = ours[:, :1] + theirs[:, :1]
    length = np.divide(ours[:, :1] - theirs[:, :1], total, out=np.zeros_like(total), where=total > 0)
    mine, other = (counts[:, 1:] / (counts[:, :1] + 1) for counts in (ours, theirs))
    return np.hstack([length, (mine - other) / (mine + other + 1)])


def style_controlled_score(outcomes: np.ndarray, features: np.ndarray) -> float:
    """Estimate the score in percent at equal style; NaN if style alone determines the outcomes.

    The model's Bradley-Terry strength and the effects of style are fitted jointly.

    Args:
        outcomes: outcomes of the model's battles, ``[N]``, in [0, 1].
        features: style differences from :func:`style_differences`, ``[N, 4]``.
    """
    features = features[:, np.ptp(features, axis=0) > 0]  # drop constant features
    mean, deviation = features.mean(axis=0), features.std(axis=0, ddof=1)
    x = np.column_stack([np.ones(len(outcomes)), (features - mean) / deviation])
    w = fit_logistic(x, outcomes)
    if not is_determined(x, w):
        return math.nan
    return 100 * float(expit(w[0] - w[1:] @ (mean / deviation)))
