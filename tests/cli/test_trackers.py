"""Curves and outcomes of runs as stored by experiment trackers, with the real packages and no network."""

from __future__ import annotations

import json
import re
from itertools import chain

import pytest

from simpo.cli import main
from simpo.runs.files import read_lines
from simpo.runs.results import read_results

# Names under which dashboards for transformers look for curves.
CURVES = ("train/loss", "train/learning_rate", "train/grad_norm", "train/rewards/margins", "train/rewards/accuracies")
HELD_OUT = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies", "eval/generations/length")


def call(command: str, world, output, tracker: str, **settings) -> int:
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "max_length": 40,
        "save_strategy": "no",
        "report_to": tracker,
    }
    return main([command, *(f"--{key}={value}" for key, value in (given | settings).items())])


def train(world, output, tracker: str) -> int:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_generations": 3}
    return call("train", world, output, tracker, max_steps=4, **evaluated)


def sweep(world, output, tracker: str) -> int:
    return call("sweep", world, output, tracker, max_steps=2, learning_rate="1e-5,1e-3")


def outcome(folder) -> dict[str, float]:
    """Return the metrics in ``results.json`` under the trackers' names."""
    found = read_results(folder / "results.json").metrics
    names = ["/".join(["results", *([metric.stage] if metric.stage else []), metric.name]) for metric in found]
    return {name: metric.value for name, metric in zip(names, found, strict=True) if metric.value is not None}


def table(folder) -> list[list[str]]:
    """Return the prompts with the initial model's answers and the latest ones."""
    before, after = (read_lines(folder / "generations" / name) for name in ("start.jsonl", "step-4.jsonl"))
    return [[a["prompt"], a["responses"][0], b["responses"][0]] for a, b in zip(before, after, strict=True)]


def logged(folder, key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in read_lines(folder / "metrics.jsonl") if key in line]


def shown(event) -> list[list[str]]:
    """Return the cells of a Markdown table in TensorBoard, without line breaks."""
    heading, _, *lines = event.tensor_proto.string_val[0].decode().split("\n")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (heading, *lines)]
    return [[cell[1:-1].replace("\\|", "|").replace("<br>", "") for cell in row] for row in rows]


@pytest.fixture
def board(tmp_path, monkeypatch):
    """``board(run)``: what TensorBoard stored for a run, by its folder's name, or for the only run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "board"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))

    def read(run: str = ""):
        events = EventAccumulator(str(folder / run))
        events.Reload()
        return events

    return read


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The package, writing into the test's folder and sending nothing."""
    places = {"WANDB_DIR": tmp_path, "WANDB_DATA_DIR": tmp_path / "data", "WANDB_CACHE_DIR": tmp_path / "cache"}
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **places}.items():
        monkeypatch.setenv(name, str(value))
    return pytest.importorskip("wandb")


def one_line(text: str) -> str:
    return "".join(text.splitlines())


def test_tensorboard_has_curves_and_outcomes(chat_world, tmp_path, board, capsys):
    out = tmp_path / "out"
    assert train(chat_world, out, "tensorboard") == 0
    assert not any(path.is_dir() for path in (tmp_path / "board").iterdir())  # a single run in the dashboard
    events = board()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {*CURVES, *HELD_OUT}
    for name, key in [(name, name.removeprefix("train/")) for name in CURVES] + [("eval/loss", "eval_loss")]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(out, key)]
    assert len(events.Scalars("train/loss")) == 4 and len(events.Scalars("eval/loss")) == 2
    outcomes = outcome(out)
    assert outcomes and scalars > outcomes.keys()
    for name, value in outcomes.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (4, pytest.approx(value, rel=1e-6))
    (answers,) = events.Tensors("answers/text_summary")
    assert shown(answers) == [["prompt", "before", "after"], *([one_line(cell) for cell in row] for row in table(out))]
    assert events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"
    error = capsys.readouterr().err
    assert "did not accept" not in error

    assert train(chat_world, out, "tensorboard") == 0  # a finished run is not logged again
    assert len(board().Scalars("results/train/loss")) == 1


def test_answers_from_the_last_rollout_are_logged(chat_world, tmp_path, board, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorers.py").write_text("def short(prompt, response):\n    return -len(response)\n")
    given = {
        "model_name_or_path": chat_world / "model", "dataset_name": chat_world / "train.jsonl", "max_length": 40,
        "annotator": "function:scorers:short", "trust_remote_code": True, "output_dir": "out", "objective": "rloo",
        "num_generations": 2, "max_new_tokens": 4, "per_device_train_batch_size": 4, "max_steps": 2,
        "save_strategy": "no", "report_to": "tensorboard",
    }  # fmt: skip
    assert main(["online", *(f"--{key}={value}" for key, value in given.items())]) == 0
    events = board()
    (answers,) = events.Tensors("answers/text_summary")
    last = sorted((tmp_path / "out/rollouts").glob("0*.jsonl"))[-1]
    expected = [
        [row["prompt"], one_line(response), str(score)]
        for row in read_lines(last)
        for response, score in zip(row["responses"], row["scores"], strict=True)
    ]
    assert expected and shown(answers) == [["prompt", "answer", "score"], *expected]


def test_every_trial_in_a_sweep_is_a_tracker_run(chat_world, tmp_path, board):
    out = tmp_path / "rates"
    assert sweep(chat_world, out, "tensorboard") == 0
    assert {path.name for path in (tmp_path / "board").iterdir()} == {"rates-000", "rates-001"}
    for number in ("000", "001"):
        events = board(f"rates-{number}")
        trial = out / "trials" / number
        found = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(trial, "loss")]
        assert len(found) == 2
        for name, value in outcome(trial).items():
            (event,) = events.Scalars(name)
            assert event.value == pytest.approx(value, rel=1e-6)


