"""The life of a run folder: rejected, begun, locked, killed, resumed, changed, finished."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from enum import Enum
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
import yaml

from simpo.errors import SimpoError, third_party
from simpo.runs.files import write_text
from simpo.runs.folder import RunFolder
from simpo.runs.log import EarlyNotices
from simpo.runs.manifest import find_damage, write_manifest
from simpo.runs.results import Metric, fingerprint, read_results

IDENTITY = {"learning_rate": 1e-6, "layers": [1, 2], "data/train": "a" * 64, "model": "tiny"}


def begin(path, identity=IDENTITY, *, command="train", **options):
    folder = RunFolder(path, command=command)
    try:
        folder.begin(identity, **options)
    except BaseException:
        folder.close()
        raise
    return folder


def refused(path, *, command="train"):
    with pytest.raises(SimpoError) as caught:
        RunFolder(path, command=command)
    return str(caught.value)


def record(path):
    return json.loads((path / "run.json").read_text())


def test_nothing_is_written_before_begin(tmp_path, capsys):
    with RunFolder(tmp_path / "runs" / "a", command="train") as folder:
        assert not folder.finished
        assert not folder.resuming
        folder.log("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == "hello\n"


def test_a_run_from_start_to_manifest(tmp_path, capsys):
    path = tmp_path / "runs" / "a"
    before = datetime.now(UTC) - timedelta(seconds=1)
    with RunFolder(path, command="train") as folder:
        folder.log("objective: simpo")
        folder.begin(IDENTITY, argv=["--beta", "2"], resolved={"beta": 2.0})
        folder.metrics.append([{"step": 1, "loss": 0.5}])
        folder.log("done")
        (path / "model.safetensors").write_bytes(b"weights")
        (path / "checkpoint-1").mkdir()
        (path / "checkpoint-1" / "optimizer.pt").touch()
        assert folder.fingerprint == fingerprint(IDENTITY)
        assert not folder.finished
        folder.finish()
        assert folder.finished
        folder.log("after the end")
    assert capsys.readouterr().out.splitlines() == ["objective: simpo", "done", "after the end"]

    kept = record(path)
    assert {key: kept[key] for key in ("schema", "command", "status", "identity", "fingerprint", "changes")} == {
        "schema": 1,
        "command": "train",
        "status": "finished",
        "identity": IDENTITY,
        "fingerprint": fingerprint(IDENTITY),
        "changes": [],
    }
    (started,) = map(datetime.fromisoformat, kept["starts"])
    assert before <= started <= datetime.fromisoformat(kept["finished"]) <= datetime.now(UTC)

    assert find_damage(path) is None
    listed = {file["path"] for file in json.loads((path / "manifest.json").read_text())["files"]}
    assert listed == {"environment.json", "metrics.jsonl", "model.safetensors", "recipe.resolved.yaml", "recipe.yaml"}
    lines = (path / "log.txt").read_text().splitlines()
    assert [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 (.*)", line)[1] for line in lines] == [
        "objective: simpo",
        "done",
        "after the end",
    ]
    assert json.loads((path / "environment.json").read_text())["packages"]["simpo"]


def test_a_finished_run_is_recognized_and_not_repeated(tmp_path):
    with begin(tmp_path) as folder:
        folder.metrics.append([{"step": 1}])
        folder.finish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock.pid"}
    with RunFolder(tmp_path, command="train") as folder:
        assert folder.finished
        assert not folder.resuming
        folder.begin(IDENTITY)
        assert folder.fingerprint == fingerprint(IDENTITY)
        assert list(folder.metrics) == [{"step": 1}]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock.pid"} == before


def test_a_run_is_computed_once(tmp_path, capsys):
    calls = []

    def compute():
        calls.append(1)
        return [Metric("loss", 0.5)]

    for _ in range(2):
        with begin(tmp_path) as folder:
            path = folder.complete(compute)
        results = read_results(path)
        assert (results.command, results.fingerprint) == ("train", fingerprint(IDENTITY))
        assert results.metrics == [Metric("loss", 0.5)]
    assert len(calls) == 1
    assert record(tmp_path)["status"] == "finished"
    assert str(tmp_path) in capsys.readouterr().out


def test_other_processes_in_a_run_write_nothing(tmp_path, capsys):
    path, calls = tmp_path / "a", []
    with RunFolder(path, command="train", writes=False) as folder:
        folder.log("once is enough")
        folder.begin(IDENTITY)
        assert not (folder.finished or folder.resuming or folder.changed)
        folder.complete(lambda: calls.append(1) or [Metric("loss", 0.5)])
    assert calls == [1]
    assert not path.exists()
    assert capsys.readouterr().out == ""


def test_an_unfinished_run_is_resumed(tmp_path):
    with begin(tmp_path) as folder:
        folder.metrics.append([{"step": 1}])
    (tmp_path / ".checkpoint-2.partial").mkdir()  # left by a kill
    with RunFolder(tmp_path, command="train") as folder:
        assert folder.resuming
        assert not folder.finished
        folder.begin(dict(reversed(IDENTITY.items())) | {"layers": (1, 2)})
        assert list(folder.metrics) == [{"step": 1}]
    assert len(record(tmp_path)["starts"]) == 2
    assert not (tmp_path / ".checkpoint-2.partial").exists()


def test_an_output_dir_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert refused(path).startswith(f"output_dir: {tmp_path}/file is a file")


def test_a_folder_with_other_contents_is_rejected_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    assert refused(tmp_path).startswith(f"output_dir: {tmp_path} is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / ".gitkeep").touch()
    (tmp_path / ".run.json.123.partial").touch()  # killed before the first file was complete
    with begin(tmp_path) as folder:
        assert not folder.resuming
    assert not (tmp_path / ".run.json.123.partial").exists()


def test_a_run_of_another_command_is_rejected(tmp_path):
    begin(tmp_path, command="sft").close()
    assert refused(tmp_path).startswith(f"output_dir: {tmp_path} holds a run of 'sft', not 'train'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2, "fingerprint": ""}',
        '{"schema": 1, "fingerprint": "", "command": "train"}',
        '{"schema": 1, "fingerprint": "", "command": "train", "identity": {}, "status": "odd"}',
        '{"schema": 1, "fingerprint": "of something else", "command": "train", "identity": {"a": 1}}',
    ],
)
def test_an_unreadable_record_is_rejected(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    message = refused(tmp_path)
    assert message.startswith(f"output_dir: {tmp_path}/run.json ")
    assert "\n" not in message


def test_a_read_only_disk_is_rejected(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for path in (small_disk, small_disk / "runs" / "a"):
        message = refused(path)
        assert message.startswith(f"output_dir: {small_disk} ") and "read-only disk" in message


def test_a_folder_without_permission_is_rejected(locked_folder):
    message = refused(locked_folder / "a")
    assert message.startswith(f"output_dir: {locked_folder}/a: ") and "Permission denied" in message


def test_a_full_disk_gives_one_line_and_the_run_continues_later(small_disk):
    path = small_disk / "run"
    with begin(path) as folder:
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "filler").write_bytes(bytes(1 << 20))
        with pytest.raises(SimpoError, match="no space left on the disk"):
            folder.finish()
    with pytest.raises(SimpoError, match="no space left on the disk"):
        begin(path)
    (small_disk / "filler").unlink()
    with begin(path) as folder:
        assert folder.resuming
        folder.finish()
    assert find_damage(path) is None


OTHER = IDENTITY | {"learning_rate": 2e-6, "data/train": "b" * 64, "seed": 3}
del OTHER["model"]
DIFFERENCES = (
    "data/train: contents changed; learning_rate: was 1e-06, now 2e-06; "
    'model: was "tiny", now not set; seed: was not set, now 3'
)


def test_different_settings_are_rejected_with_all_differences(tmp_path):
    begin(tmp_path).close()
    with pytest.raises(SimpoError) as caught:
        begin(tmp_path, OTHER, accept_changes=False)
    message = str(caught.value)
    assert message.startswith(f"output_dir: {tmp_path} ")
    assert f"({DIFFERENCES})" in message
    assert "accept_changes: true" in message
    assert record(tmp_path)["identity"] == IDENTITY
    assert len(record(tmp_path)["starts"]) == 1


@pytest.mark.parametrize("accept_changes", [None, False])
def test_different_versions_are_mentioned_because_they_may_record_different_settings(tmp_path, accept_changes):
    begin(tmp_path).close()
    path = tmp_path / "environment.json"
    environment = json.loads(path.read_text())
    environment["packages"] |= {"simpo": "0.0.9", "torch": "1.0"}
    path.write_text(json.dumps(environment))
    with pytest.raises(SimpoError, match=r"package versions it was started with \(simpo 0.0.9, torch 1.0\)"):
        begin(tmp_path, OTHER, accept_changes=accept_changes)
    begin(tmp_path).close()  # with the same settings, different versions may continue
    path.write_text("[")
    with pytest.raises(SimpoError) as caught:
        begin(tmp_path, OTHER, accept_changes=accept_changes)
    assert DIFFERENCES in str(caught.value) and "started with" not in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-1/model.safetensors"])
@pytest.mark.parametrize("outer_finished", [False, True])
def test_a_damaged_run_inside_a_run_is_rejected(tmp_path, name, outer_finished):
    inner = tmp_path / "trials" / "000"
    with begin(tmp_path, command="sweep") as outer:
        with begin(inner) as run:
            run.metrics.append([{"step": 1}])
            (inner / "checkpoint-1").mkdir()
            (inner / "checkpoint-1" / "model.safetensors").write_bytes(b"weights")
            write_manifest(inner / "checkpoint-1")
            run.finish()
        with begin(tmp_path / "trials" / "001"):  # an unfinished one is continued and repairs itself
            pass
        if outer_finished:
            outer.finish()
    begin(tmp_path, command="sweep").close()
    (inner / name).write_bytes(b"")
    with pytest.raises(SimpoError, match=rf"{inner}.* is damaged \({Path(name).name}: 0 bytes"):
        begin(tmp_path, command="sweep")


def test_long_values_are_not_printed(tmp_path):
    begin(tmp_path, {"chat_template": "a\n" * 100}).close()
    with pytest.raises(SimpoError, match=r"\(chat_template: contents changed\)"):
        begin(tmp_path, {"chat_template": "b"})


def test_accepted_changes_are_reported_and_recorded(tmp_path, capsys):
    begin(tmp_path).close()
    with begin(tmp_path, OTHER, accept_changes=True) as folder:
        assert folder.fingerprint == fingerprint(OTHER)
    assert capsys.readouterr().out == f"continued with different settings: {DIFFERENCES}\n"
    assert DIFFERENCES in (tmp_path / "log.txt").read_text()
    kept = record(tmp_path)
    assert kept["identity"] == OTHER
    (change,) = kept["changes"]
    assert change["there"] == {"learning_rate": 1e-6, "data/train": "a" * 64, "model": "tiny"}
    assert change["now"] == {"learning_rate": 2e-6, "data/train": "b" * 64, "seed": 3}
    begin(tmp_path, OTHER).close()  # these are now the run's settings
    assert len(record(tmp_path)["changes"]) == 1


@pytest.mark.parametrize("accept_changes", [False, True])
def test_a_finished_run_keeps_its_settings(tmp_path, accept_changes):
    with begin(tmp_path) as folder:
        folder.finish()
    with pytest.raises(SimpoError) as caught:
        begin(tmp_path, OTHER, accept_changes=accept_changes)
    message = str(caught.value)
    assert message.startswith(f"output_dir: {tmp_path} holds a finished run ")
    assert f"({DIFFERENCES})" in message
    assert "accept_changes" not in message
    assert record(tmp_path)["status"] == "finished"


class Strategy(Enum):
    NO = "no"


def test_recipes_are_stored_without_secrets(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# my recipe\nbeta: 2.5\nhub_token: s3cr3t\n")
    resolved = {
        "beta": 2.5,
        "output_dir": Path("a"),
        "strategy": Strategy.NO,
        "names": ("ü",),
        "nested": {"x": None},
        "hub_token": "s3cr3t",
    }
    argv = ["recipe.yaml", "--api_key", "s3cr3t", "--prompt", "two\nlines"]
    begin(tmp_path / "a", IDENTITY | {"hub_token": "s3cr3t"}, argv=argv, recipe=recipe, resolved=resolved).close()
    text = (tmp_path / "a" / "recipe.yaml").read_text()
    assert text == (
        "# simpo train recipe.yaml --api_key '<redacted>' --prompt 'two\n# lines'\n"
        "# my recipe\nbeta: 2.5\nhub_token: <redacted>\n"
    )
    assert yaml.safe_load((tmp_path / "a" / "recipe.resolved.yaml").read_text()) == {
        "beta": 2.5,
        "output_dir": "a",
        "strategy": "no",
        "names": ["ü"],
        "nested": {"x": None},
        "hub_token": "<redacted>",
    }
    for path in (tmp_path / "a").iterdir():
        assert "s3cr3t" not in path.read_text()


def test_without_a_recipe_the_command_line_is_stored(tmp_path):
    begin(tmp_path).close()
    assert (tmp_path / "recipe.yaml").read_text() == "# simpo train\n"
    assert not (tmp_path / "recipe.resolved.yaml").exists()


def test_warnings_are_logged_while_the_run_is_open(tmp_path, capsys):
    logger = logging.getLogger("simpo.anything")
    token = "hf_" + "a" * 34
    with RunFolder(tmp_path, command="train") as folder:
        logger.warning("too early")
        folder.begin(IDENTITY)
        logger.warning("%s is not installed", "wandb")
        logger.info("not a warning")
        folder.log(f"with {token}")
    logger.warning("too late")
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["note: wandb is not installed", "with <redacted>"]
    assert token not in capsys.readouterr().out


HOLDING = """
import os, sys, time
from simpo.runs.folder import RunFolder
folder = RunFolder(sys.argv[1], command="train")
folder.begin({"a": 1})
if sys.argv[2] == "alone" or os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_process_is_rejected_until_the_first_is_gone(tmp_path, start, kill_after):
    process = start(HOLDING, tmp_path, "alone")
    for _ in range(2):  # rejection does not change the lock
        message = refused(tmp_path)
        assert message.startswith(f"output_dir: {tmp_path} ") and f"(process {process.pid})" in message
    kill_after(process)
    with RunFolder(tmp_path, command="train") as folder:
        assert folder.resuming
        folder.begin({"a": 1})


