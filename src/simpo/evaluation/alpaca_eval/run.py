"""``simpo evaluate alpaca_eval``: answers, judge, metrics."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from simpo.client import ChatReply, ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.alpaca_eval.files import (
    Annotation,
    LengthControl,
    Match,
    Output,
    match_outputs,
    read_annotations,
    read_outputs,
    write_annotations,
    write_outputs,
)
from simpo.evaluation.alpaca_eval.win_rate import Baselines, length_controlled, win_rate
from simpo.evaluation.answers import Answerer, ApiJudge
from simpo.evaluation.rows import file_digest
from simpo.generation.thinking import after_thinking
from simpo.judging.presentation import ShownAnswers, fill, read_prompt_file
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric
from simpo.statistics import share_bounds

# ---- Annotations -> the leaderboard's figures.


def figures(annotations: Sequence[Annotation], baselines: Baselines | None, log: Log) -> list[Metric]:
    """The leaderboard's figures under its names, and how many answers were empty or got no preference.

    Intervals are those of 1.96 standard errors, kept within 0 to 100: of the mean for the win rate, and of the mean of
    the predicted preferences for the length-controlled one. There are difficulties of all instructions.
    """
    found = np.array([annotation.preference for annotation in annotations])
    unparsed = int(np.isnan(found).sum())
    ours = [annotation.match.output_2 for annotation in annotations]
    empty = sum(not text.strip() for text in ours)
    if unparsed:
        log(f"note: {unparsed} of {len(found)} answers got no preference and are left out")
    if empty:
        log(f"note: {empty} of {len(found)} answers are empty; they were judged like any other")
    judged = unparsed < len(found)
    return [
        *(_controlled(annotations, found, baselines) if judged and baselines is not None else ()),
        *(_raw(found) if judged else [Metric("alpaca_eval/win_rate", None, n=0)]),
        Metric("alpaca_eval/avg_length", int(np.mean([len(text) for text in ours])), n=len(found)),
        Metric("alpaca_eval/without_preference", unparsed, n=len(found)),
        Metric("alpaca_eval/empty_answers", empty, n=len(found)),
    ]


def _raw(found: np.ndarray) -> list[Metric]:
    raw = win_rate(found)
    return [
        _metric("win_rate", raw.win_rate, raw.standard_error, raw.n),
        Metric("alpaca_eval/standard_error", raw.standard_error, n=raw.n),
        Metric("alpaca_eval/discrete_win_rate", raw.discrete_win_rate, n=raw.n),
        Metric("alpaca_eval/n_wins", raw.wins, n=raw.n),
        Metric("alpaca_eval/n_draws", raw.draws, n=raw.n),
        Metric("alpaca_eval/n_wins_base", raw.losses, n=raw.n),
    ]


def _controlled(annotations: Sequence[Annotation], found: np.ndarray, baselines: Baselines) -> list[Metric]:
    theirs, ours = (
        np.array([len(text) for text in texts])
        for texts in zip(*((row.match.output_1, row.match.output_2) for row in annotations), strict=True)
    )
    controlled = length_controlled(found, theirs, ours, baselines)
    return [
        _metric("length_controlled_winrate", controlled.win_rate, controlled.standard_error, len(found)),
        Metric("alpaca_eval/lc_standard_error", controlled.standard_error, n=len(found)),
    ]


def _metric(name: str, value: float, error: float, n: int) -> Metric:
    if math.isnan(error):
        return Metric(f"alpaca_eval/{name}", value, n=n)
    low, high = share_bounds(value / 100, 1.96 * error / 100)
    return Metric(f"alpaca_eval/{name}", value, None, n, 100 * low, 100 * high, "Wilson, 1.96 standard errors")


# ---- The pairwise judge: which answer is shown first, what is asked, and what the reply means.


_SHIPPED = resources.files("simpo.evaluation") / "prompts" / "alpaca_eval.txt"


_PLACES = ("instruction", "output_1", "output_2")


_SECTION = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


_FIRST, _SECOND = "m", "M"  # the names of the answers in the order in which they are shown


_TOP_LOGPROBS = 5


# Probability that the first token must have of being one of the names: more likely than not, the judge is answering.
LEAST_MASS = 0.5


_SEED = 0


def switched(instruction: str) -> bool:
    """Whether the model's answer is shown first; drawn from the instruction, as the benchmark draws it."""
    # The benchmark draws in exactly this way; nothing is guarded by it.
    return random.Random(f"is_switched_outputs{instruction}{_SEED}").choices([False, True])[0]  # noqa: S311


