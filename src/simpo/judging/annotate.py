"""The workflow behind ``simpo annotate``: responses in, the same with scores out, however often it was killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo.client import Prices, Usage, confirm_cost
from simpo.data.context import context_of
from simpo.data.inspection import AnswerSet, diversity_metrics, score_metrics
from simpo.data.messages import read_messages
from simpo.data.rows import BadRow
from simpo.errors import SimpoError
from simpo.generation.thinking import split_thinking
from simpo.judging.models import ModelScorer
from simpo.judging.pairwise import TournamentScorer
from simpo.judging.protocol import Annotator, Answers, check_scores
from simpo.judging.registry import JudgeOptions, make_annotator
from simpo.runs.folder import RunFolder
from simpo.runs.lines import JsonLines, read_lines, write_lines
from simpo.runs.results import Metric, fingerprint
from simpo.runs.signals import stoppable

# ---- The answers that judges are shown: as they are, or without the thinking that they begin with.


class Shown:
    """Gives the text of an answer that judges are shown, and counts the thinking in all answers."""

    def __init__(self, strip_thinking: bool) -> None:
        self._strip = strip_thinking
        self._answers = self._thinking = self._endless = 0

    def __call__(self, answer: str) -> str:
        """The answer, or what follows its thinking."""
        thinking, rest = split_thinking(answer)
        self._answers += 1
        self._thinking += bool(thinking)
        self._endless += bool(thinking) and not rest
        return rest if self._strip else answer

    def metrics(self, name: str, log: Callable[[str], None]) -> list[Metric]:
        """How many answers had thinking, how many of them nothing else, and from how many it was removed; or nothing.

        Args:
            name: what the figures' names begin with.
            log: called with a line if there was thinking.
        """
        if not self._thinking:
            return []
        done = "judges are not shown it" if self._strip else "judges are shown it: --strip_thinking removes it"
        log(f"note: {self._thinking:,} of {self._answers:,} answers begin with thinking; {done}")
        counts = {"with_thinking": self._thinking, "without_end_of_thinking": self._endless}
        counts |= {"stripped_of_thinking": self._thinking * self._strip}
        return [Metric(f"{name}answers_{key}", count, n=self._answers) for key, count in counts.items()]


RESPONSES, FILE_NAME, BEST = "responses.jsonl", "annotated.jsonl", "best.jsonl"


_AT_ONCE = 256  # prompts that are scored, and stored, together


Record = dict[str, Any]


Scores = list[float | None]


@dataclass(frozen=True)
class AnnotateArguments:
    """What is scored, and by whom.

    Attributes:
        responses: ``responses.jsonl`` of ``simpo sample``, or its folder.
        annotator: its name, as :func:`simpo.judging.registry.make_annotator` takes it.
        options: what it may need.
        prices: of an API judge's tokens, where they are known.
        yes: whether the user agrees to its cost beforehand.
    """

    responses: Path
    annotator: str
    options: JudgeOptions
    prices: Prices | None = None
    yes: bool = False


def annotate(arguments: AnnotateArguments, folder: Path, *, argv: Sequence[str] = ()) -> Path:
    """Score every response and write ``annotated.jsonl``, ``best.jsonl`` and ``results.json``.

    A run that was interrupted or killed is continued by the same call and ends with the same bytes; one that is
    finished is left as it is.

    Args:
        arguments: what is scored, and by whom.
        folder: the run's folder.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, the annotator gave something else than numbers, or the
            user does not agree to what it costs.
        InterruptedRun: the user stopped it; what was scored is kept.
    """
    with stoppable(), RunFolder(folder, command="annotate") as run:
        records = read_responses(arguments.responses)
        # Its own lines would come again with every part; the ones here say how far it is.
        annotator = make_annotator(arguments.annotator, replace(arguments.options, log=lambda line: None))
        run.log(f"annotator: {arguments.annotator}; {len(records):,} prompts")
        identity = {"responses": fingerprint(records), **annotator.identity}
        identity |= {"strip_thinking": True} if arguments.options.strip_thinking else {}
        if isinstance(annotator, ModelScorer) and not run.finished:
            annotator.open()  # before begin(): a model that cannot be loaded leaves no folder behind
        run.begin(identity, argv=argv)
        kept = JsonLines(folder / ".scores.jsonl")  # the manifest does not list names with a leading dot

        def score() -> list[Metric]:
            show = Shown(arguments.options.strip_thinking)
            rows = [
                Answers(row["id"], row["prompt"], [show(text) for text in row["responses"]], context_of(row))
                for row in records
            ]
            thinking = show.metrics("annotate/", run.log)
            _score(annotator, rows, kept, arguments, run)
            scores = [scores for part in kept for scores in part["scores"]]
            metrics = _write(records, scores, folder) + thinking
            if count := sum(part.get("default_temperature", 0) for part in kept):
                metrics.append(Metric("annotate/judged_at_default_temperature", count))
            return metrics

        results = run.complete(score)
        kept.path.unlink()
    return results


def read_responses(path: Path) -> list[Record]:
    """The rows ``{id, prompt, responses}`` of ``simpo sample``, with whatever else they have.

    Args:
        path: the file, or the run's folder.

    Raises:
        SimpoError: it cannot be read, is empty, or a row is not such; names the line.
    """
    path = path / RESPONSES if path.is_dir() else path
    records = read_lines(path)
    if not records:
        raise SimpoError(f"{path}: no rows")
    for number, record in enumerate(records, start=1):
        responses = record.get("responses")
        if not isinstance(record.get("id"), str) or not isinstance(record.get("prompt"), str | list):
            raise SimpoError(f"{path}:{number}: no id and prompt; give what simpo sample leaves ({RESPONSES})")
        _check_prompt(record, f"{path}:{number}")
        if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
            raise SimpoError(f"{path}:{number}: responses: expected one or more texts")
    return records


def _check_prompt(record: Record, where: str) -> None:
    try:
        context_of(record)
        if isinstance(record["prompt"], list):
            read_messages(record["prompt"], "prompt")
    except BadRow as error:
        raise SimpoError(f"{where}: {error}") from error


def _score(
    annotator: Annotator, rows: Sequence[Answers], kept: JsonLines, arguments: AnnotateArguments, run: RunFolder
) -> None:
    """Score what is not there yet, in parts that do not depend on where a former run stopped."""
    if done := sum(len(part["scores"]) for part in kept):
        run.log(f"continuing: {done:,} of {len(rows):,} prompts are scored")
    if isinstance(annotator, TournamentScorer):
        confirm_cost(annotator.estimate(rows), yes=arguments.yes, log=run.log, prices=arguments.prices)
    usage = annotator.usage if isinstance(annotator, TournamentScorer) else Usage()
    for start in range(done, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        before = usage.default_temperature
        scores = annotator.score(part)
        # No verdict is no score, and not a mistake of the annotator's.
        numbers = [[0.0 if score is None else score for score in given] for given in scores]
        check_scores(numbers, part, str(annotator.identity["judge"]))
        kept.append([{"scores": scores, "default_temperature": usage.default_temperature - before}])
        run.log(f"{start + len(part):,} of {len(rows):,} prompts scored")
    if isinstance(annotator, TournamentScorer):
        run.log(usage.line(arguments.prices))


def _write(records: Sequence[Record], scores: Sequence[Scores], folder: Path) -> list[Any]:
    """Write all responses with their scores and the best of every prompt; the figures."""
    annotated = [{**record, "scores": given} for record, given in zip(records, scores, strict=True)]
    best = [row for record in annotated if (row := _best(record)) is not None]
    write_lines(folder / FILE_NAME, annotated)
    write_lines(folder / BEST, best)
    sets = [AnswerSet(record["responses"], record["scores"]) for record in annotated]
    return diversity_metrics("annotate", sets) + score_metrics("annotate", sets)


def _best(record: Record) -> Record | None:
    """The prompt with its best answer alone, of equal ones the first; None if none has a score."""
    scores = [score for score in record["scores"] if score is not None]
    if not scores:
        return None
    place = record["scores"].index(max(scores))
    return {key: record[key] for key in ("id", "prompt", "tools", "chat_template_kwargs") if key in record} | {
        "responses": [record["responses"][place]],
        "scores": [max(scores)],
    }
