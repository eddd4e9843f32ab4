"""``simpo annotate``: scores sampled responses; can be killed and resumed at any time."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simpo.client import Prices, confirm_cost
from simpo.data.inspection import AnswerSet, diversity_metrics, score_metrics
from simpo.data.messages import context_of, read_messages
from simpo.data.rows import BadRow, check_unicode
from simpo.errors import SimpoError
from simpo.judging.protocol import Answers, Prompt, Scorer, ThinkingFilter, check_scores
from simpo.judging.registry import count_unscored, make_annotator
from simpo.judging.settings import Annotator, JudgeOptions, Normalization, annotator_names
from simpo.runs.files import JsonLines, read_lines, write_lines
from simpo.runs.folder import RunFolder
from simpo.runs.results import Metric, fingerprint
from simpo.runs.terminal import interruptible

RESPONSES, FILE_NAME, BEST = "responses.jsonl", "annotated.jsonl", "best.jsonl"
_PROMPTS_PER_PART = 256  # prompts scored and stored at a time

Record = dict[str, Any]


def annotate(
    responses: Path,
    annotator: Annotator,
    options: JudgeOptions,
    folder: Path,
    *,
    normalization: Normalization | None = None,
    prices: Prices | None = None,
    yes: bool = False,
    argv: Sequence[str] = (),
) -> Path:
    """Score every response and write ``annotated.jsonl``, ``best.jsonl`` and ``results.json``.

    Repeating the call resumes an interrupted or killed run and produces the same bytes; a finished run is left alone.

    Args:
        responses: the ``responses.jsonl`` written by ``simpo sample``, or its folder.
        annotator: the name of an annotator, or several names with weights; see
            :func:`~simpo.judging.registry.make_annotator`.
        options: options for the annotators.
        folder: the run folder.
        normalization: how scores are normalized if there are several annotators.
        prices: token prices of an API judge, if known.
        yes: skip the question about the cost.
        argv: the command-line arguments, for the run's record.

    Returns:
        The path of ``results.json``.

    Raises:
        InterruptedRun: the user stopped the run; the scores so far are kept.
    """
    with interruptible(), RunFolder(folder, command="annotate") as run:
        records = read_responses(responses)
        # The annotator's own progress would restart with every part; _score logs progress over all prompts.
        scorer = make_annotator(annotator, replace(options, log=lambda line: None), normalization)
        run.log(f"annotator: {', '.join(annotator_names(annotator, normalization))}; {len(records):,} prompts")
        identity = {"responses": fingerprint(records), **scorer.identity}
        identity |= {"strip_thinking": True} if options.strip_thinking else {}
        thinking_filter = ThinkingFilter(options.strip_thinking)
        rows = [_answers(row, thinking_filter) for row in records]
        if not run.finished:
            scorer.check(rows)
            scorer.prepare()
            if scorer.usage is not None:
                confirm_cost(scorer.estimate(rows), yes=yes, log=run.log, prices=prices)
        run.begin(identity, argv=argv)
        # The leading dot keeps the file out of the manifest.
        parts = JsonLines(folder / ".scores.jsonl", checked=True)

        def score() -> list[Metric]:
            thinking = thinking_filter.metrics("annotate/", run.log)
            _score(scorer, rows, parts, run)
            if scorer.usage is not None:
                run.log(scorer.usage.line(prices))
            return _write(records, parts, folder) + thinking

        results = run.complete(score)
        parts.path.unlink()
    return results


def read_responses(path: Path) -> list[Record]:
    """Read the rows ``{id, prompt, responses, ...}`` that ``simpo sample`` wrote to a file or run folder."""
    path = path / RESPONSES if path.is_dir() else path
    records = read_lines(path)
    if not records:
        raise SimpoError(f"{path}: no rows")
    for number, record in enumerate(records, start=1):
        checked_prompt(record, f"{path}:{number}")
        try:
            check_unicode(json.dumps(record, ensure_ascii=False))
        except BadRow as error:
            raise SimpoError(f"{path}:{number}: {error}") from error
    return records


def checked_prompt(record: Record, where: str) -> Prompt:
    """Validate a row ``{id, prompt, responses, ...}`` and return its prompt; raises :class:`SimpoError` if invalid."""
    prompt, responses = record.get("prompt"), record.get("responses")
    for key, kind, expected in (("id", str, "text"), ("prompt", str | list, "text or messages")):
        if not isinstance(record.get(key), kind):
            got = reprlib.repr(record.get(key))
            raise SimpoError(
                f"{where}: {key}: expected {expected}, got {got}; use a file written by simpo sample ({RESPONSES})"
            )
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        raise SimpoError(f"{where}: responses: expected one or more texts")
    if not isinstance(record.get("extra", {}), dict):
        raise SimpoError(f"{where}: extra: expected a mapping of the row's other columns")
    try:
        context_of(record)
        return prompt if isinstance(prompt, str) else read_messages(prompt, "prompt")
    except BadRow as error:
        raise SimpoError(f"{where}: {error.reason}") from error


def _answers(row: Record, thinking_filter: ThinkingFilter) -> Answers:
    texts = [thinking_filter(text) for text in row["responses"]]
    return Answers(row["id"], row["prompt"], texts, context_of(row), row.get("extra", {}), str(row.get("where") or ""))


def _score(scorer: Scorer, rows: Sequence[Answers], parts: JsonLines, run: RunFolder) -> None:
    """Score the rows that are not in ``parts`` yet; part boundaries do not depend on where an earlier run stopped."""
    done = {part["start"]: len(part["scores"]) for part in parts}
    scored = sum(done.values())
    if scored:
        run.log(f"continuing: {scored:,} of {len(rows):,} prompts are done")
    usage, judge = scorer.usage, str(scorer.identity["judge"])
    for start in range(0, len(rows), _PROMPTS_PER_PART):
        if start in done:
            continue
        part = rows[start : start + _PROMPTS_PER_PART]
        before = usage.default_temperature if usage else 0
        scores = scorer.score(part)
        for name, given in {judge: scores, **scorer.parts}.items():
            check_scores(given, part, name)
        by_annotator = {"annotator_scores": scorer.parts} if scorer.parts else {}
        changed = usage.default_temperature - before if usage else 0
        parts.append([{"start": start, "scores": scores, **by_annotator, "default_temperature": changed}])
        scored += len(part)
        run.log(f"{scored:,} of {len(rows):,} prompts scored")
    if missing := sum(score is None for part in parts for given in part["scores"] for score in given):
        answers = sum(len(row.responses) for row in rows)
        run.log(f"note: {missing:,} of {answers:,} answers have no score")


def _write(records: Sequence[Record], parts: Iterable[Record], folder: Path) -> list[Metric]:
    """Write all responses with their scores and, separately, the best-scored response to every prompt."""
    parts = sorted(parts, key=lambda part: part["start"])  # recomputed parts are stored out of order
    scores = [given for part in parts for given in part["scores"]]
    annotated = [{**record, "scores": given} for record, given in zip(records, scores, strict=True)]
    missing: Counter[str] = Counter()
    for part in parts:
        by_annotator = part.get("annotator_scores", {})
        missing.update(count_unscored(by_annotator))
        for row, given in enumerate(zip(*by_annotator.values(), strict=True), start=part["start"]):
            annotated[row]["annotator_scores"] = dict(zip(by_annotator, given, strict=True))
    best = []
    for record in annotated:
        known = [score for score in record["scores"] if score is not None]
        if known:
            copied = ("id", "prompt", "tools", "chat_template_kwargs", "extra")
            index = record["scores"].index(max(known))  # the first one in case of ties
            chosen = {"responses": [record["responses"][index]], "scores": [max(known)]}
            best.append({key: record[key] for key in copied if key in record} | chosen)
    write_lines(folder / FILE_NAME, annotated)
    write_lines(folder / BEST, best)
    sets = [AnswerSet(record["responses"], record["scores"]) for record in annotated]
    unscored = [Metric(f"annotate/unscored/{name}", count) for name, count in missing.items()]
    metrics = diversity_metrics("annotate", sets) + score_metrics("annotate", sets) + unscored
    if count := sum(part.get("default_temperature", 0) for part in parts):
        metrics.append(Metric("annotate/judged_at_default_temperature", count))
    return metrics
