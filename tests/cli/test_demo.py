"""``simpo demo`` at a small scale: every stage, the table, the plots, the examples; the same seed, the same metrics."""

from __future__ import annotations

import json

import matplotlib.image
import pytest
import torch

from simpo.cli import demo, main
from simpo.errors import InterruptedRun
from simpo.runs.results import read_results
from simpo.world.judge import judge


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Far fewer rows: the model learns little, and everything runs."""
    for name, value in {"_SFT_ROWS": 768, "_PROMPTS": 24, "_HELD_OUT": 24}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "_SIMPO", demo._SIMPO | {"logging_steps": 2})
    monkeypatch.setattr(demo, "_SFT", demo._SFT | {"learning_rate": 1e-2, "num_train_epochs": 3})
    yield
    torch.set_num_threads(1)


def metrics(folder):
    return [(m.name, m.stage, m.value) for m in read_results(folder / "results.json").metrics]


def test_the_whole_of_alignment(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for command in ("simpo sft: ", "simpo sample: ", "simpo train: ", "simpo chat "):
        assert command in printed
    found = {(name, stage) for name, stage, _ in metrics(folder)}
    for name in ("correct", "score", "response_tokens", "end_of_turn_rate"):
        assert {(name, "before"), (name, "after")} <= found
        assert name in printed
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert judge(row["prompt"], row["chosen"]) == row["chosen_score"] > row["rejected_score"]
    for name in ("training", "rates", "lengths"):
        assert matplotlib.image.imread(folder / f"{name}.png").size
        assert f"{name}.png" in printed
    assert len(printed.splitlines()) < 60
    assert "step 2 of" not in printed and "step 2 of" in (folder / "simpo/log.txt").read_text()
    answers = [json.loads(line) for line in (folder / "simpo-answers/responses.jsonl").read_text().splitlines()]
    assert len(answers) == 24
    shown = [answer["prompt"] for answer in answers if f"  {answer['prompt']}   (" in printed]
    assert len(shown) == 3
    logged = [json.loads(line) for line in (folder / "simpo/metrics.jsonl").read_text().splitlines()]
    assert any("rewards/accuracies" in line for line in logged)
    trained = {json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()}
    trained |= {json.loads(line)["prompt"] for line in (folder / "sft.jsonl").read_text().splitlines()}
    assert not trained & {answer["prompt"] for answer in answers}


def test_a_demo_that_was_stopped_goes_on_to_the_same_metrics(tmp_path, monkeypatch, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["demo", "--output_dir", str(straight), "--seed", "3"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(demo, "pair_responses", _stop)
        assert main(["demo", "--output_dir", str(stopped), "--seed", "3"]) == 130
    capsys.readouterr()
    assert main(["demo", "--output_dir", str(stopped), "--seed", "3"]) == 0
    capsys.readouterr()
    assert "finished" in (stopped / "sft/run.json").read_text()
    starts = json.loads((stopped / "sft/run.json").read_text())["starts"]
    assert len(starts) == 1  # the stages before are not done again
    assert metrics(stopped) == metrics(straight)
    assert main(["demo", "--output_dir", str(stopped), "--seed", "3"]) == 0
    assert "simpo sft" not in capsys.readouterr().out
    assert main(["demo", "--output_dir", str(stopped), "--seed", "1"]) == 2


def test_a_demo_that_was_killed_while_its_world_was_made_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_sft", _stop)
        assert main(["demo", "--seed", "3"]) == 130
    assert (tmp_path / "runs/demo-1/start/model.safetensors").exists()
    assert main(["demo", "--seed", "3"]) == 0  # and without being told where
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]


def _stop(*arguments):
    raise InterruptedRun("stopped here")


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not lose")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_wrong_option_is_one_line(capsys):
    assert main(["demo", "--sed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
