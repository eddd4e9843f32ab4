"""Numbers and texts in reports against naive computations; and damaged, unfinished and invalid run folders."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from simpo.analysis.charts import Pairs, curves, downsample, paper_figures
from simpo.analysis.headline import deciding_measure, measurements
from simpo.analysis.reading import Run, natural_key
from simpo.analysis.report import examples, write_report
from simpo.cli import main
from simpo.errors import SimpoError
from simpo.runs.files import write_lines, write_text
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.manifest import find_damage
from simpo.runs.results import Metric, write_results
from simpo.statistics import mean_interval

STAGES = {"before": 0.2, "after": 0.7}


def sentence_of(path) -> str:
    found = re.search(r'<p class="sentence">(.*?)</p>', path.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(found[1])


def data_of(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_headline_is_the_change_on_the_same_rows(make_run, tmp_path, rows_of):
    run = Run.read(make_run(tmp_path / "run"))
    before, after = (
        np.array([row["rewards/accuracies"] for row in rows_of(tmp_path / f"run/held_out_{stage}.jsonl")])
        for stage in ("before", "after")
    )
    (measure,) = measurements(run)
    assert measure.before.value == before.mean() and measure.after.value == after.mean() > before.mean()
    assert measure.change == mean_interval(after - before)
    assert deciding_measure([measure]) == measure and measure.direction == "better" and measure.change.low > 0
    page = write_report([tmp_path / "run"])
    for value in (measure.before, measure.after, measure.change):
        for number in (value.value, value.low, value.high):
            assert f"{100 * number:.1f}" in sentence_of(page)
    page = page.read_text(encoding="utf-8")
    assert "12,345" in page and "3 of 70 rows in the train data" in page and run.record.fingerprint in page


def test_losses_are_means_over_tokens(tmp_path):
    """Consistent with the losses next to them, even if the scores after training are missing."""
    losses, tokens = np.array([[1.0, 3.0, 2.0], [0.5, 1.0, 2.0]]), np.array([1.0, 8.0, 2.0])
    means = (losses @ tokens / tokens.sum()).tolist()
    with RunFolder(tmp_path / "run", command="sft") as run:
        run.begin({"seed": 0})
        run.metrics.append([{"step": 5, "epoch": None, "eval_loss": means[1]}])
        for stage, row in zip(("before", "after"), losses, strict=True):
            rows = [{"loss": loss, "weight": weight} for loss, weight in zip(row, tokens, strict=True)]
            write_lines(run.path / f"held_out_{stage}.jsonl", rows)
        metrics = [Metric("eval_loss", mean, stage) for stage, mean in zip(("before", "after"), means, strict=True)]
        write_results(run.path, command="sft", fingerprint=run.fingerprint, metrics=metrics)
        run.finish()
    found = Run.read(tmp_path / "run")
    assert measurements(found)[0].change.value == pytest.approx(means[1] - means[0])
    assert curves([found])[0]["series"][0]["data"][0] == (0, pytest.approx(means[0], rel=1e-4))
    assert "epoch" not in write_report([tmp_path / "run"]).read_text().partition("(NaN or infinite)")[2][:80]
    (tmp_path / "run/held_out_after.jsonl").unlink()
    assert measurements(Run.read(tmp_path / "run"))[0].change is None


def test_without_a_clear_change_the_verdict_is_open(make_run, tmp_path, rows_of):
    path = make_run(tmp_path / "run")
    (path / "held_out_after.jsonl").write_text((path / "held_out_before.jsonl").read_text())
    (measure,) = measurements(Run.read(path))
    assert measure.direction == "unclear" and measure.change.value == 0
    assert "</span>No clear change</p>" in write_report([path]).read_text(encoding="utf-8")


def test_rows_stay_matched_if_the_two_files_lose_different_ones(make_run, tmp_path, rows_of):
    """Row 1 is damaged before training and row 4 after: neither counts, and examples keep their own margins."""
    path, rows = make_run(tmp_path / "run"), {}
    for stage, number in (("before", 1), ("after", 4)):
        file = path / f"held_out_{stage}.jsonl"
        rows[stage] = rows_of(file)
        lines = file.read_text().splitlines(keepends=True)
        lines[number] = "damaged\n"
        file.write_text("".join(lines))
    run, whole = Run.read(path), [row for row in range(60) if row not in (1, 4)]
    right = {stage: np.array([rows[stage][row]["rewards/accuracies"] for row in whole]) for stage in rows}
    (measure,) = measurements(run)
    assert measure.change == mean_interval(right["after"] - right["before"])
    assert Pairs.of(run, "before").margins.tolist() == [rows["before"][row]["rewards/margins"] for row in whole]
    for example in examples([run])[0]:
        number = int(example["place"].partition(":")[2]) - 1
        expected = {} if number in (1, 4) else {stage: rows[stage][number]["rewards/margins"] for stage in rows}
        assert example["margins"] == pytest.approx(expected, abs=1e-4)
    page = write_report([path]).read_text(encoding="utf-8")
    assert all(f"held_out_{stage}.jsonl: 1 of 60 lines" in page for stage in rows)


def test_counts_match_a_loop(make_run, tmp_path, rows_of):
    run = Run.read(make_run(tmp_path / "run"))
    charts = {chart["title"]: chart for chart in paper_figures(run)}
    rows = rows_of(tmp_path / "run/held_out_after.jsonl")
    cells = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for row in rows:
        cells[row["logps/chosen"] > row["logps/rejected"], row["rewards/margins"] > 0] += 1
    assert [count for row in charts["Reward and likelihood"]["cells"] for count in row] == [*cells.values()]
    assert sum(count for _, count in charts["Distribution of reward margins"]["series"][1]["data"]) == len(rows)
    lengths = [count for row in rows for count in row["tokens"]]
    rewards = [row[f"rewards/{side}"] for row in rows for side in ("chosen", "rejected")]
    rho = stats.spearmanr(lengths, rewards)
    assert f"after {rho.statistic:.2f} [" in charts["Reward and length"]["note"]
    confidence = [1 / (1 + np.exp(-abs(row["rewards/margins"]))) for row in rows]
    series = charts["Calibration"]["series"][1]["data"]
    first = [c for c in confidence if c < 0.6]
    assert series[0][0] == pytest.approx(np.mean(first), rel=1e-4)
    accuracy = charts["Accuracy by length difference"]
    assert (
        len(accuracy["x"]["categories"]) == len(accuracy["series"][0]["data"]) == len(accuracy["series"][0]["bounds"])
    )
    moved = charts["Change in log-probability by position"]["series"][0]["data"]
    assert moved == [(1, 0.5), (2, -0.2)]


def test_rewards_that_are_all_0_rank_nothing(make_run, tmp_path, rows_of):
    """Like a reference model's own rewards; they only appear in the distribution of margins."""
    path = make_run(tmp_path / "run")
    zero = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.0}
    write_lines(path / "held_out_before.jsonl", [row | zero for row in rows_of(path / "held_out_before.jsonl")])
    names = {chart["title"]: [one["name"] for one in chart["series"]] for chart in paper_figures(Run.read(path))}
    assert names["Distribution of reward margins"] == ["before", "after"]
    assert names["Calibration"] == names["Accuracy by length difference"] == ["after"]


