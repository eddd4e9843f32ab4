"""The command line finds commands by their files and ends mistakes in one line."""

import json
import pkgutil

import pytest

import simpo
from simpo import commands
from simpo.cli import main


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_overview_has_a_line_for_every_command(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    assert {"train", "sft", "sample", "chat", "inspect", "demo"} <= set(names)
    for name in names:
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"simpo {simpo.__version__}\n"


def test_unknown_command(capsys):
    assert main(["tain"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train" in error


def test_public_names_are_there():
    for name in simpo.__all__:
        assert getattr(simpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = simpo.Nothing


def test_an_error_cannot_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a\x1b]0;owned\x07\nsecond line": 1}) + "\n")
    argv = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed: must be at least 0"),
        (["--save_only_model", "true"], "save_only_model: not supported"),
        (["--output_dir", "null"], "output_dir is missing"),
    ],
)
def test_mistakes_end_in_one_line(options, message, tmp_path, capsys):
    given = {"--model_name_or_path": "nowhere", "--dataset_name": "rows.jsonl", "--output_dir": str(tmp_path / "out")}
    given |= dict([options])
    assert main(["train", *(text for pair in given.items() for text in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
