"""The environment record names versions and hardware, but no people."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import subprocess
import sys

import pytest
import torch

from simpo.runs.manifest import environment


def git(folder, *arguments):
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_environment_describes_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # "+cu130" may be missing
    assert None not in found["packages"].values()
    assert found["cpu"]["model"]
    assert 1 <= found["cpu"]["cores"] <= 4096
    assert found["ram_bytes"] > 1 << 28
    assert isinstance(found["gpus"], list)
    assert found["git"] is None
    assert json.loads(json.dumps(found)) == found


def test_the_commit_of_the_working_directory_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    assert environment()["git"] is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    assert environment()["git"] == {"commit": git(tmp_path, "rev-parse", "HEAD")}


def test_missing_external_programs_are_tolerated(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert (environment()["git"], environment()["gpus"]) == (None, [])


def test_no_person_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(environment())
    names = {socket.gethostname(), getpass.getuser(), "hf_secret", str(tmp_path)} - {""}
    assert not [name for name in names if f'"{name}' in text or f"/{name}" in text]


def test_torch_is_not_imported():
    code = (
        "import sys, simpo.runs.folder, simpo.runs.manifest as p; p.environment(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"core.fsmonitor": "touch ran; true"},
        {"core.hooksPath": "hooks"},
        {"filter.own.clean": "touch ran; cat"},
        {"filter.own.process": "touch ran"},
        {"remote.origin.promisor": "true", "remote.origin.uploadpack": "touch ran; true"},
        {"include.path": "more"},
    ],
)
def test_programs_configured_in_a_repository_are_not_run(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / ".gitattributes").write_text("* filter=own\n")
    git(tmp_path, "add", "code.py", ".gitattributes")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / ".git/more").write_text('[filter "own"]\n\tclean = touch ran; cat\n')
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/post-index-change").write_text("#!/bin/sh\ntouch ran\n")
    (tmp_path / "hooks/post-index-change").chmod(0o755)
    for key, value in settings.items():
        git(tmp_path, "config", key, value)
    (tmp_path / "code.py").write_text("2")
    found = environment()["git"]
    assert not (tmp_path / "ran").exists()
    assert len(found["commit"]) == 40


PARENT = """
import subprocess, sys
held = bytearray(600 * 2**20)
held[::4096] = bytes(len(held[::4096]))
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
CHILD = """
from simpo.runs.manifest import peak_memory
print(peak_memory()["host"])
held = bytearray(300 * 2**20)
held[::4096] = bytes(len(held[::4096]))
del held
print(peak_memory()["host"])
"""


def test_peak_memory_is_that_of_this_process_alone():
    """Its parent uses 600 MiB more, as a launcher might; memory that the process has freed still counts."""
    command = [sys.executable, "-c", PARENT, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 400 * 2**20 and after - before > 250 * 2**20
