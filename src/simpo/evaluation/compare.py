"""The workflow behind ``simpo compare``: two models or their answers, and judges that say which one is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo.client import Prices
from simpo.evaluation.contenders import Contender, SampledWith, contenders
from simpo.evaluation.differences import write_differences, write_verdicts
from simpo.evaluation.head_to_head import (
    Contest,
    match_answers,
    meetings,
    read_contests,
    sampled_metrics,
    text_metrics,
)
from simpo.evaluation.judging import agree_to, judge_pairs, make_judges, order_metrics
from simpo.evaluation.once import measure_once
from simpo.evaluation.preferences import preference_metrics
from simpo.judges.protocol import Judge
from simpo.judges.registry import JudgeOptions
from simpo.judges.shown import Shown
from simpo.results import Metric
from simpo.runs.folder import RunFolder
from simpo.runs.signals import stoppable

VERDICTS, DIFFERENCES = "verdicts.jsonl", "differences.md"

Say = Callable[[str], None]


@dataclass(frozen=True)
class CompareArguments:
    """What is compared, and by whom.

    Attributes:
        a: the model, or its answers, whose win rate is measured.
        b: what it is compared with.
        sampled: how models answer.
        judges: names as :func:`simpo.judges.registry.make_judge` takes them.
        options: what judges need.
        prices: of the API judge's tokens, where they are known.
        yes: whether the user agrees to its cost beforehand.
    """

    a: str
    b: str
    sampled: SampledWith
    judges: Sequence[str]
    options: JudgeOptions
    prices: Prices | None = None
    yes: bool = False


def compare(arguments: CompareArguments, folder: Path, *, argv: Sequence[str] = ()) -> Path:
    """Sample what is to be sampled, judge every answer of the one against every answer of the other, count.

    What an API judge may cost is agreed to before anything is sampled. Writes ``verdicts.jsonl``, ``differences.md``
    and ``results.json``. A run that was killed is continued by the same call: samples are in the folder, replies of an
    API in its cache; other judges judge again.

    Args:
        arguments: what is compared, and by whom.
        folder: the run's folder.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: something that the user gave cannot be used, or the user does not agree to what a judge costs.
        InterruptedRun: the user stopped it.
    """
    with stoppable("interrupted; the same command continues"), RunFolder(folder, command="compare") as run:
        sides = contenders(arguments.a, arguments.b, arguments.sampled)
        judges = make_judges(arguments.judges, replace(arguments.options, say=run.say))
        run.begin(_identity(sides, judges, arguments), argv=argv, accept_changes=None)

        def measure() -> list[Metric]:
            pairs, _ = meetings(_expected(sides, arguments, folder))
            agree_to(judges, pairs, yes=arguments.yes, prices=arguments.prices, say=run.say)
            files = [side.answers(folder / name, run.say) for name, side in zip("ab", sides, strict=True)]
            return _compare(read_contests(*files), judges, arguments, folder, run.say)

        return measure_once(run, measure)


def _identity(
    sides: tuple[Contender, Contender], judges: Mapping[str, Judge], arguments: CompareArguments
) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": arguments.sampled.settings.seed}
    for name, side in zip("ab", sides, strict=True):
        found |= {f"{name}/{key}": value for key, value in side.identity.items()}
    found |= {"strip_thinking": True} if arguments.options.strip_thinking else {}
    for name, judge in judges.items():
        found |= {f"judge {name}/{key}": value for key, value in judge.identity.items()}
    return found


def _expected(sides: tuple[Contender, Contender], arguments: CompareArguments, folder: Path) -> list[Contest]:
    """What will be judged, with answers that are not there yet as long as they may be; that it can be shows here."""
    a, b = (side.expected(folder / name) for name, side in zip("ab", sides, strict=True))
    return match_answers(a, b, f"{arguments.a} and {arguments.b}")


def _compare(
    contests: Sequence[Contest], judges: Mapping[str, Judge], arguments: CompareArguments, folder: Path, say: Say
) -> list[Metric]:
    """Judge, write down what was judged, and count."""
    show = Shown(arguments.options.strip_thinking)
    contests = [replace(one, a=_shown(one.a, show), b=_shown(one.b, show)) for one in contests]
    pairs, prompts = meetings(contests)
    say(f"{len(pairs):,} pairs of answers to {len(contests):,} prompts")
    judged = judge_pairs(judges, pairs, prompts, prices=arguments.prices, say=say)
    write_verdicts(folder / VERDICTS, judged)
    write_differences(folder / DIFFERENCES, judged, (arguments.a, arguments.b))
    figures = preference_metrics(judged, arguments.sampled.settings.seed)
    return figures + order_metrics(judges, len(pairs)) + _side_metrics(contests) + show.metrics("", say)


def _shown(record: Mapping[str, Any], show: Shown) -> dict[str, Any]:
    return {**record, "responses": [show(text) for text in record["responses"]]}


def _side_metrics(contests: Sequence[Contest]) -> list[Metric]:
    records = (record for contest in contests for record in (contest.a, contest.b))
    sampled = all({"response_ids", "finished"} <= record.keys() for record in records)
    return text_metrics(contests) + (sampled_metrics(contests) if sampled else [])
