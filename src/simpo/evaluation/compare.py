"""``simpo compare``: two models or their answers, any judges, and where the judges differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simpo.client import Prices, confirm_cost
from simpo.errors import SimpoError
from simpo.evaluation.head_to_head import (
    PromptAnswers,
    SampledWith,
    Side,
    contenders,
    match_answers,
    meetings,
    read_contests,
    sampled_metrics,
    text_metrics,
)
from simpo.evaluation.preferences import Judged, preference_metrics
from simpo.judging.presentation import ShownAnswers, as_text
from simpo.judging.protocol import Judge, Pair
from simpo.judging.registry import JudgeOptions, make_judge
from simpo.judging.scored import verdict_of
from simpo.runs.atomic import write_text
from simpo.runs.folder import RunFolder
from simpo.runs.lines import JsonLines
from simpo.runs.log import Log
from simpo.runs.results import Metric
from simpo.runs.signals import stoppable
from simpo.runs.terminal import printable

# ---- What judges said, written down: every pair for programs, the clearest ones for people.


_SHOWN = 10


def write_verdicts(path: Path, judged: Judged) -> None:
    """Write every pair with its answers, verdicts (null where there is none) and margins as JSON lines."""
    lines = JsonLines(path)
    lines.keep(0)
    lines.append(
        {
            **{"id": pair.id, "prompt": pair.prompt, **pair.context.columns, "a": pair.a, "b": pair.b},
            "verdicts": {name: float(values[index]) for name, values in judged.verdicts.items()},
            "margins": {name: float(values[index]) for name, values in judged.margins.items()},
        }
        for index, pair in enumerate(judged.pairs)
    )


def widest_differences(judged: Judged) -> list[int]:
    """The pairs with the clearest verdicts, one of a prompt at most, the clearest first.

    How clear is how far the judges' mean verdict is from a tie, no verdict being one; between equals the first judge
    with scores decides, by how far its scores are apart.
    """
    clear = np.abs(np.mean([np.nan_to_num(verdicts - 0.5) for verdicts in judged.verdicts.values()], axis=0))
    apart = np.abs(next(iter(judged.margins.values()), np.zeros(len(clear))))
    chosen: dict[int, int] = {}  # prompt -> its clearest pair
    for index in np.lexsort((-apart, -clear)):
        if clear[index] > 0:
            chosen.setdefault(int(judged.prompts[index]), int(index))
    return list(chosen.values())[:_SHOWN]


def write_differences(path: Path, judged: Judged, names: tuple[str, str]) -> None:
    """Write :func:`widest_differences` as Markdown.

    Args:
        path: the file.
        judged: pairs and verdicts.
        names: of the models.
    """
    chosen = widest_differences(judged)
    parts = [f"# Where A ({names[0]}) and B ({names[1]}) differ most\n"]
    if not chosen:
        parts.append("No verdict for either.\n")
    for index in chosen:
        parts += _section(judged.pairs[index], _verdicts(index, judged))
    write_text(path, "\n".join(parts))


def _verdicts(index: int, judged: Judged) -> Iterable[str]:
    for judge, verdicts in judged.verdicts.items():
        apart = f" (scores {judged.margins[judge][index]:+.4g})" if judge in judged.margins else ""
        yield f"{judge}: {_said(verdicts[index])}{apart}"


def _said(verdict: float) -> str:
    if np.isnan(verdict):
        return "no verdict"
    if verdict == 0.5:
        return "tie"
    return "A better" if verdict > 0.5 else "B better"


def _section(pair: Pair, verdicts: Iterable[str]) -> list[str]:
    return [
        f"## {pair.id}\n",
        "; ".join(verdicts) + "\n",
        *_quoted("Prompt", as_text(pair.prompt)),
        *_quoted("A", pair.a),
        *_quoted("B", pair.b),
    ]


def _quoted(title: str, text: str) -> list[str]:
    """As it is, between fences that are longer than any in it."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"**{title}**\n", f"{fence}text", text, f"{fence}\n"]


# ---- Several judges, the same pairs of answers: what they cost, and what they say.