def test_every_round_in_a_loop_is_a_tracker_run(chat_world, tmp_path, board, monkeypatch):
    """Its outcome is the comparison with the initial model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scorers.py").write_text("def short(prompt, response):\n    return -len(response)\n")
    given = {
        "model_name_or_path": chat_world / "model", "prompts": chat_world / "train.jsonl", "rounds": 2, "n": 3,
        "eval_prompts": chat_world / "test.jsonl", "annotator": "function:scorers:short", "max_new_tokens": 10,
        "trust_remote_code": True, "temperature": 1, "top_p": 1, "keep_unfinished": True, "output_dir": "loop",
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
        "report_to": "tensorboard", "run_name": "mine",
    }  # fmt: skip
    assert main(["loop", *(f"--{key}={value}" for key, value in given.items())]) == 0
    assert {path.name for path in (tmp_path / "board").iterdir()} == {"loop-round-1", "loop-round-2"}
    for number in (1, 2):
        events = board(f"loop-round-{number}")
        folder = tmp_path / f"loop/round-{number}"
        assert len(events.Scalars("train/loss")) == len(logged(folder / "model", "loss"))
        outcomes = outcome(folder)
        assert {"results/kl", "results/win_rate/function"} < outcomes.keys()
        for name, value in outcomes.items():
            (event,) = events.Scalars(name)
            assert event.value == pytest.approx(value, rel=1e-6)
        assert f"mine-loop-round-{number}" in (folder / "model/recipe.resolved.yaml").read_text()


def test_wandb_has_one_run_per_trial(chat_world, tmp_path, wandb, monkeypatch):
    ended, finish = [], wandb.finish

    def kept(*args, **kwargs):
        ended.append((wandb.run.name, dict(wandb.run.summary)))
        finish(*args, **kwargs)

    monkeypatch.setattr(wandb, "finish", kept)
    assert sweep(chat_world, tmp_path / "rates", "wandb") == 0
    assert wandb.run is None and [name for name, _ in ended] == ["rates-000", "rates-001"]
    for (name, summary), number in zip(ended, ("000", "001"), strict=True):
        trial = tmp_path / "rates/trials" / number
        assert summary["train/loss"] == pytest.approx(logged(trial, "loss")[-1][1]), name
        for key, value in outcome(trial).items():
            assert summary[key] == pytest.approx(value)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    wandb.teardown()  # otherwise it reuses the folders of the process's first run


def test_wandb_has_curves_and_outcomes(chat_world, tmp_path, wandb):
    out = tmp_path / "out"
    assert train(chat_world, out, "wandb") == 0
    summary = dict(wandb.run.summary)
    folder = tmp_path / "wandb"
    wandb.finish()
    assert summary.keys() >= {*CURVES, *HELD_OUT} and not any(name.startswith("test/") for name in summary)
    for name, value in outcome(out).items():
        assert summary[name] == pytest.approx(value)
    (stored,) = folder.glob("offline-run-*/files/media/table/answers_*.table.json")
    found = json.loads(stored.read_text())
    assert (found["columns"], found["data"]) == (["prompt", "before", "after"], table(out))
    artifacts = {path.read_bytes() for path in (tmp_path / "data/artifacts/staging").iterdir()}
    assert artifacts >= {(out / name).read_bytes() for name in ("report.html", "results.json")}


def test_mlflow_has_curves_and_outcomes(chat_world, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("simpo", artifact_location=str(tmp_path / "artifacts"))
    )
    out = tmp_path / "out"
    assert train(chat_world, out, "mlflow") == 0
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED" and mlflow.active_run() is None
    for name, value in outcome(out).items():
        assert run.data.metrics[name] == pytest.approx(value)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "rewards/margins")
    assert [(point.step, point.value) for point in history] == logged(out, "rewards/margins")
    files = [path for path in (tmp_path / "artifacts" / run.info.run_id).rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"answers.json", "report.html", "results.json"}
    assert next(path for path in files if path.name == "report.html").read_bytes() == (out / "report.html").read_bytes()
    found = json.loads(next(path for path in files if path.name == "answers.json").read_text())
    assert (found["columns"], found["data"]) == (["prompt", "before", "after"], table(out))


def test_trackio_has_curves_and_outcomes(chat_world, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    trackio = pytest.importorskip("trackio")
    out = tmp_path / "out"
    assert train(chat_world, out, "trackio") == 0
    (run,) = trackio.Api().runs("huggingface")
    rows = trackio.SQLiteStorage.get_logs("huggingface", run.name)
    names = set(chain.from_iterable(rows))
    assert names >= {*CURVES, *HELD_OUT} and not any(name.startswith("test/") for name in names)
    for name, value in outcome(out).items():
        assert [row[name] for row in rows if name in row] == [pytest.approx(value)]
    (answers,) = [row["answers"] for row in rows if "answers" in row]
    assert [list(row.values()) for row in answers["_value"]] == table(out)


def test_a_failing_tracker_does_not_affect_the_run(chat_world, tmp_path, monkeypatch, caplog):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(writer, "add_hparams", fail)
    assert train(chat_world, tmp_path / "out", "tensorboard") == 0
    assert "TensorBoard" in caplog.text and "the disk is full" in caplog.text
    assert (tmp_path / "out/report.html").exists()
