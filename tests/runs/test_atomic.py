"""Files and folders are complete or absent: after kills, on full disks, and when writing them raises."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from simpo.errors import SimpoError
from simpo.runs.files import (
    disk_errors,
    provisional,
    remove_folder,
    remove_leftovers,
    staged_files,
    staged_folder,
    write_text,
)

FULL = "no space left on the disk; free some space and rerun the same command: existing files are intact"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old")
    write_text(path, "neu: ü\n")
    assert path.read_bytes() == "neu: ü\n".encode()
    assert names(path.parent) == ["b.txt"]
    (tmp_path / "ordinary").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_text_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr("os.fsync", lambda fd: (steps.append(Path(f"/proc/self/fd/{fd}").readlink()), fsync(fd))[1])
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, to: (steps.append("renamed"), replace(self, to))[1])
    write_text(tmp_path / "x", "text")
    assert steps == [tmp_path / f".x.{os.getpid()}.partial", "renamed", tmp_path]


def test_unencodable_text_leaves_the_old_file_alone(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "\ud800")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_full_disk_leaves_the_old_text(small_disk):
    path = small_disk / "run.json"
    write_text(path, "old")
    with pytest.raises(SimpoError) as caught:
        write_text(path, "x" * 300_000)
    assert str(caught.value) == f"{path}: {FULL}"
    assert names(small_disk) == ["run.json"]
    assert path.read_text() == "old"


def test_a_staged_folder_appears_once_it_is_complete(tmp_path):
    final = tmp_path / "runs" / "checkpoint-5"
    with staged_folder(final) as partial:
        assert partial == provisional(final)
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text("x")
        assert names(final.parent) == [".checkpoint-5.partial"]
    assert names(final.parent) == ["checkpoint-5"]
    assert (final / "below" / "file").read_text() == "x"


def test_a_staged_folder_leaves_nothing_if_its_body_raises(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "new") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_staged_folder_starts_empty_and_never_replaces(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "leftover").touch()
    with staged_folder(tmp_path / "new") as partial:
        assert names(partial) == []
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "new"):
        raise AssertionError("not reached")


def test_staged_files_replace_files_of_the_same_name(tmp_path):
    for name in ("model", "other"):
        (tmp_path / name).write_text("old")
    with staged_files(tmp_path) as partial:
        (partial / "model").write_text("new")
        assert (tmp_path / "model").read_text() == "old"
    assert names(tmp_path) == ["model", "other"]
    assert [(tmp_path / name).read_text() for name in ("model", "other")] == ["new", "old"]
    with pytest.raises(RuntimeError), staged_files(tmp_path) as partial:
        (partial / "model").write_text("newer")
        raise RuntimeError
    assert names(tmp_path) == ["model", "other"]
    assert (tmp_path / "model").read_text() == "new"


def test_a_removed_folder_is_renamed_first(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "file").touch()

    def killed(path):
        assert not folder.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        remove_folder(folder)
    assert names(tmp_path) == [".checkpoint-5.removed"]
    folder.mkdir()
    remove_folder(folder)  # despite the leftover
    assert names(tmp_path) == []


def test_sweeping_removes_only_leftovers(tmp_path):
    for folder in (".checkpoint-5.partial", ".checkpoint-4.removed", "checkpoint-3", ".git"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    for file in (".run.json.123.partial", "run.json", ".lock", "a.partial"):
        (tmp_path / file).touch()
    (tmp_path / ".link.removed").symlink_to(tmp_path / "checkpoint-3")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".git", ".lock", "a.partial", "checkpoint-3", "run.json"]
    assert names(tmp_path / "checkpoint-3") == ["file"]


STAGING = """
import sys
from pathlib import Path
from simpo.runs.files import remove_folder, staged_folder, write_text
folder = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    final = folder / f"checkpoint-{i % 3}"
    if final.exists():
        remove_folder(final)
    with staged_folder(final) as partial:
        for name in range(8):
            (partial / str(name)).write_text("x" * 1000)
    write_text(folder / "state.txt", f"{i} " * 1000)
"""


def test_a_kill_leaves_complete_folders_or_none(tmp_path, start, kill_after):
    seen = 0
    for attempt in range(4):
        kill_after(start(STAGING, tmp_path), 0.05 + 0.017 * attempt)
        for path in tmp_path.glob("checkpoint-*"):
            assert names(path) == [str(name) for name in range(8)]
            assert all(file.stat().st_size == 1000 for file in path.iterdir())
            seen += 1
        if (tmp_path / "state.txt").exists():
            assert len(set((tmp_path / "state.txt").read_text().split())) == 1
            assert (tmp_path / "state.txt").read_text().count(" ") == 1000
        remove_leftovers(tmp_path)
        assert not list(tmp_path.glob(".*"))
    assert seen


WRITERS = {
    "safetensors": (lambda path: save_file({"w": torch.zeros(1 << 20)}, path), SafetensorError),
    "torch": (lambda path: torch.save({"w": torch.zeros(1 << 20)}, path), RuntimeError),
    "torch, many": (lambda path: torch.save([torch.zeros(100) for _ in range(5000)], path), RuntimeError),
    "numpy": (lambda path: np.save(path.with_suffix(".npy"), np.zeros(1 << 20)), OSError),
    "text": (lambda path: path.write_text("x" * (1 << 20)), OSError),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_recognized_whichever_library_writes(small_disk, name):
    write, raised = WRITERS[name]
    with pytest.raises(raised):
        write(small_disk / "plain")
    for path in small_disk.iterdir():
        path.unlink()
    final = small_disk / "checkpoint-5"
    with pytest.raises(SimpoError) as caught, staged_folder(final) as partial:
        write(partial / "file")
    assert str(caught.value) == f"{final}: {FULL}"
    assert names(small_disk) == []


def test_a_full_device_is_recognized():
    with pytest.raises(SimpoError, match="no space left on the disk"), disk_errors("/dev/full"):
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_permission_is_reported(code):
    with pytest.raises(SimpoError) as caught, disk_errors("runs/a"):
        raise OSError(code, os.strerror(code))
    assert (
        str(caught.value) == f"runs/a: cannot be written ({os.strerror(code)}); make it writable or use another folder"
    )


def test_other_write_errors_are_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SimpoError) as caught:
        write_text(tmp_path / "file" / "x", "")
    assert str(caught.value) == f"{tmp_path}/file/x: cannot be written: File exists"
    with pytest.raises(SimpoError, match=r"^a: cannot be written: Input/output error$"), disk_errors("a"):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")
    text = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"  # on a disk with free space
    with pytest.raises(SimpoError) as caught, disk_errors(tmp_path):
        raise RuntimeError(f"{text}\nException raised from ...")
    assert str(caught.value) == f"{tmp_path}: cannot be written: {text}"


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("CUDA out of memory"), SimpoError("data: iostream error")]
)
def test_errors_unrelated_to_the_disk_pass_through(error):
    with pytest.raises(type(error)) as caught, disk_errors("a"):
        raise error
    assert caught.value is error


def test_a_folder_without_permission_is_reported(locked_folder):
    with pytest.raises(SimpoError) as caught:
        write_text(locked_folder / "x", "")
    reason = "cannot be written (Permission denied); make it writable or use another folder"
    assert str(caught.value) == f"{locked_folder}/x: {reason}"
