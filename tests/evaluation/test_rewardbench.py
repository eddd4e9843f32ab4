"""RewardBench 2 against a naive computation of its scores and plain transformers."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from simpo.cli import main
from simpo.evaluation import rewardbench
from simpo.evaluation.rewardbench import SUBSETS, item_terms, read_items, score_metrics
from simpo.judging.scorers import ModelScorer
from simpo.runs.results import read_results

NAMES = ("factuality", "precise_if", "math", "safety", "focus", "ties")


def make_rows(count: int, *, alone: bool = False) -> list[dict]:
    """Return ``count`` shuffled rows per subset, Ties in pairs; ``alone`` adds two Ties rows without a partner."""
    rows = [
        {"id": str(n), "subset": subset, "prompt": f"What is {n} and {len(subset)}?"}
        | {"chosen": [f"It is {n + len(subset)}."], "rejected": [f"It is {n}.", "", f"I would say {n * 9}."]}
        for subset in SUBSETS
        if subset != "Ties"
        for n in range(count)
    ]
    for n in range(count):
        wrong = [f"It is {n} and {k}." for k in range(1 + n % 3)]
        for kind, right in (("ref", [f"It is {n}."]), ("tied", [f"I would say {k}, {n}." for k in range(2 + n % 2)])):
            row = {"id": f"{kind}:{n}", "subset": "Ties", "prompt": f"What is {kind} {n}?"}
            rows.append(row | {"chosen": right, "rejected": wrong})
    if alone:
        rows.append({**rows[-1], "id": "tied:98"})
        rows.append({**rows[-3], "id": "ref:99"})
    random.Random(0).shuffle(rows)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def naive_scores(rows, scores) -> dict[str, float]:
    """Compute the scores as defined in arXiv 2506.01937 and its repository, subset by subset."""
    found = {}
    for subset in SUBSETS:
        if subset == "Ties":
            continue
        points = []
        for row, given in zip(rows, scores, strict=True):
            if row["subset"] == subset:
                highest = [place for place, score in enumerate(given) if score == max(given)]
                points.append(1 / len(highest) if 0 in highest else 0)
        found[SUBSETS[subset]] = sum(points) / len(points)
    spread, gap = {"ref": {}, "tied": {}}, {"ref": {}, "tied": {}}
    for row, given in zip(rows, scores, strict=True):
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            right, wrong = given[: len(row["chosen"])], given[len(row["chosen"]) :]
            spread[kind][number] = max(right) - min(right)
            gap[kind][number] = min(right) - max(wrong)
    both = [number for number in gap["ref"] if number in gap["tied"]]
    apart = [gap["tied"][n] > spread["tied"][n] for n in both]
    hard = [min(gap["tied"][n], gap["ref"][n]) > spread["tied"][n] for n in both]
    bonus = []
    for n in both:
        smaller, width = min(gap["tied"][n], gap["ref"][n]), spread["tied"][n]
        ratio = smaller / width if width else (math.nan if smaller == 0 else math.copysign(math.inf, smaller))
        bonus.append(0.0 if math.isnan(ratio) else math.tanh(ratio - 1))
    accuracies = [np.mean([value > 0 for value in gap[kind].values()]) for kind in ("tied", "ref")]
    found["ties"] = 0.3 * sum(accuracies) + 0.2 * np.mean(apart) + 0.2 * np.mean(hard) + 0.01 * np.mean(bonus)
    return found | {"score": sum(found.values()) / 6}


@pytest.mark.parametrize("levels", [None, 4])
def test_scores_match_the_definitions(tmp_path, levels):
    """Scores with few distinct levels produce draws, equal correct answers and zero gaps."""
    rows = make_rows(40, alone=True)
    items = read_items(write(tmp_path / "test.jsonl", rows), "test")
    rng, found, expected = np.random.default_rng(0), [], []
    for shift in (0.0, 1.0):
        scores = []
        for row in rows:
            given = rng.normal(size=len(row["chosen"]) + len(row["rejected"])) + rng.normal()
            given[: len(row["chosen"])] += shift
            scores.append((given if levels is None else np.round(given)).tolist())
        found.append(item_terms(items, scores))
        expected.append(naive_scores(rows, scores))
    alone = {metric.name: metric for metric in score_metrics(found[0], None)}
    assert alone.keys() == {f"rewardbench/{name}" for name in ("score", *NAMES)}
    for name, value in expected[0].items():
        metric = alone[f"rewardbench/{name}"]
        assert metric.value == pytest.approx(value, abs=1e-12) and metric.low < value < metric.high
        assert metric.n == {"score": 5 * 40 + 42, "ties": 42}.get(name, 40)
    assert "6 together" in alone["rewardbench/math"].method and "together" not in alone["rewardbench/score"].method
    two = {(metric.name, metric.stage): metric for metric in score_metrics(found[1], found[0])}
    for name in expected[0]:
        assert two[f"rewardbench/{name}", "before"].value == pytest.approx(expected[0][name], abs=1e-12)
        assert two[f"rewardbench/{name}", "after"].value == pytest.approx(expected[1][name], abs=1e-12)
        difference = two[f"rewardbench/{name}/difference", None]
        assert difference.value == pytest.approx(expected[1][name] - expected[0][name], abs=1e-12)
        assert difference.low < difference.value < difference.high and difference.method.startswith("paired")


def test_ties_scores_of_a_perfect_and_a_constant_model(tmp_path):
    """1.01, including the bonus for equal correct answers; and 0 for a model that cannot tell answers apart."""
    rows = [row for row in make_rows(3) if row["subset"] == "Ties"]
    items = read_items(write(tmp_path / "test.jsonl", rows), "test")
    for right, value in ((1.0, 1.01), (0.0, 0.0)):
        scores = [[right] * len(row["chosen"]) + [0.0] * len(row["rejected"]) for row in rows]
        (metric,) = score_metrics(item_terms(items, scores), None)
        assert (metric.name, metric.value, metric.n) == ("rewardbench/ties", pytest.approx(value), 3)


def test_best_of_four_with_draws(tmp_path):
    rows = [row for row in make_rows(4) if row["subset"] == "Math"]
    items = read_items(write(tmp_path / "test.jsonl", rows), "test")
    scores = [[2.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0]]
    (metric,) = score_metrics(item_terms(items, scores), None)
    assert metric.value == (1 + 0.25 + 0 + 0.5) / 4


@pytest.fixture(scope="module")
def write_reward_model(chat_world, tmp_path_factory):
    def write(seed: int):
        folder = tmp_path_factory.mktemp("reward")
        AutoTokenizer.from_pretrained(chat_world / "model").save_pretrained(folder)
        config = AutoModelForCausalLM.from_pretrained(chat_world / "model").config
        config.num_labels = 1
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder

    return write


def command(model, data, output, *more):
    return ["evaluate", "rewardbench", str(model), f"--data={data}", f"--output_dir={output}", *more]


@torch.no_grad()
def test_scores_match_plain_transformers(write_reward_model, tmp_path, capsys):
    rows = make_rows(3)
    data, folders = write(tmp_path / "test.jsonl", rows), [write_reward_model(seed) for seed in (0, 1)]
    assert main(command(folders[1], data, tmp_path / "out", f"--against={folders[0]}")) == 0
    expected = []
    for folder, name in zip(folders, ("against/scores.jsonl", "scores.jsonl"), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        scores = []
        for row in rows:
            texts = [*row["chosen"], *row["rejected"]]
            messages = [
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}] for text in texts
            ]
            ids = [tokenizer.apply_chat_template(one, return_dict=False) for one in messages]
            ids = [one[: len(one) - one[::-1].index(tokenizer.eos_token_id)] for one in ids]
            hidden = [model.transformer(torch.tensor([one])).last_hidden_state[0, -1] for one in ids]
            scores.append([model.score(one).item() for one in hidden])
        stored = [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        assert [(line["row"], line["id"]) for line in stored] == [(n, row["id"]) for n, row in enumerate(rows)]
        for line, given in zip(stored, scores, strict=True):
            assert line["scores"] == pytest.approx(given, abs=1e-5)
        expected.append(naive_scores(rows, [line["scores"] for line in stored]))
    metrics = {(m.name, m.stage): m.value for m in read_results(tmp_path / "out/results.json").metrics}
    for name in ("score", *NAMES):
        for stage, scores_at_stage in zip(("before", "after"), expected, strict=True):
            assert metrics[f"rewardbench/{name}", stage] == pytest.approx(scores_at_stage[name])
    identity = json.loads((tmp_path / "out/run.json").read_text())["identity"]
    assert identity["model"] != identity["against/model"] and identity["dtype"] == "float32"
    assert "88.3" in capsys.readouterr().out


def test_a_stopped_run_is_continued(write_reward_model, tmp_path, monkeypatch, capsys):
    data, folder = write(tmp_path / "test.jsonl", make_rows(3)), write_reward_model(0)
    monkeypatch.setattr(rewardbench, "_PROMPTS_PER_PART", 8)
    assert main(command(folder, data, tmp_path / "whole")) == 0
    score, scored = ModelScorer.score, []

    def stop_at_the_third(self, rows):
        if len(scored) == 16:
            raise KeyboardInterrupt
        scored.extend(row.id for row in rows)
        return score(self, rows)

    monkeypatch.setattr(ModelScorer, "score", stop_at_the_third)
    assert main(command(folder, data, tmp_path / "stopped")) == 130
    scored.append("stopped")
    assert main(command(folder, data, tmp_path / "stopped")) == 0
    assert len(set(scored)) == len(scored) == 21 + 1  # no row was scored twice
    for name in ("scores.jsonl", "results.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert main(command(folder, data, tmp_path / "stopped")) == 0
    assert len(scored) == 22


def test_missing_subsets_are_reported(write_reward_model, tmp_path, capsys):
    data = write(tmp_path / "test.jsonl", [row for row in make_rows(3) if row["subset"] in ("Math", "Ties")])
    assert main(command(write_reward_model(0), data, tmp_path / "out")) == 0
    assert "Factuality, Focus, Precise IF, Safety" in capsys.readouterr().out
    names = [metric.name for metric in read_results(tmp_path / "out/results.json").metrics]
    assert names == ["rewardbench/math", "rewardbench/ties"]


GOOD = {"id": "1", "subset": "Math", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"]}
TIED = {"id": "tied:1", "subset": "Ties", "prompt": "p", "chosen": ["a", "e"], "rejected": ["b"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "subset": "Maths"}, r"test\.jsonl:2: subset: expected one of Factuality, .*Ties, got 'Maths'"),
        ({**GOOD, "chosen": ["a", "b"]}, r"test\.jsonl:2: chosen: .*one .* 2"),
        ({**GOOD, "chosen": []}, r"test\.jsonl:2: chosen: .*one .* 0"),
        ({**GOOD, "rejected": []}, r"test\.jsonl:2: .*rejected"),
        ({**GOOD, "rejected": ["b", 3]}, r"test\.jsonl:2: .*rejected.*texts"),
        ({**GOOD, "chosen": "a"}, r"test\.jsonl:2: chosen: .*list"),
        ({key: GOOD[key] for key in GOOD if key != "prompt"}, r"test\.jsonl:2: no 'prompt'"),
        ({**TIED, "id": "1"}, r"test\.jsonl:2: id: .*ref:NUMBER or tied:NUMBER.* '1'"),
        ({**TIED, "chosen": ["a"]}, r"test\.jsonl:2: chosen: .*two .* 1"),
        ({**TIED, "id": "ref:1"}, r"test\.jsonl:2: chosen: .*one .* 2"),
        (TIED, r"test\.jsonl: Ties: .*ref:NUMBER .*tied:NUMBER"),
        ([TIED, TIED], r"test\.jsonl:3: id tied:1 .*twice.*test\.jsonl:2"),
    ],
)
def test_mistakes_give_a_one_line_error(write_reward_model, tmp_path, capsys, row, message):
    data = write(tmp_path / "test.jsonl", [GOOD, *(row if isinstance(row, list) else [row])])
    assert main(command(tmp_path, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert re.search(message, error), error


def test_a_row_that_does_not_fit_the_model_is_reported(write_reward_model, tmp_path, capsys):
    data = write(tmp_path / "test.jsonl", [GOOD, {**GOOD, "prompt": "and " * 80}])
    assert main(command(write_reward_model(0), data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "test.jsonl:2: " in error and "64" in error
