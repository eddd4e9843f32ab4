"""The command line finds commands by their files and turns mistakes into one-line errors."""

import json
import logging
import os
import subprocess
import sys
from functools import partial

import pytest

import simpo
from simpo import cli as commands
from simpo.cli import COMMANDS, _Notices, main
from simpo.cli.training import reward, sft, train
from simpo.config import parse_settings
from simpo.errors import SimpoError
from simpo.evaluation.compare import CompareSettings
from simpo.runs.log import LogFile


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_overview_has_a_line_for_every_command(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"train", "sft", "sample", "chat", "inspect", "demo"} <= set(COMMANDS)
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines)


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"simpo {simpo.__version__}\n"


def test_an_unknown_command_gives_a_one_line_error(capsys):
    assert main(["tain"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train" in error


def test_public_names_exist():
    for name in simpo.__all__:
        assert getattr(simpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = simpo.Nothing


def test_an_error_cannot_control_the_terminal(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a\x1b]0;owned\x07\nsecond line": 1}) + "\n")
    argv = ["--model_name_or_path", str(tmp_path), "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("argv", "library"),
    [(["--help"], "torch"), (["recipe", "--objective=dpo", "--setting=llama3-base"], "accelerate")],
)
def test_fast_commands_import_no_slow_library(argv, library):
    code = f"import sys; from simpo.cli import main; assert main({argv}) == 0; assert {library!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_python_minus_m_runs_the_command(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "simpo", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout == f"simpo {simpo.__version__}\n"


# A library's notice before the output, and more output than fits into a pipe.
_WRITER = """
import logging, sys
import rich.console
from simpo import cli

def recipe(argv):
    for number in range(100_000):
        {write}

cli.command_named = lambda name: recipe
cli._quiet_libraries = lambda: None  # which takes seconds
sys.exit(cli.main(["recipe"]))
"""


@pytest.mark.parametrize(
    "write",
    [
        "print(number)",
        "logging.getLogger('library').warning('notice %d', number)",
        "rich.console.Console().print(number)",
    ],
)
def test_a_closed_output_pipe_ends_the_command_quietly(write, tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(_WRITER.format(write=write))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_a_different_broken_pipe_is_not_treated_as_closed_output(monkeypatch):
    def recipe(argv):
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(commands, "command_named", lambda name: recipe)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError, match="a worker is gone"):
            main(["recipe"])


def test_library_messages_below_warnings_are_logged_but_not_shown(tmp_path, capsys):
    """With ``log_level: info``, for example."""
    library = logging.getLogger("some.library")
    library.propagate = False
    library.setLevel(logging.INFO)
    for handler in (_Notices(), LogFile(tmp_path / "log.txt")):
        library.addHandler(handler)
    library.info("hundreds of these")
    library.warning("one of these")
    assert capsys.readouterr().out == "note: one of these\n"
    kept = (tmp_path / "log.txt").read_text()
    assert "hundreds of these" in kept and "one of these" in kept


def test_two_models_keep_their_order():
    parse = partial(parse_settings, types=(CompareSettings,))
    needed = ["--judge", "exact", "--output_dir", "out"]
    (found,) = parse(["--model", "first", "--model=second", *needed])
    assert (found.a, found.b) == ("first", "second")
    with pytest.raises(SimpoError, match="--model: this command takes 2 models, not 1"):  # first or second?
        parse(["first", "--model", "second", *needed])


@pytest.mark.parametrize("command", [train, sft, reward])
@pytest.mark.parametrize(
    "argv", [["MODEL"], ["--model", "MODEL"], ["--model_name_or_path", "MODEL"], ["recipe.yaml", "MODEL"]]
)
def test_training_commands_accept_a_model_by_position(command, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-6\n")
    argv = [word.replace("MODEL", "./nowhere") for word in argv]
    with pytest.raises(SimpoError, match=r"model_name_or_path: there is no folder './nowhere'"):
        command([*argv, "--dataset_name", "rows.jsonl", "--output_dir", "out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed: must be at least 0"),
        (["--dataloader_num_workers", "100000"], "dataloader_num_workers: at most"),
        (["--num_train_epochs", "1e308"], "num_train_epochs: must be above 0 and at most"),
        (["--save_only_model", "true"], "save_only_model: not supported"),
        (["--output_dir", "null"], "output_dir is missing"),
        (["--log_level", "false"], "--log_level: 'false' is not one of detail, debug, info"),
    ],
)
def test_mistakes_give_a_one_line_error(options, message, tmp_path, capsys):
    given = {"--model_name_or_path": "nowhere", "--dataset_name": "rows.jsonl", "--output_dir": str(tmp_path / "out")}
    given |= dict([options])
    assert main(["train", *(text for pair in given.items() for text in pair)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "pairs.jsonl", "org/model"], "pairs.jsonl is a data file"),
        (["inspect", "pairs.parquet"], "pairs.parquet is a data file"),
        (["sample", "prompts.csv", "org/model", "--output_dir=o"], "prompts.csv is a data file"),
        (["train", "pairs.jsonl", "--output_dir=o"], "pass the file as --dataset_name pairs.jsonl"),
        (["train", "org/model", "pairs.jsonl", "--output_dir=o"], "pass the file as --dataset_name pairs.jsonl"),
        (["trian"], "did you mean train?"),
    ],
)
def test_data_in_place_of_a_model_or_recipe_is_reported(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(36, "File name too long", "x" * 300), "File name too long"),
        (PermissionError(13, "Permission denied", "some/file"), "some/file: Permission denied"),
        (MemoryError("unable to allocate 9 GiB"), "unable to allocate 9 GiB"),
    ],
)
def test_system_errors_give_one_line(error, shown, monkeypatch, capsys):
    monkeypatch.setattr(commands, "_run", lambda arguments: (_ for _ in ()).throw(error))
    assert main(["train"]) == 2
    printed = capsys.readouterr().err
    assert shown in printed and printed.count("\n") == 1 and len(printed) < 200


def test_a_bug_keeps_its_traceback_but_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", "not-for-anybody")
    monkeypatch.setattr(commands, "_run", lambda arguments: {}["\x1b[31mnot-for-anybody"])
    assert main(["train"]) == 1
    printed = capsys.readouterr().err
    assert "KeyError" in printed and "in <lambda>" in printed and "report" in printed.splitlines()[-1]
    assert "not-for-anybody" not in printed and "\x1b" not in printed


def test_notices_neither_control_the_terminal_nor_show_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    shown = _Notices().format(logging.makeLogRecord({"msg": "\x1b[2J \u202e a-secret-of-mine"}))
    assert "\x1b" not in shown and "\u202e" not in shown and "a-secret-of-mine" not in shown