def test_a_downsampled_curve_keeps_every_spike():
    values = np.random.default_rng(0).normal(size=54_321)
    values[17_000], values[40_001] = 99.0, -77.0
    thinned = downsample(list(enumerate(values.tolist())))
    assert len(thinned) <= 1000 and (17_000, 99) in thinned and (40_001, -77) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert downsample([(1, 2.0), (2, 3.0)]) == [(1, 2), (2, 3)]


def test_tokens_without_a_finite_log_probability_are_left_out(make_run, tmp_path, rows_of):
    path = make_run(tmp_path / "run")
    rows = rows_of(path / "examples_after.jsonl")
    for row in rows:
        row["responses"][0]["logps"] = [None, -0.7]
    write_lines(path / "examples_after.jsonl", rows)
    (chart,) = (chart for chart in paper_figures(Run.read(path)) if "by position" in chart["title"])
    assert chart["series"][0]["data"] == [(2, -0.2)]
    write_report([path])


def test_rounds_are_in_numerical_order(tmp_path):
    names = [f"round-{number}/model/run.json" for number in (10, 9, 2, 1)]
    assert [path.parts[0] for path in sorted(map(Path, names), key=natural_key)] == [
        "round-1", "round-2", "round-9", "round-10",
    ]  # fmt: skip


def test_scores_against_the_distance_from_the_start(tmp_path):
    """Plotted over the square root of the logged KL: a negative estimate counts as 0, a missing one has no point."""
    logs = [
        {"step": 0, "eval_generations/win_rate": 0.5},
        {"step": 1, "rollout/kl": -0.25, "rollout/reward": 1.0, "rollout/gold": 5.0},
        {"step": 2, "rollout/kl": 4.0, "rollout/reward": 2.0, "rollout/gold": float("nan")},
        {"step": 2, "eval_generations/win_rate": 0.6},
        {"step": 3, "rollout/kl": 2.0, "rollout/reward": 3.0, "rollout/gold": 4.0},
    ]
    for name in ("one", "other"):
        with RunFolder(tmp_path / name, command="online") as run:
            run.begin({"seed": 0})
            run.metrics.append(logs)
    charts = data_of(write_report([tmp_path / "one"]))["charts"].values()
    found = {chart["title"]: chart["series"] for chart in charts if "by distance" in chart["title"]}
    assert [series[0]["data"] for series in found.values()] == [
        [[0, 1], [2, 2], [1.4142, 3]],
        [[0, 5], [1.4142, 4]],
        [[2, 0.6]],
    ]
    both = data_of(write_report([tmp_path / "one", tmp_path / "other"], tmp_path / "both.html"))["charts"].values()
    names = [[one["name"] for one in chart["series"]] for chart in both if "by distance" in chart["title"]]
    assert names == [["one", "other"]] * 3