def test_a_child_that_outlives_a_killed_run_does_not_hold_the_lock(tmp_path, start, kill_after):
    process = start(HOLDING, tmp_path, "fork")
    child = int(process.first_line)
    try:
        kill_after(process)
        os.kill(child, 0)  # it is still running
        begin(tmp_path, {"a": 1}).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_cannot_use_a_folder_twice(tmp_path):
    with begin(tmp_path):
        assert f"is in use by another run (process {os.getpid()})" in refused(tmp_path)
    begin(tmp_path).close()


def test_a_folder_taken_by_another_run_in_the_meantime_is_rejected(tmp_path, start):
    path = tmp_path / "a"
    with RunFolder(path, command="train") as folder:
        process = start(HOLDING, path, "alone")
        with pytest.raises(SimpoError, match=rf"is in use by another run \(process {process.pid}\)"):
            folder.begin(IDENTITY)
        process.kill()
        process.wait()
        with pytest.raises(SimpoError, match="another run has just taken"):
            folder.begin(IDENTITY)


STARTING = """
import sys
from simpo.runs.folder import RunFolder
print("ready", flush=True)
with RunFolder(sys.argv[1], command="train") as folder:
    folder.log("started")
    folder.begin({"a": 1}, resolved={"a": 1})
    while True:
        folder.finish()
"""


