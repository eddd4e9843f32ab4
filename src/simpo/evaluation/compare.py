"""The workflow behind ``simpo compare``: two models or their answers, and judges that say which one is better."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simpo.atomic import write_text
from simpo.client import Prices, agree
from simpo.errors import SimpoError
from simpo.evaluation.contenders import Contender, SampledWith, contenders
from simpo.evaluation.differences import write_differences
from simpo.evaluation.head_to_head import Contest, read_contests, sampled_metrics, text_metrics
from simpo.evaluation.preferences import Judged, preference_metrics
from simpo.judges.pairwise import PairwiseApiJudge
from simpo.judges.protocol import Judge, Pair
from simpo.judges.registry import JudgeOptions, make_judge
from simpo.judges.scored import ScorerJudge, verdict_of
from simpo.results import Metric, write_results
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

    Writes ``verdicts.jsonl``, ``differences.md`` and ``results.json``. A run that was killed is continued by the same
    call: samples are in the folder, replies of an API in its cache; other judges judge again.

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
        judges = _judges(arguments.judges, replace(arguments.options, say=run.say))
        run.begin(_identity(sides, judges, arguments), argv=argv, accept_changes=None)
        if run.finished:
            run.say(f"{folder} holds this run already, finished")
        else:
            files = [side.answers(folder / name, run.say) for name, side in zip("ab", sides, strict=True)]
            metrics = _compare(read_contests(*files), judges, arguments, folder, run.say)
            write_results(folder, command="compare", fingerprint=run.fingerprint, metrics=metrics)
            run.finish()
    return folder / "results.json"


def _identity(
    sides: tuple[Contender, Contender], judges: Mapping[str, Judge], arguments: CompareArguments
) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": arguments.sampled.settings.seed}
    for name, side in zip("ab", sides, strict=True):
        found |= {f"{name}/{key}": value for key, value in side.identity.items()}
    for name, judge in judges.items():
        found |= {f"judge {name}/{key}": value for key, value in judge.identity.items()}
    return found


def _compare(
    contests: Sequence[Contest], judges: Mapping[str, Judge], arguments: CompareArguments, folder: Path, say: Say
) -> list[Metric]:
    """Judge, write down what was judged, and count."""
    pairs, prompts = _meetings(contests)
    say(f"{len(pairs):,} pairs of answers to {len(contests):,} prompts")
    _agree(judges, pairs, arguments, say)
    verdicts, margins = _judge(judges, pairs, arguments, say)
    judged = Judged(pairs, prompts, verdicts)
    _write_verdicts(folder / VERDICTS, judged, margins)
    write_differences(folder / DIFFERENCES, judged, margins, (arguments.a, arguments.b))
    figures = preference_metrics(judged, arguments.sampled.settings.seed)
    return figures + _conflicts(judges, len(pairs)) + _side_metrics(contests)


def _judges(names: Sequence[str], options: JudgeOptions) -> dict[str, Judge]:
    """Judges by the names that results call them: their kinds, numbered where one occurs again."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SimpoError(f"judge {repeated[0]!r} is named twice")
    found: dict[str, Judge] = {}
    for name in names:
        kind = name.partition(":")[0]
        count = sum(other.partition("-")[0] == kind for other in found)
        found[f"{kind}-{count + 1}" if count else kind] = make_judge(name, options)
    return found


def _meetings(contests: Sequence[Contest]) -> tuple[list[Pair], np.ndarray]:
    """Every answer of the one with every answer of the other to the same prompt, and the number of the prompt."""
    pairs, prompts = [], []
    for number, contest in enumerate(contests):
        ours, theirs = contest.a["responses"], contest.b["responses"]
        lone = len(ours) == len(theirs) == 1
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                key = contest.a["id"] if lone else f"{contest.a['id']}/{i}-{j}"
                pairs.append(Pair(key, contest.prompt, a, b))
                prompts.append(number)
    return pairs, np.array(prompts)


def _agree(judges: Mapping[str, Judge], pairs: Sequence[Pair], arguments: CompareArguments, say: Say) -> None:
    """Ask the user about what will be sent."""
    for judge in judges.values():
        if isinstance(judge, PairwiseApiJudge):
            agree(judge.estimate(pairs), yes=arguments.yes, say=say, prices=arguments.prices)


def _judge(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], arguments: CompareArguments, say: Say
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every judge's verdicts, and the differences of scores of those that score."""
    verdicts, margins = {}, {}
    for name, judge in judges.items():
        say(f"judge {name}")
        if isinstance(judge, ScorerJudge):
            margins[name] = np.array(judge.margins(pairs))
            found: list[float | None] = [verdict_of(margin) for margin in margins[name]]
        else:
            found = judge.compare(pairs)
        verdicts[name] = np.array(found, dtype=np.float64)  # None becomes NaN
        if isinstance(judge, PairwiseApiJudge):
            say(judge.client.usage.line(arguments.prices))
        if missing := int(np.isnan(verdicts[name]).sum()):
            say(f"note: judge {name} gave no verdict on {missing:,} of {len(pairs):,} pairs; they do not count")
    return verdicts, margins


def _conflicts(judges: Mapping[str, Judge], pairs: int) -> list[Metric]:
    return [
        Metric(f"conflicting_orders/{name}", judge.conflicting, n=pairs)
        for name, judge in judges.items()
        if isinstance(judge, PairwiseApiJudge)
    ]


def _side_metrics(contests: Sequence[Contest]) -> list[Metric]:
    sampled = all("response_ids" in record for contest in contests for record in (contest.a, contest.b))
    return text_metrics(contests) + (sampled_metrics(contests) if sampled else [])


def _write_verdicts(path: Path, judged: Judged, margins: Mapping[str, np.ndarray]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": pair.id,
            "prompt": pair.prompt,
            "a": pair.a,
            "b": pair.b,
            "verdicts": {name: _or_none(values[index]) for name, values in judged.verdicts.items()},
            "margins": {name: float(values[index]) for name, values in margins.items()},
        }
        for index, pair in enumerate(judged.pairs)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _or_none(verdict: float) -> float | None:
    return None if np.isnan(verdict) else float(verdict)
