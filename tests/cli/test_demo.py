"""``simpo demo`` at a small scale: all stages, the table, plots and examples; the same seed gives the same metrics."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import matplotlib.image
import pytest
import torch

from simpo.cli import demo, main
from simpo.errors import InterruptedRun
from simpo.runs.results import read_results
from simpo.world.questions import judge


@pytest.fixture(scope="module", autouse=True)
def reduced_scale():
    """Use far fewer rows, so the model learns little but everything runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_SFT_ROWS": 768, "_PROMPTS": 24, "_HELD_OUT": 24}.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo, "_SIMPO", demo._SIMPO | {"logging_steps": 2})
        patch.setattr(demo, "_SFT", demo._SFT | {"learning_rate": 1e-2, "num_train_epochs": 3})
        yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted demo, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("uninterrupted") / "demo", io.StringIO()
    with redirect_stdout(printed):
        assert main(["demo", "--output_dir", str(folder), "--seed", "3"]) == 0
    return folder, printed.getvalue()


def metrics(folder):
    return [(m.name, m.stage, m.value) for m in read_results(folder / "results.json").metrics]


@pytest.mark.slow
def test_the_demo_covers_all_of_alignment(uninterrupted):
    folder, printed = uninterrupted
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


@pytest.mark.slow
def test_a_demo_interrupted_twice_continues_to_the_same_metrics(uninterrupted, tmp_path, monkeypatch, capsys):
    """While writing its world and before making pairs; it continues without being told where."""
    monkeypatch.chdir(tmp_path)
    stopped = tmp_path / "runs/demo-1"
    for stage, made in (("write_sft", "start/model.safetensors"), ("pair_responses", "sft/model.safetensors")):
        with monkeypatch.context() as patch:
            patch.setattr(demo, stage, _stop)
            assert main(["demo", "--seed", "3"]) == 130
        assert (stopped / made).exists()
    assert main(["demo", "--seed", "3"]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]
    assert "finished" in (stopped / "sft/run.json").read_text()
    starts = json.loads((stopped / "sft/run.json").read_text())["starts"]
    assert len(starts) == 1  # earlier stages are not repeated
    assert metrics(stopped) == metrics(uninterrupted[0])
    capsys.readouterr()
    assert main(["demo", "--output_dir", str(stopped), "--seed", "3"]) == 0
    assert "simpo sft" not in capsys.readouterr().out
    assert main(["demo", "--output_dir", str(stopped), "--seed", "1"]) == 2


def _stop(*arguments):
    raise InterruptedRun("stopped here")


def test_a_non_empty_folder_is_rejected(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not lose")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_wrong_option_gives_a_one_line_error(capsys):
    assert main(["demo", "--sed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
