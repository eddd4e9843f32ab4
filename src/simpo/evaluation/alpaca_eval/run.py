"""The workflow behind ``simpo evaluate alpaca_eval``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo.client import ChatReply, ChatRequest
from simpo.errors import SimpoError
from simpo.evaluation.alpaca_eval.baselines import LengthControl
from simpo.evaluation.alpaca_eval.figures import figures
from simpo.evaluation.alpaca_eval.files import (
    Annotation,
    Match,
    Output,
    match_outputs,
    read_annotations,
    read_outputs,
    write_annotations,
    write_outputs,
)
from simpo.evaluation.alpaca_eval.judge import LEAST_MASS, PairwisePrompt, preferences
from simpo.evaluation.answers import Answerer
from simpo.evaluation.asking import ApiJudge, Say
from simpo.evaluation.once import measure_once
from simpo.evaluation.rows import file_digest
from simpo.judges.shown import Shown
from simpo.results import Metric
from simpo.runs.folder import RunFolder

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

    def annotate(self, matches: Sequence[Match], say: Say) -> list[Annotation]:
        """The judge's preference in every match; one without enough probability on the names of the answers has none.

        Raises:
            SimpoError: the judge cannot be asked, or never gives the log-probabilities that are to be weighed.
        """
        replies = self.judge.ask_some(self.requests(matches), say, self._check_first if self.weighted else None)
        found = preferences(matches, replies, weighted=self.weighted)
        unsure = sum(
            bool(reply and reply.first_token_logprobs) and math.isnan(p)
            for reply, p in zip(replies, found, strict=True)
        )
        if self.weighted and unsure:
            say(
                f"note: {unsure} replies have a probability below {LEAST_MASS} of naming an answer, and are no "
                "verdicts; a judge that thinks first needs --plain and --judge_max_tokens"
            )
        cut = sum(bool(reply and reply.cut_off) and math.isnan(p) for reply, p in zip(replies, found, strict=True))
        if not self.weighted and cut:
            say(
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
        baselines = length_control.read(len(reference), run.say)  # before anything is sent
        run.begin(benchmark.identity() | length_control.identity() | identity, argv=argv, accept_changes=None)

        def measure() -> list[Metric]:
            matches = _sampled(benchmark, reference, answers, run) if isinstance(answers, Answerer) else ready
            assert matches is not None
            write_outputs(folder / OUTPUTS, matches)
            show = Shown(benchmark.judge.strip_thinking)
            shown = [replace(one, output_1=show(one.output_1), output_2=show(one.output_2)) for one in matches]
            thinking = show.metrics("alpaca_eval/", run.say)
            annotations = benchmark.annotate(shown, run.say)
            write_annotations(folder / ANNOTATIONS, annotations)
            return figures(annotations, baselines, run.say) + thinking + benchmark.judge.metrics("alpaca_eval")

        return measure_once(run, measure)


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
        baselines = length_control.read(len(rows), run.say)
        run.begin(identity | length_control.identity(), argv=argv, accept_changes=None)
        return measure_once(run, lambda: figures(rows, baselines, run.say))


def _sampled(benchmark: AlpacaEval, reference: Sequence[Output], answerer: Answerer, run: RunFolder) -> list[Match]:
    """The model's answers, once the user has agreed to what judging them may cost."""
    if not (run.path / OUTPUTS).exists():
        expected = _matches(reference, answerer.name, [answerer.stand_in()] * len(reference))
        benchmark.judge.agree_beforehand(benchmark.requests(expected), run.say)
    texts = answerer.answer([output.instruction for output in reference], run.path / "answers")
    return _matches(reference, answerer.name, texts)


def _matches(reference: Sequence[Output], name: str, texts: Sequence[str]) -> list[Match]:
    return [
        Match(output.instruction, output.dataset, output.output, output.generator, text, name)
        for output, text in zip(reference, texts, strict=True)
    ]
