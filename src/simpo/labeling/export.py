"""Judgments to preference data, verdicts and their reliability."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from simpo.evaluation.preferences import agreement_metrics
from simpo.labeling.session import KINDS, Item, Judgment
from simpo.runs.files import write_lines
from simpo.runs.results import Metric
from simpo.statistics import bootstrap_interval, krippendorff_alpha, krippendorff_terms, mean_interval, rate_interval

PREFERENCES, VERDICTS, JUDGMENTS = "preferences.jsonl", "verdicts.jsonl", "judgments.jsonl"
PREFERENCE_COUNT = "label/preferences"  # the metric

# A comparison of two of an item's answers, each a place in the file; the verdict is 1 if the first is better, 0.5 for
# neither, 0 if the second is.
Compared = dict[tuple[int, int], float]


def export(items: Sequence[Item], judgments: Sequence[Judgment], folder: Path, *, seed: int) -> list[Metric]:
    """Write the files of a labeling run.

    - ``preferences.jsonl``: the rows that ``simpo train`` and ``simpo reward`` read, one for every item of which the
      labelers on the whole prefer an answer: a pair, or all answers with their scores if any item has more than two.
    - ``verdicts.jsonl``: ``{id, winner, a, b}`` of every item with two answers, for ``simpo compare --judge human:``.
    - ``judgments.jsonl``: every judgment, skipped items included.

    ``judgments`` are those that count, in the order in which they were made.
    """
    by_item: dict[str, list[Judgment]] = {item.id: [] for item in items}
    for judgment in judgments:
        by_item[judgment.item].append(judgment)
    judged = {key: [one for one in found if one.kind != "skip"] for key, found in by_item.items()}
    pairs_only = all(len(item.responses) == 2 for item in items)
    preferences = [_preference(item, judged[item.id], pairs_only) for item in items if judged[item.id]]
    rows = [row for row in preferences if row is not None]
    write_lines(folder / PREFERENCES, rows)
    write_lines(folder / VERDICTS, _verdicts(items, judged))
    write_lines(folder / JUDGMENTS, [_judgment_row(one) for one in judgments])
    kinds = Counter(one.kind for one in judgments)
    metrics = [
        Metric("label/items", sum(not item.is_tie for item in items)),
        Metric("label/items_judged", sum(map(bool, judged.values()))),
        Metric("label/labelers", len({one.labeler for one in judgments})),
        *(Metric(f"label/judgments_{kind}", kinds[kind]) for kind in KINDS),
        Metric(PREFERENCE_COUNT, len(rows)),
        Metric("label/items_judged_without_a_preference", len(preferences) - len(rows)),
    ]
    counted = [one for found in judged.values() for one in found]
    return metrics + reliability_metrics(counted, seed) if counted else metrics


def scores_of(judgments: Sequence[Judgment]) -> list[float]:
    """The number of other answers that an answer beats, a tie counting half; the mean over the labelers."""
    ranks = np.array([one.ranks for one in judgments], dtype=np.float64)  # [labelers, K]
    better = np.sign(ranks[:, None, :] - ranks[:, :, None])  # [labelers, K, K], 1 where the answer's rank is lower
    wins = (better / 2 + 0.5).sum(-1) - 0.5  # without the answer itself
    return [float(score) for score in wins.mean(0)]


def _preference(item: Item, judgments: Sequence[Judgment], pairs_only: bool) -> dict[str, Any] | None:
    """The row of an item; None if no answer is better than another."""
    scores = scores_of(judgments)
    if len(set(scores)) == 1:
        return None
    row = {"prompt": item.prompt, **item.columns}
    if pairs_only:
        chosen, rejected = (item.responses[int(place)] for place in np.argsort(scores)[::-1])
        row |= {"chosen": chosen, "rejected": rejected}
    else:
        row |= {"responses": list(item.responses), "scores": scores}
    return row | {
        "id": item.id,
        "labeler": ", ".join(dict.fromkeys(one.labeler for one in judgments)),
        "judgments": [_judgment_row(one) for one in judgments],
    }


def _judgment_row(judgment: Judgment) -> dict[str, Any]:
    return {
        "id": judgment.item,
        "labeler": judgment.labeler,
        "judgment": judgment.kind,
        "ranks": list(judgment.ranks),
        "shown": list(judgment.shown),
        "note": judgment.note,
        "seconds": round(judgment.seconds, 3),
    }


def _verdicts(items: Sequence[Item], judged: Mapping[str, Sequence[Judgment]]) -> list[dict[str, Any]]:
    """The winner of every item with two answers that was judged; identical answers tie by themselves."""
    rows = []
    for item in items:
        if len(item.responses) != 2 or not (judged[item.id] or item.is_tie):
            continue
        a, b = (0.0, 0.0) if item.is_tie else scores_of(judged[item.id])
        winner = "tie" if a == b else "a" if a > b else "b"
        answers = dict(zip("ab", item.responses, strict=True))
        rows.append({"id": item.id, "winner": winner, **answers, "judgments": len(judged[item.id])})
    return rows


# ---- Can the judgments be relied upon?


def reliability_metrics(judgments: Sequence[Judgment], seed: int) -> list[Metric]:
    """Agreement of the labelers beyond chance, preference for what is shown first, and time.

    A ranking is compared answer by answer: of every two answers it says that the first is better, the second, or
    neither. Resampling for intervals takes an item as a whole.

    There is at least one judgment, and none of them is a skip.
    """
    compared = {
        (one.labeler, one.item): {
            (i, j): (np.sign(one.ranks[j] - one.ranks[i]) + 1) / 2 for i, j in combinations(range(len(one.ranks)), 2)
        }
        for one in judgments
    }
    metrics = [_alpha(compared, seed)]
    labelers = list(dict.fromkeys(one.labeler for one in judgments))
    for one, other in combinations(labelers, 2):
        both = [item for name, item in compared if name == one and (other, item) in compared]
        first, second = ([compared[name, item] for item in both] for name in (one, other))
        numbers = np.array([number for number, found in enumerate(first) for _ in found], dtype=np.int64)
        metrics += agreement_metrics(f"{_quoted(one)}+{_quoted(other)}", numbers, _flat(first), _flat(second), seed)
    seconds = [one.seconds for one in judgments]
    metrics += _position(judgments)
    metrics.append(Metric.of("seconds_per_item", mean_interval(seconds)))
    metrics.append(Metric("seconds_per_item_median", float(np.median(seconds)), n=len(seconds)))
    for name in labelers if len(labelers) > 1 else ():
        own = [one.seconds for one in judgments if one.labeler == name]
        metrics.append(Metric(f"seconds_per_item_median/{name}", float(np.median(own)), n=len(own)))
    return metrics


def _quoted(name: str) -> str:
    """A labeler's name next to another one in the name of a metric, which no other two have."""
    return json.dumps(name, ensure_ascii=False) if set(name) & set('+"') else name