def test_rounds_against_the_distance_from_the_start(tmp_path):
    """Both judges of a loop with intervals, for rounds with a known KL."""
    with RunFolder(tmp_path / "loop", command="loop") as run:
        run.begin({"seed": 0})
        metrics = [Metric(f"round-{n}/kl", kl) for n, kl in ((1, 2.25), (2, 9.0))]
        for judge, change in (("exact", -0.1), ("reward", 0.2)):
            rates = [0.5 + n * change for n in (1, 2, 3)]
            metrics += [
                Metric(f"round-{n}/win_rate/{judge}", rate, None, 9, rate - 0.05, rate + 0.05)
                for n, rate in enumerate(rates, start=1)
            ]
        write_results(tmp_path / "loop", command="loop", fingerprint=run.fingerprint, metrics=metrics)
        run.finish()
    charts = data_of(write_report([tmp_path / "loop"]))["charts"].values()
    (chart,) = (chart for chart in charts if "by distance" in chart["title"])
    exact, reward = chart["series"]
    assert (exact["name"], reward["name"]) == ("win_rate/exact", "win_rate/reward")
    assert exact["data"] == [[1.5, 0.4], [3, 0.3]] and reward["data"] == [[1.5, 0.7], [3, 0.9]]
    assert exact["bounds"] == [[1.5, 0.35, 0.45], [3, 0.25, 0.35]]


def test_a_large_run_makes_a_small_page(make_run, tmp_path):
    path = make_run(tmp_path / "run", pairs=20_000, steps=100_000)
    began = time.process_time()
    page = write_report([path])
    assert time.process_time() - began < 20 and page.stat().st_size < 5_000_000
    charts = data_of(page)["charts"].values()
    assert {chart["title"] for chart in charts} >= {"Loss", "Gradient norm", "Reward and length", "Calibration"}
    assert all(len(series["data"]) <= 2000 for chart in charts for series in chart["series"])
    assert "of 100,000 values" in page.read_text() and "of 20,000 pairs" in page.read_text()