class PairwisePrompt:
    """A judge prompt with places ``{instruction}``, ``{output_1}`` and ``{output_2}``.

    Messages are marked ``<|im_start|>role ... <|im_end|>``, as in the benchmark's own file, which can be read; without
    marks the text is one user message.

    Attributes:
        digest: SHA-256 of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the user's file or, for None, the one that comes with the package.

        Raises:
            SimpoError: it cannot be read, or lacks a place.
        """
        text, self.digest = read_prompt_file(path, _SHIPPED, _PLACES)
        marked = _SECTION.findall(text) or [("user", text.strip())]
        if _SECTION.search(text) and _SECTION.sub("", text).strip():
            raise SimpoError(
                f"{path}: the judge prompt has text outside its messages (<|im_start|>role ... <|im_end|>)"
            )
        for role, _ in marked:
            if role not in ("system", "user", "assistant"):
                raise SimpoError(f"{path}: {role!r} is not a role; use system, user or assistant")
        self._messages = [{"role": role, "content": content} for role, content in marked]

    def request(self, match: Match, *, weighted: bool) -> ChatRequest:
        """What the judge is asked about a match, in the order in which it is shown.

        The weighted judge writes one token, whose alternatives are weighed; the plain one is greedy.
        """
        shown = (match.output_2, match.output_1) if switched(match.instruction) else (match.output_1, match.output_2)
        values = {"instruction": match.instruction, "output_1": shown[0], "output_2": shown[1]}
        messages = [message | {"content": fill(message["content"], values)} for message in self._messages]
        if weighted:
            return ChatRequest(messages, max_tokens=1, temperature=1.0, top_logprobs=_TOP_LOGPROBS)
        return ChatRequest(messages, max_tokens=1)


def preferences(matches: Sequence[Match], replies: Sequence[ChatReply | None], *, weighted: bool) -> list[float]:
    """The preference in [1, 2] for each match, 2 where the model's answer wins; NaN where the judge gave none.

    Args:
        matches: what was judged.
        replies: the judge's; None where the answers are identical, which is a draw.
        weighted: whether the first token's log-probabilities are weighed.
    """
    found = []
    for match, reply in zip(matches, replies, strict=True):
        if reply is None:
            found.append(1.5)
            continue
        shown = weighed(reply.first_token_logprobs) if weighted else named(reply.text)
        found.append(3 - shown if switched(match.instruction) else shown)
    return found


def weighed(logprobs: dict[str, float] | None) -> float:
    """``2 - P(m) / (P(m) + P(M))`` over the first token; a name that is not among the likeliest counts 0.

    NaN where the two together have a probability below :data:`LEAST_MASS`: the judge was about to write something else.
    Where the names alone have less, they count with white space around them as well.
    """
    for strip in ("", None):  # nothing, then white space
        first, second = (
            sum(math.exp(logprob) for token, logprob in (logprobs or {}).items() if token.strip(strip) == name)
            for name in (_FIRST, _SECOND)
        )
        if first + second >= LEAST_MASS:
            return 2 - first / (first + second)
    return math.nan


def named(text: str) -> float:
    """1 or 2 for the name that the judge wrote after any thinking; NaN where it wrote neither."""
    return {_FIRST: 1.0, _SECOND: 2.0}.get((after_thinking(text) or "").strip(), math.nan)


OUTPUTS, ANNOTATIONS = "model_outputs.json", "annotations.json"


