"""Exporting judgments to files, and the printed reliability statistics."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from tests.labeling.conftest import make_items

from simpo import cli
from simpo.data.formats import read_comparison
from simpo.errors import SimpoError
from simpo.judging.protocol import Pair
from simpo.judging.scorers import HumanJudge
from simpo.labeling.run import export, mean_scores
from simpo.labeling.session import Item, Judgment, Store
from simpo.runs.files import read_lines, write_lines
from simpo.runs.folder import RunRecord
from simpo.runs.results import write_results

_KINDS = {"a": ("ranked", (1, 2)), "b": ("ranked", (2, 1)), "tie": ("tie", (1, 1)), "bad": ("both_bad", (1, 1))}


def _judged(labeler: str, item: str, what: str, *, shown: tuple[int, ...] = (0, 1), seconds: float = 2.0) -> Judgment:
    kind, ranks = _KINDS.get(what, ("skip", (1, 1)))
    return Judgment(labeler, item, kind, ranks, shown, f"note on {item}", seconds)


def test_pairs_verdicts_and_agreement_are_exported(tmp_path: Path):
    items = [*make_items(5), Item("same", "Q", ("x", "x"))]
    judgments = [
        *(_judged("ann", f"p{n}", what, shown=(1, 0)) for n, what in enumerate(["a", "b", "a", "tie", "skip"])),
        *(_judged("ben", f"p{n}", what, seconds=4.0) for n, what in enumerate(["a", "b", "b", "bad"])),
    ]
    metrics = {metric.name: metric for metric in export(items, judgments, tmp_path, seed=0)}
    rows = read_lines(tmp_path / "preferences.jsonl")
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("p0", "answer 0.0", "answer 0.1"),
        ("p1", "answer 1.1", "answer 1.0"),
    ]
    assert rows[0]["labeler"] == "ann, ben"
    assert [one["note"] for one in rows[0]["judgments"]] == ["note on p0"] * 2
    assert read_comparison(rows[1], "here").responses == ("answer 1.1", "answer 1.0")
    verdicts = [(row["id"], row["winner"]) for row in read_lines(tmp_path / "verdicts.jsonl")]
    assert verdicts == [("p0", "a"), ("p1", "b"), ("p2", "tie"), ("p3", "tie"), ("same", "tie")]
    assert len(read_lines(tmp_path / "judgments.jsonl")) == 9
    counts = {name.partition("/")[2]: metric.value for name, metric in metrics.items() if name.startswith("label/")}
    assert counts == {
        "items": 5, "items_judged": 4, "labelers": 2, "preferences": 2, "items_judged_without_a_preference": 2,
        "judgments_ranked": 6, "judgments_tie": 1, "judgments_both_bad": 1, "judgments_skip": 1,
    }  # fmt: skip
    # Three of four items are agreed on. Ratings: 3 for a, 3 for b, 2 for neither, so ratings of different items differ
    # with 1 - (3*2 + 3*2 + 2*1) / (8*7) = 0.75. Kappa by hand: chance agreement is (2*1 + 1*2 + 1*1) / 16.
    assert metrics["krippendorff_alpha"].value == pytest.approx(1 - 0.25 / 0.75)
    assert metrics["agreement/ann+ben"].value == 0.75
    assert metrics["kappa/ann+ben"].value == pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))
    assert metrics["first_shown_preferred"].value == pytest.approx(2 / 6)  # ann's b, and ben's a
    assert metrics["seconds_per_item"].value == 3.0
    assert metrics["seconds_per_item_median/ben"].value == 4.0


def test_labeler_names_may_contain_the_separator(tmp_path: Path):
    """The pairs (a, b+c) and (a+b, c) have separate metrics."""
    items = [Item("p0", "?", ("x", "y"))]
    judgments = [Judgment(name, "p0", "ranked", (1, 2), (0, 1), "", 1.0) for name in ("a", "b+c", "a+b", "c")]
    metrics = export(items, judgments, tmp_path, seed=0)
    names = [metric.name for metric in metrics if metric.name.startswith("agreement/")]
    assert len(names) == len(set(names)) == 6
    write_results(tmp_path, command="label", fingerprint="", metrics=metrics)


def test_the_train_command_is_only_printed_if_there_are_preferences(tmp_path: Path, capsys):
    items = [Item("p0", "?", ("x", "y"))]
    write_lines(tmp_path / "items.jsonl", [item.row() for item in items])
    RunRecord("label", {"seed": "0"}).write(tmp_path)
    for kind, ranks, trains in (("tie", (1, 1), False), ("ranked", (1, 2), True)):
        with closing(Store(tmp_path / "judgments.sqlite")) as store:
            store.add(f"key of {kind}", Judgment("ann", "p0", kind, ranks, (0, 1), "", 1.0))
        assert cli.main(["label", "--export", str(tmp_path)]) == 0
        assert ("simpo reward --dataset_name" in capsys.readouterr().out) == trains
        assert bool((tmp_path / "preferences.jsonl").read_text()) == trains


def test_rankings_are_exported(tmp_path: Path):
    items = [*make_items(2, k=3), *make_items(3)[2:]]
    judgments = [
        Judgment("ann", "p0", "ranked", (1, 3, 2), (2, 0, 1), "", 5.0),
        Judgment("ben", "p0", "ranked", (1, 2, 2), (0, 1, 2), "", 5.0),
        Judgment("ann", "p1", "both_bad", (1, 1, 1), (0, 1, 2), "", 5.0),
        _judged("ann", "p2", "b"),
    ]
    assert mean_scores(judgments[:2]) == [2.0, 0.25, 0.75]
    metrics = {metric.name: metric.value for metric in export(items, judgments, tmp_path, seed=0)}
    rows = read_lines(tmp_path / "preferences.jsonl")
    assert [(row["id"], row["scores"]) for row in rows] == [("p0", [2.0, 0.25, 0.75]), ("p2", [0.0, 1.0])]
    assert read_comparison(rows[0], "here").responses == ("answer 0.0", "answer 0.2", "answer 0.1")
    assert [row["id"] for row in read_lines(tmp_path / "verdicts.jsonl")] == ["p2"]
    # Three pairs of answers to p0, two agreed on; ratings: 4 for the first, 1 for the second, 1 for neither.
    assert metrics["krippendorff_alpha"] == pytest.approx(1 - (1 / 3) / (1 - (4 * 3) / (6 * 5)))
    assert metrics["first_shown_preferred"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # ann saw ranks 2, 1, 3


def test_human_verdicts_are_matched_by_their_answers(tmp_path: Path):
    export(make_items(2), [_judged("ann", "p0", "a"), _judged("ann", "p1", "tie")], tmp_path, seed=0)
    judge = HumanJudge(tmp_path / "verdicts.jsonl")
    pairs = [Pair(f"p{n}", f"Question {n}?", (f"answer {n}.0", f"answer {n}.1")) for n in range(3)]
    assert judge.compare(pairs) == [1.0, 0.5, None]
    assert judge.compare([Pair(pair.id, pair.prompt, (pair.b, pair.a)) for pair in pairs]) == [0.0, 0.5, None]
    with pytest.raises(SimpoError, match="p1"):
        judge.compare([Pair("p1", "Question 1?", ("another answer", "answer 1.1"))])