def test_a_run_can_continue_after_a_kill_at_any_time(tmp_path, start):
    """Even if the kill comes after the run has finished."""
    for attempt in range(4):
        path = tmp_path / str(attempt)
        process = start(STARTING, path)
        time.sleep(0.008 * attempt)
        process.kill()
        process.wait()
        with RunFolder(path, command="train") as folder:
            was_finished = folder.finished
            folder.begin({"a": 1})
            assert not was_finished or find_damage(path) is None
            folder.finish()
        assert find_damage(path) is None


@pytest.mark.parametrize("name", [".lock", ".lock.pid", ".anything", "log.txt", "metrics.jsonl", "run.json"])
def test_links_in_a_new_folder_are_not_followed(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("kept")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    assert "output_dir" in refused(folder)
    assert victim.read_text() == "kept"


def test_a_link_named_like_a_temporary_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f".a.txt.{os.getpid()}.partial").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "victim").read_text() == "kept" and (tmp_path / "a.txt").read_text() == "new"


def test_the_log_contains_earlier_notices_and_the_final_error(tmp_path):
    early, root = EarlyNotices(), logging.getLogger()
    root.addHandler(early)
    logging.getLogger("simpo").warning("recipe.yaml: an old spelling")
    with pytest.raises(SimpoError), begin(tmp_path / "out"), third_party("file.json: row 3"):
        raise KeyError("from a library")
    log = (tmp_path / "out/log.txt").read_text()
    assert "an old spelling" in log and "error: file.json: row 3" in log and "Traceback" in log
    assert early not in root.handlers


