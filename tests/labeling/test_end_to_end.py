"""Answers from two models, judged on the page, exported, and read by the commands that use human judgments."""

from __future__ import annotations

from contextlib import closing

import pytest

from simpo.cli import main
from simpo.labeling.session import Judgment, Session, Store, pair_items, read_items
from simpo.runs.files import read_lines, write_lines
from simpo.runs.folder import RunRecord
from simpo.runs.results import read_results
from simpo.world.pairs import write_model

PROMPTS = [f"What is {n} plus 1?" for n in range(6)]
RIGHT = [f"{n} plus 1 is {n + 1}." for n in range(6)]
WRONG = [f"{n} plus 1 is {n}." for n in range(6)]


def labeled(folder, items, ranks_of) -> None:
    """Write a run in which ann judges every item: ``ranks_of`` ranks the answers as shown, or returns None to skip."""
    write_lines(folder / "items.jsonl", [item.row() for item in items])
    RunRecord("label", {"seed": "0"}).write(folder)
    with closing(Store(folder / "judgments.sqlite")) as store:
        session = Session(items, store, seed=0, overlap=1.0)
        page = session.next("ann")
        while (item := page["item"]) is not None:
            ranks = ranks_of(item["answers"])
            kind = "skip" if ranks is None else "ranked" if len(set(ranks)) > 1 else "tie"
            vote = Judgment("ann", item["id"], kind, tuple(ranks or [1] * len(item["answers"])), (), "", 2)
            page = session.judge(vote, f"key of {item['id']}")
    assert main(["label", "--export", str(folder)]) == 0


def trained_on(folder, tmp_path) -> dict[str, float | None]:
    """Train a reward model for one step on the exported preferences and return its metrics."""
    write_model(tmp_path / "model", seed=0)
    data = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(folder / "preferences.jsonl")]
    options = ["--max_steps", "1", "--max_length", "128", "--save_strategy", "no", "--report_to", "none"]
    assert main(["reward", *data, "--output_dir", str(tmp_path / "reward"), *options]) == 0
    return {metric.name: metric.value for metric in read_results(tmp_path / "reward/results.json").metrics}


@pytest.fixture
def answers(tmp_path):
    """Two files of answers to the same prompts; the first model's are right except for the last two."""
    mine = [*RIGHT[:4], *WRONG[4:]]
    theirs = [*WRONG[:4], RIGHT[4], WRONG[5] + " Yes."]
    for name, texts in (("a", mine), ("b", theirs)):
        rows = [{"id": p, "prompt": p, "responses": [text]} for p, text in zip(PROMPTS, texts, strict=True)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_pairs_become_verdicts_and_a_reward_model(answers, tmp_path) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    items, _ = pair_items(*answers)

    def ranks(shown: list[str]) -> list[int] | None:
        """Skip the first prompt, and rank two wrong answers as a tie."""
        if any(text.startswith("0 ") for text in shown):
            return None
        return [1 if text in RIGHT or not set(shown) & set(RIGHT) else 2 for text in shown]

    labeled(folder, items, ranks)
    options = ["--judge", f"human:{folder / 'verdicts.jsonl'}", "--output_dir", str(tmp_path / "compared")]
    assert main(["compare", *map(str, answers), *options]) == 0
    found = {metric.name: metric for metric in read_results(tmp_path / "compared/results.json").metrics}
    assert (found["win_rate/human"].value, found["win_rate/human"].n) == (pytest.approx(3.5 / 5), 5)
    assert found["without_verdict/human"].value == 1
    rows = read_lines(folder / "preferences.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in sorted(rows, key=lambda row: row["prompt"])] == list(
        zip(RIGHT[1:5], WRONG[1:5], strict=True)
    )
    assert trained_on(folder, tmp_path)["data/train/used"] == 4


def test_rankings_become_a_reward_model(tmp_path) -> None:
    folder, path = tmp_path / "labels", tmp_path / "answers.jsonl"
    folder.mkdir()
    texts = zip(PROMPTS, RIGHT, WRONG, strict=True)
    write_lines(path, [{"id": p, "prompt": p, "responses": [wrong, "No.", right]} for p, right, wrong in texts])
    items, _ = read_items(path, pairs=False)
    labeled(folder, items, lambda shown: [1 if text in RIGHT else 2 if text in WRONG else 3 for text in shown])
    assert [row["scores"] for row in read_lines(folder / "preferences.jsonl")] == [[1.0, 0.0, 2.0]] * 6
    assert trained_on(folder, tmp_path)["data/train/used"] == 6
