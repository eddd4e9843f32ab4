"""Fixtures: a disk that really fills up, and processes that are really killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest


@pytest.fixture
def small_disk(make_disk):
    """A folder on a separate disk with room for 256 KiB."""
    return make_disk("256k")


@pytest.fixture
def locked_folder(tmp_path):
    """A folder this process cannot enter, whichever user runs the tests."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)


@pytest.fixture
def start():
    """``start(code, *arguments)``: a Python process running ``code`` that has printed its first line."""
    processes = []

    def begin(code: str, *arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        process.first_line = process.stdout.readline().strip()
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def kill_after():
    """``kill_after(process, seconds)``: send SIGKILL and wait for the process to end."""

    def kill(process: subprocess.Popen, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        assert process.poll() is None, "it ended by itself"
        process.kill()
        process.wait()

    return kill