def test_logging_handlers_of_the_calling_program_are_left_alone(tmp_path):
    target, root = logging.NullHandler(), logging.getLogger()
    theirs = MemoryHandler(10, target=target)
    root.addHandler(theirs)
    try:
        begin(tmp_path / "out").close()
        assert theirs in root.handlers and theirs.target is target
    finally:
        root.removeHandler(theirs)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda path: os.truncate(path / "model.safetensors", 3), "model.safetensors: 3 bytes"),
        (lambda path: (path / "model.safetensors").write_bytes(b"wEights"), "model.safetensors: contents changed"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json: not readable"),
        (lambda path: (path / "results.json").write_text(""), "results.json: 0 bytes"),
    ],
)
def test_a_damaged_finished_run_is_not_reported_as_finished(tmp_path, damage, named):
    path = tmp_path / "out"
    with begin(path) as run:
        (path / "model.safetensors").write_bytes(b"weights")
        run.complete(lambda: [Metric("loss", 1.0)])
    with begin(path) as run:
        assert run.finished
    damage(path)
    with pytest.raises(SimpoError, match=re.escape(named)):
        begin(path)


def test_an_edited_model_card_is_not_damage(tmp_path):
    path = tmp_path / "out"
    with begin(path) as run:
        (path / "README.md").write_text("# A model")
        run.complete(lambda: [Metric("loss", 1.0)])
    (path / "README.md").write_text("# My model")
    with begin(path) as run:
        assert run.finished