def test_a_run_in_progress_with_damaged_logs(make_run, tmp_path):
    """A non-finite number, a truncated line, a line that is not JSON, and a constant from another program."""
    path = make_run(tmp_path / "run", finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": NaN}\n{"step": 22, "loss": null}\nnonsense\n{"step": 23, "lo')
    page = write_report([path]).read_text(encoding="utf-8")
    assert "So far, reward accuracy" in page and "75.0%" in page and "This run has not finished" in page
    assert "2 of 24 lines are damaged" in page and "(NaN or infinite): loss" in page


def test_a_report_on_a_run_in_progress_does_not_damage_it(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path, command="train") as run:
        run.begin({"seed": 0})
        write_text(path / "part/report.html", "of a part")
        write_report([path])
        run.finish()
    write_report([path])
    write_text(path / "part/report.html", "written again")
    assert find_damage(path) is None


def test_a_report_on_several_runs_names_the_differences(make_run, tmp_path):
    one, other = make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run", learning_rate=1e-5)
    page = write_report([one, other], tmp_path / "both.html")
    text = page.read_text(encoding="utf-8")
    assert str(one) in text and str(other) in text and "1e-05" in text and "no clear difference" in text
    (loss,) = (chart for chart in data_of(page)["charts"].values() if chart["title"] == "Loss")
    assert len({series["run"] for series in loss["series"]}) == 2 and len(loss["series"]) == 4
    record = RunRecord.read(other)
    record.identity["data/eval"] = "1" * 64
    record.write(other)
    assert "different held-out rows" in write_report([one, other], tmp_path / "both.html").read_text()


def test_a_sweep_is_described_by_its_best_trial(make_run, tmp_path):
    path, accuracy = tmp_path / "sweep", "eval_rewards/accuracies"
    with RunFolder(path, command="sweep") as run:
        run.begin({"seed": 0})
        trials = [Run.read(make_run(path / f"trials/{number:03d}", learning_rate=1e-6 * number)) for number in (0, 1)]
        best = Metric(f"best/{accuracy}", 0.7, None, 60, 0.6, 0.8)
        metrics = [Metric("trials/finished", 2), Metric("best/trial", 1), best]
        write_results(path, command="sweep", fingerprint=run.fingerprint, metrics=metrics)
        run.finish()
    found, trial = measurements(Run.read(path)), measurements(trials[1])
    assert found == trial and deciding_measure(found).direction == "better"
    page = write_report([path])
    text = page.read_text(encoding="utf-8")
    assert sentence_of(page).startswith("Of 2 finished trials, 001 is the best: reward accuracy on 60")
    assert "</span>The best trial ranks pairs better</p>" in text
    assert "compared with trials/001, no clear difference" in text
    assert "on these held-out rows" in text
    assert {row["kind"] for row in data_of(page)["examples"]} == {"pair"}
    (loss,) = (chart for chart in data_of(page)["charts"].values() if chart["title"] == "Loss")
    assert [one["run"] for one in loss["series"]] == ["trials/000"] * 2 + ["trials/001"] * 2
    assert len({(one["run"], one["name"]) for one in loss["series"]}) == 4


def test_folders_without_a_run_and_duplicate_runs_are_rejected(make_run, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    path = make_run(tmp_path / "run")
    for arguments, words in (
        ([tmp_path / "folder"], "folder: not a run (no run.json)"),
        ([tmp_path / "absent"], "absent: not a run"),
        ([path, path], "given twice"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (path / "run.json").write_text("{")
    with pytest.raises(SimpoError, match=r"run\.json is not readable"):
        write_report([path])


@pytest.mark.parametrize(
    ("command", "metrics", "words"),
    [
        ("compare", [Metric("win_rate/exact", 0.7, None, 50, 0.6, 0.8)], "A is better"),
        (
            "loop",
            [
                Metric("rounds", 2),
                *(
                    Metric(f"round-{n}/win_rate/exact", 0.6 - n / 5, None, 50, 0.5 - n / 5, 0.65 - n / 5)
                    for n in (1, 2)
                ),
                Metric("round-1/kl", 2.0),
                Metric("round-2/kl", 4.0, None, 50, 3.0, 5.0),
            ],
            "It got worse",
        ),
        ("compare", [Metric("win_rate/function:{}:{n}{", 0.7, None, 50, 0.6, 0.8)], "A is better"),
        (
            "evaluate",
            [Metric("{task}{0}/acc", value, stage, 9, value - 0.1, value + 0.1) for stage, value in STAGES.items()],
            "It got better",
        ),
        ("evaluate", [Metric("gsm8k/{}", 0.5, None, 9, 0.4, 0.6)], "Measured, not compared"),
        ("evaluate", [Metric("alpaca_eval/win_rate", 40.0, None, 805, 37.0, 43.0)], "It got worse"),
        (
            "sft",
            [Metric("eval_loss", 2.0, "before", 50, 1.9, 2.1), Metric("eval_loss", 1.0, "after", 50, 0.9, 1.1)],
            "It predicts answers better",
        ),
        (
            "evaluate",
            [
                *(Metric("gsm8k/accuracy", share, stage, 50) for share, stage in ((0.4, "before"), (0.5, "after"))),
                Metric("gsm8k/difference", 0.1, None, 50, 0.02, 0.18),
            ],
            "It got better",
        ),
        (
            "sweep",
            [
                *(Metric("trials/finished", 3), Metric("best/trial", 2)),
                Metric("best/eval_loss", 0.5, None, 50, 0.4, 0.6),
            ],
            "Measured, not compared",
        ),
        ("pair", [Metric("pair/rows", 12)], "Not measured"),
        (
            "reward",
            [Metric("eval_rewards/accuracies", 0.7, stage, 50, 0.6, 0.8) for stage in ("before", "after")],
            "It ranks pairs better",
        ),
    ],
)
def test_every_kind_of_run_has_a_report(command, metrics, words, tmp_path):
    path = tmp_path / command
    with RunFolder(path, command=command) as run:
        run.begin({"seed": 0})
        if command == "compare":
            write_lines(
                path / "verdicts.jsonl",
                [
                    {
                        "id": "1",
                        "prompt": [{"role": "user", "content": "Why?"}],
                        "a": "So.",
                        "b": None,
                        "verdicts": {"exact": 1.0, "other": None},
                    }
                ],
            )
        write_results(path, command=command, fingerprint=run.fingerprint, metrics=metrics)
        run.finish()
    page = write_report([path])
    text = page.read_text(encoding="utf-8")
    assert f"</span>{words}</p>" in text and "difference is" not in text
    for metric in metrics:
        if "{" in metric.name:
            assert metric.name.removeprefix("win_rate/").removeprefix("gsm8k/") in text
    assert ("3 finished trials, 002 is the best: eval_loss is 0.5 [" in page.read_text()) == (command == "sweep")
    data = data_of(page)
    assert [one["verdicts"] for one in data["examples"]] == [{"exact": "A is better"}] * (command == "compare")
    assert len(data["charts"]) == (3 if command == "loop" else 0)