def _flat(compared: Sequence[Compared]) -> np.ndarray:
    return np.array([verdict for found in compared for verdict in found.values()])


def _alpha(compared: Mapping[tuple[str, str], Compared], seed: int) -> Metric:
    """Krippendorff's alpha of all labelers, over items that at least two of them judged."""
    counts: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for (_, item), found in compared.items():
        for places, verdict in found.items():
            counts.setdefault(item, {}).setdefault(places, np.zeros(3))[int(2 * verdict)] += 1
    terms = np.array([krippendorff_terms(np.array(list(found.values()))).sum(0) for found in counts.values()])
    terms = terms[terms[:, :-1].any(axis=1)]
    if not len(terms):
        return Metric("krippendorff_alpha", None, n=0)
    return Metric.of("krippendorff_alpha", bootstrap_interval(terms, krippendorff_alpha, seed=seed))


def _position(judgments: Sequence[Judgment]) -> list[Metric]:
    """Share of the comparisons with a winner that the answer shown first won; without position bias it is a half."""
    shares = []
    for one in judgments:
        shown = [one.ranks[place] for place in one.shown]
        won = [first < second for first, second in combinations(shown, 2) if first != second]
        if won:
            shares.append(sum(won) / len(won))
    if not shares:
        return [Metric("first_shown_preferred", None, n=0)]
    return [Metric.of("first_shown_preferred", rate_interval(shares))]