def make_judges(names: Sequence[str], options: JudgeOptions) -> dict[str, Judge]:
    """Judges by the names that results call them: their kinds, numbered where one occurs again.

    Args:
        names: as :func:`simpo.judging.registry.make_judge` takes them.
        options: what they need.

    Raises:
        SimpoError: one is named twice or cannot be had.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise SimpoError(f"judge {repeated[0]!r} is named twice")
    found: dict[str, Judge] = {}
    for name in names:
        kind = name.partition(":")[0]
        count = sum(other.partition("-")[0] == kind for other in found)
        found[f"{kind}-{count + 1}" if count else kind] = make_judge(name, options)
    return found


def agree_to(judges: Mapping[str, Judge], pairs: Sequence[Pair], *, yes: bool, prices: Prices | None, log: Log) -> None:
    """Ask the user about what judges will send; see :func:`simpo.client.confirm_cost`.

    Raises:
        SimpoError: the user does not agree, or cannot be asked.
    """
    for judge in judges.values():
        confirm_cost(judge.estimate(pairs), yes=yes, log=log, prices=prices)


def judge_pairs(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], prompts: np.ndarray, *, prices: Prices | None, log: Log
) -> Judged:
    """Every judge's verdicts, and the differences of scores of those that score.

    Args:
        judges: by name.
        pairs: what they judge.
        prompts: for every pair the number of its prompt, ``[P]``.
        prices: of an API judge's tokens, where they are known.
        log: called with what judges took, and how many pairs are without a verdict.

    Raises:
        SimpoError: a judge failed.
    """
    judged = Judged(pairs, prompts)
    for name, judge in judges.items():
        log(f"judge {name}")
        margins = judge.margins(pairs)
        if margins is None:
            found = judge.compare(pairs)
        else:
            judged.margins[name] = np.array(margins)
            found = [verdict_of(margin) for margin in margins]
        judged.verdicts[name] = np.array(found, dtype=np.float64)  # None becomes NaN
        if judge.usage is not None:
            log(judge.usage.line(prices))
        if missing := int(np.isnan(judged.verdicts[name]).sum()):
            log(f"note: judge {name} gave no verdict on {missing:,} of {len(pairs):,} pairs; they do not count")
    return judged


def order_metrics(judges: Mapping[str, Judge], pairs: int) -> list[Metric]:
    """How often a judge named another winner when the order of the answers was turned.

    And how many replies it gave at its server's default temperature, where it did.
    """
    usages = {name: judge.usage for name, judge in judges.items() if judge.usage is not None}
    conflicting = [Metric(f"conflicting_orders/{name}", judges[name].conflicting, n=pairs) for name in usages]
    return conflicting + [
        Metric(f"judged_at_default_temperature/{name}", usage.default_temperature, n=usage.replies)
        for name, usage in usages.items()
        if usage.default_temperature
    ]


VERDICTS, DIFFERENCES = "verdicts.jsonl", "differences.md"


@dataclass(frozen=True)
class CompareArguments:
    """What is compared, and by whom.

    Attributes:
        a: the model, or its answers, whose win rate is measured.
        b: what it is compared with.
        sampled: how models answer.
        judges: names as :func:`simpo.judging.registry.make_judge` takes them.
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
    with stoppable(), RunFolder(folder, command="compare") as run:
        sides = contenders(arguments.a, arguments.b, arguments.sampled)
        judges = make_judges(arguments.judges, replace(arguments.options, log=run.log))
        run.begin(_identity(sides, judges, arguments), argv=argv)

        def measure() -> list[Metric]:
            pairs, _ = meetings(_expected(sides, arguments, folder))
            agree_to(judges, pairs, yes=arguments.yes, prices=arguments.prices, log=run.log)
            files = [side.answers(folder / name, run.log) for name, side in zip("ab", sides, strict=True)]
            return _compare(read_contests(*files), judges, arguments, folder, run.log)

        return run.complete(measure)


def _identity(sides: tuple[Side, Side], judges: Mapping[str, Judge], arguments: CompareArguments) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": arguments.sampled.settings.seed}
    for name, side in zip("ab", sides, strict=True):
        found |= {f"{name}/{key}": value for key, value in side.identity.items()}
    found |= {"strip_thinking": True} if arguments.options.strip_thinking else {}
    for name, judge in judges.items():
        found |= {f"judge {name}/{key}": value for key, value in judge.identity.items()}
    return found


def _expected(sides: tuple[Side, Side], arguments: CompareArguments, folder: Path) -> list[PromptAnswers]:
    """What will be judged, with answers that are not there yet as long as they may be; that it can be shows here."""
    a, b = (side.expected(folder / name) for name, side in zip("ab", sides, strict=True))
    return match_answers(a, b, f"{arguments.a} and {arguments.b}")


def _compare(
    contests: Sequence[PromptAnswers], judges: Mapping[str, Judge], arguments: CompareArguments, folder: Path, log: Log
) -> list[Metric]:
    """Judge, write down what was judged, and count."""
    show = ShownAnswers(arguments.options.strip_thinking)
    contests = [replace(one, a=_shown(one.a, show), b=_shown(one.b, show)) for one in contests]
    pairs, prompts = meetings(contests)
    log(f"{len(pairs):,} pairs of answers to {len(contests):,} prompts")
    judged = judge_pairs(judges, pairs, prompts, prices=arguments.prices, log=log)
    write_verdicts(folder / VERDICTS, judged)
    write_differences(folder / DIFFERENCES, judged, (arguments.a, arguments.b))
    figures = preference_metrics(judged, arguments.sampled.settings.seed)
    return figures + order_metrics(judges, len(pairs)) + _side_metrics(contests) + show.metrics("", log)


def _shown(record: Mapping[str, Any], show: ShownAnswers) -> dict[str, Any]:
    return {**record, "responses": [show(text) for text in record["responses"]]}


def _side_metrics(contests: Sequence[PromptAnswers]) -> list[Metric]:
    records = (record for contest in contests for record in (contest.a, contest.b))
    sampled = all({"response_ids", "finished"} <= record.keys() for record in records)
    return text_metrics(contests) + (sampled_metrics(contests) if sampled else [])