def test_all_contents_of_a_finished_run_are_hashed_on_request(tmp_path, monkeypatch):
    inner = tmp_path / "round-1"
    with begin(tmp_path) as outer:
        (tmp_path / "weights").write_bytes(b"0123")
        with begin(inner) as folder:
            (inner / "weights").write_bytes(b"0123")
            folder.finish()
        outer.finish()
    monkeypatch.setattr(RunFolder, "verify_hashes", True)
    begin(tmp_path).close()
    for path in (inner / "weights", tmp_path / "weights"):
        times = path.stat()
        path.write_bytes(b"0723")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(SimpoError, match=r"weights: contents changed"):
            begin(tmp_path)
        monkeypatch.setattr(RunFolder, "verify_hashes", False)
        begin(tmp_path).close()  # the quick check compares sizes and times
        monkeypatch.setattr(RunFolder, "verify_hashes", True)
        path.write_bytes(b"0123")
    begin(tmp_path).close()


def test_a_run_continues_after_its_output_pipe_is_closed(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with begin(tmp_path) as folder, os.fdopen(write_end, "w", buffering=1) as output:
        monkeypatch.setattr(sys, "stdout", output)
        folder.log("nobody reads this")
        folder.log("nor this")
    kept = (tmp_path / "log.txt").read_text()
    assert kept.count("the run continues") == 1 and "nobody reads this" in kept and "nor this" in kept


HALF_STARTED = """
import ctypes, os, signal, sys, time
from simpo.runs.folder import RunFolder

folder = RunFolder(sys.argv[1], command="test")
folder.begin({"a": 1})
if not ctypes.CDLL(None).fork():  # as in the middle of starting a program: Python's handlers of forks do not run
    time.sleep(2)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_that_briefly_outlives_its_killed_parent_is_waited_for(tmp_path):
    command = [sys.executable, "-c", HALF_STARTED, str(tmp_path / "run")]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    begun = time.monotonic()
    with RunFolder(tmp_path / "run", command="test") as folder:
        assert folder.resuming and time.monotonic() - begun < 15
