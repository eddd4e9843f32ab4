"""``simpo push`` to a local stand-in for the hub: exact contents, interrupted uploads, and rejections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from tests.servers.hub import Hub

from simpo import cli
from simpo.cli import models as command
from simpo.errors import SimpoError
from simpo.models.hub import files_to_push
from simpo.runs.manifest import write_manifest

PUBLIC = {
    "README.md": b"# a card",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "results.json": b'{"schema": 1}',
    "tokenizer.json": b"t" * 1000,
    "tokenizer_config.json": b"{}",
}
PRIVATE = ["log.txt", "recipe.yaml", "run.json", "metrics.jsonl", "held_out_after.jsonl", "environment.json", ".secret"]


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in only supports the LFS protocol
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoint-3").mkdir(parents=True)
    for name, contents in PUBLIC.items():
        (folder / name).write_bytes(contents)
    for name in (*PRIVATE, "checkpoint-3/model.safetensors"):
        (folder / name).write_bytes(b"private")
    write_manifest(folder, exclude=("checkpoint-*", "log.txt", "README.md", ".*"))
    return folder


def push(run: Path, *options: str) -> None:
    command.push([str(run), "someone/model", *options])


def test_the_repository_contains_exactly_the_models_files(run, hub, capsys):
    push(run, "--private")
    assert hub.files == PUBLIC
    assert "private" in (hub.created[0].get("visibility"), *hub.created[0])
    assert f"saved: {hub.url}/someone/model" in capsys.readouterr().out
    push(run)  # nothing has changed
    assert hub.commits == 1
    (run / "README.md").write_bytes(b"# an edited card")
    push(run, "--include", "recipe.yaml")
    assert hub.files == PUBLIC | {"README.md": b"# an edited card", "recipe.yaml": b"private"}
    assert len(hub.puts) == 2  # the model and the tokenizer were not sent again


def test_a_public_repository_gets_nothing_meant_to_be_private(run, hub):
    hub.private = False
    with pytest.raises(SimpoError, match="someone/model: private: this repository already exists and is public"):
        push(run, "--private")
    assert (hub.puts, hub.commits) == ([], 0)


def test_a_dry_run_lists_the_files_without_contacting_the_hub(run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push(run, "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == sorted(PUBLIC)
    assert lines[2].split()[0] == "10,240"


def test_an_interrupted_upload_commits_nothing_and_continues(run, hub):
    hub.broken = 1
    with pytest.raises(SimpoError, match=r"someone/model: .*nothing was committed") as error:
        push(run)
    assert "\n" not in str(error.value)
    assert (hub.files, hub.commits, len(hub.puts)) == ({}, 0, 1)
    hub.broken = None
    push(run)
    assert (hub.files, hub.commits, len(hub.puts)) == (PUBLIC, 1, 2)  # files already received were not sent again


def test_a_token_without_permission_is_reported(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(SimpoError, match=r"someone/model: the token has no write access \(403\)") as error:
        push(run)
    assert "hf_reader" not in str(error.value)
    assert hub.commits == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b/c"], "'a/b/c' is not a repository id"),
        (["someone/model", "--include", "*.csv"], "include: '\\*.csv' matches no file"),
        (["someone/model", "--include", "../*"], "include: '../\\*' does not name files inside"),
        (["someone/model", "--include", "/etc/passwd"], "include: '/etc/passwd' does not name files inside"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    with pytest.raises(SimpoError, match=message):
        command.push([str(run), *arguments])


def test_a_missing_token_is_reported(run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SimpoError, match="no token for the hub; set HF_TOKEN"):
        push(run)


def test_folders_that_are_not_models_are_rejected(run, tmp_path):
    with pytest.raises(SimpoError, match="no such folder"):
        files_to_push(tmp_path / "absent")
    (run / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(SimpoError, match=r"damaged \(model.safetensors: 7 bytes instead of 10,240"):
        files_to_push(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SimpoError, match="contains no model"):
        files_to_push(tmp_path / "empty")


def test_an_adapter_with_a_local_base_model_is_rejected(run, tmp_path):
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(SimpoError, match="its base model is a local folder"):
        files_to_push(run)


@pytest.mark.parametrize("damaged", ["{", "[]", '{"base_model_name_or_path": 3}', b"\xff\xfe", "[" * 100_000])
def test_a_damaged_adapter_configuration_is_reported(damaged, run, capsys):
    path = run / "adapter_config.json"
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert cli.main(["push", str(run), "someone/model", "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line


def test_a_trained_model_is_uploaded_at_the_end(hub, chat_world, tmp_path, monkeypatch):
    """With ``push_to_hub``; the card has the held-out results in the hub's format, and no local paths."""
    from simpo.cli import main

    out = tmp_path / "out"
    arguments = [
        "train", "--model_name_or_path", str(chat_world / "model"), "--output_dir", str(out), "--max_steps", "1",
        "--dataset_name", str(chat_world / "train.jsonl"), "--eval_dataset_name", str(chat_world / "test.jsonl"),
        "--use_cpu", "true", "--report_to", "none", "--push_to_hub", "true", "--hub_model_id", "someone/model",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert {name: (out / name).read_bytes() for name in hub.files} == hub.files
    assert "model.safetensors" in hub.files and not {*PRIVATE} & hub.files.keys()
    assert not any(str(tmp_path).encode() in contents for contents in hub.files.values())
    assert not any(str(chat_world).encode() in contents for contents in hub.files.values())
    results = ModelCard(hub.files["README.md"].decode()).data.eval_results
    stored = {
        m["name"]: m["value"]
        for m in json.loads((out / "results.json").read_text())["metrics"]
        if m["stage"] == "after"
    }
    assert {result.metric_type: result.metric_value for result in results} == stored
    assert {result.task_type for result in results} == {"text-generation"}
    commits = hub.commits
    assert main(arguments) == 0  # already finished: only the upload is checked again
    assert hub.commits == commits