@dataclass(frozen=True)
class AlpacaEval:
    """The benchmark with a judge.

    Attributes:
        judge: compares the answers.
        prompt: what it is asked.
        reference: the instructions and the baseline's outputs.
        weighted: whether the judge's first token is weighed by its log-probabilities.
    """

    judge: ApiJudge
    prompt: PairwisePrompt
    reference: Path
    weighted: bool = True

    @property
    def annotator(self) -> str:
        """What annotations call the judge."""
        return f"{'weighted' if self.weighted else 'plain'}_{self.judge.name}"

    def identity(self) -> dict[str, Any]:
        """What determines the verdicts on given answers."""
        return {
            "benchmark": "alpaca_eval",
            "reference_outputs": file_digest(self.reference),
            **self.judge.identity,
            "judge_prompt": self.prompt.digest,
            "weighted": self.weighted,
        }

    def requests(self, matches: Sequence[Match]) -> list[ChatRequest | None]:
        """What the judge is asked about every match; identical answers are a draw, and nothing is asked."""
        return [
            None if match.output_1 == match.output_2 else self.prompt.request(match, weighted=self.weighted)
            for match in matches
        ]

    def annotate(self, matches: Sequence[Match], log: Log) -> list[Annotation]:
        """The judge's preference in every match; one without enough probability on the names of the answers has none.

        Raises:
            SimpoError: the judge cannot be asked, or never gives the log-probabilities that are to be weighed.
        """
        replies = self.judge.ask_some(self.requests(matches), log, self._check_first if self.weighted else None)
        found = preferences(matches, replies, weighted=self.weighted)
        unsure = sum(
            bool(reply and reply.first_token_logprobs) and math.isnan(p)
            for reply, p in zip(replies, found, strict=True)
        )
        if self.weighted and unsure:
            log(
                f"note: {unsure} replies have a probability below {LEAST_MASS} of naming an answer, and are no "
                "verdicts; a judge that thinks first needs --plain and --judge_max_tokens"
            )
        cut = sum(bool(reply and reply.cut_off) and math.isnan(p) for reply, p in zip(replies, found, strict=True))
        if not self.weighted and cut:
            log(
                f"note: {cut} replies were cut off before they named an answer; a judge that thinks first needs a "
                "higher --judge_max_tokens"
            )
        texts = [None if reply is None else reply.text for reply in replies]
        return [
            Annotation(match, self.annotator, preference, text)
            for match, preference, text in zip(matches, found, texts, strict=True)
        ]

    def _check_first(self, replies: Sequence[ChatReply]) -> None:
        if not any(reply.first_token_logprobs for reply in replies):
            raise SimpoError(
                f"{self.judge.client.endpoint.base_url}: the server gives no log-probabilities; "
                "use one that does, and another --cache, or the judge without them: --plain"
            )


def evaluate_alpaca_eval(
    benchmark: AlpacaEval,
    answers: Answerer | Path,
    length_control: LengthControl,
    folder: Path,
    *,
    argv: Sequence[str] = (),
) -> Path:
    """Answer, judge and count; a run that was stopped is continued by the same call.

    Args:
        benchmark: with its judge.
        answers: a model, or a file of its outputs.
        length_control: for the length-controlled win rate.
        folder: the run's; gets ``model_outputs.json``, ``annotations.json`` and ``results.json``.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or a request finally failed.
    """
    with RunFolder(folder, command="evaluate") as run:
        reference = read_outputs(benchmark.reference)
        ready = match_outputs(reference, read_outputs(answers), str(answers)) if isinstance(answers, Path) else None
        identity = {"outputs": file_digest(answers)} if isinstance(answers, Path) else answers.identity()
        baselines = length_control.read(len(reference), run.log)  # before anything is sent
        run.begin(benchmark.identity() | length_control.identity() | identity, argv=argv)

        def measure() -> list[Metric]:
            matches = _sampled(benchmark, reference, answers, run) if isinstance(answers, Answerer) else ready
            assert matches is not None
            write_outputs(folder / OUTPUTS, matches)
            show = ShownAnswers(benchmark.judge.strip_thinking)
            shown = [replace(one, output_1=show(one.output_1), output_2=show(one.output_2)) for one in matches]
            thinking = show.metrics("alpaca_eval/", run.log)
            annotations = benchmark.annotate(shown, run.log)
            write_annotations(folder / ANNOTATIONS, annotations)
            return figures(annotations, baselines, run.log) + thinking + benchmark.judge.metrics("alpaca_eval")

        return run.complete(measure)


def recount_alpaca_eval(
    annotations: Path, length_control: LengthControl, folder: Path, *, argv: Sequence[str] = ()
) -> Path:
    """The figures of existing annotations; nothing is judged.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: a file cannot be used.
    """
    with RunFolder(folder, command="evaluate") as run:
        rows = read_annotations(annotations)
        identity = {
            "benchmark": "alpaca_eval",
            "annotations": file_digest(annotations),
            "judge": ", ".join(sorted({row.annotator for row in rows})),
        }
        baselines = length_control.read(len(rows), run.log)
        run.begin(identity | length_control.identity(), argv=argv)
        return run.complete(lambda: figures(rows, baselines, run.log))


def _sampled(benchmark: AlpacaEval, reference: Sequence[Output], answerer: Answerer, run: RunFolder) -> list[Match]:
    """The model's answers, once the user has agreed to what judging them may cost."""
    if not (run.path / OUTPUTS).exists():
        expected = _matches(reference, answerer.name, [answerer.stand_in()] * len(reference))
        benchmark.judge.agree_beforehand(benchmark.requests(expected), run.log)
    texts = answerer.answer([output.instruction for output in reference], run.path / "answers")
    return _matches(reference, answerer.name, texts)


def _matches(reference: Sequence[Output], name: str, texts: Sequence[str]) -> list[Match]:
    return [
        Match(output.instruction, output.dataset, output.output, output.generator, text, name)
        for output, text in zip(reference, texts, strict=True)
    ]
