"""``simpo sample`` in two processes, as with ``torchrun``: the same bytes as one, and failures that end both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.forked import run_ranks

from simpo import SimpoError, cli
from simpo.generation.engine import TransformersEngine
from simpo.generation.sample import Processes


def answer_thrice(folder: Path, arguments: list[str]) -> int:
    """Do a run from scratch, a run begun by a single process, and a run in which process 1 fails."""
    rank, calls, answer = os.environ["RANK"], [], TransformersEngine.generate
    for name, sabotaged in (("together", False), ("begun", False), ("failing", rank == "1")):

        def counted(self, *args, sabotaged=sabotaged):
            calls.append(1)
            if sabotaged and len(calls) > 1:
                raise SimpoError("planted: the mistake of one process")
            return answer(self, *args)

        TransformersEngine.generate = counted
        calls.clear()
        code = cli.main([*arguments, f"--output_dir={folder}/{name}"])
        print(f"process {rank}: {name} ended with {code} after {len(calls)} chunks", flush=True)
    return code


def options(world: Path, **changes: object) -> list[str]:
    given = {"n": 2, "max_new_tokens": 6, "chunk_size": 4, "temperature": 1.0} | changes
    return ["sample", str(world / "model"), str(world / "train.jsonl"), *(f"--{k}={v}" for k, v in given.items())]


@pytest.fixture(scope="module")
def alone(chat_world, tmp_path_factory):
    """A single-process run with 12 chunks."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun
    assert cli.main(options(chat_world, output_dir=folder / "whole")) == 0
    torch.set_num_threads(threads)
    return folder / "whole"


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("responses.jsonl", "results.json")]


def begin(world: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a single-process run unfinished after five chunks."""
    calls, answer = [], TransformersEngine.generate

    def stopped(self, *args):
        calls.append(1)
        if len(calls) > 5:
            raise SimpoError("planted: enough")
        return answer(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stopped)
        assert cli.main(options(world, output_dir=output)) == 2


@pytest.mark.slow
def test_two_processes_write_the_same_files_as_one(chat_world, alone, tmp_path, monkeypatch):
    begin(chat_world, tmp_path / "begun", monkeypatch)
    done = run_ranks(2, answer_thrice, tmp_path, options(chat_world), folder=tmp_path, timeout=100)
    output = done.stdout
    for rank in (0, 1):
        assert f"process {rank}: together ended with 0 after 6 chunks" in output, done.stderr
    assert "process 0: begun ended with 0 after 4 chunks" in output
    assert "process 1: begun ended with 0 after 3 chunks" in output
    assert output.count("continuing: 20 of 48 responses") == 1
    assert output.count(f"responses: {tmp_path}/together/responses.jsonl") == 1  # by one process only
    assert bytes_of(tmp_path / "together") == bytes_of(tmp_path / "begun") == bytes_of(alone)
    assert not list((tmp_path / "together").glob(".chunks-*"))

    assert any(done.codes)
    assert done.stderr.count("simpo: error: planted: the mistake of one process") == 1
    assert "Traceback" not in done.stderr
    left = [len((tmp_path / "failing" / f".chunks-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert left[0] > 0 and left[1] == 1
    assert cli.main([*options(chat_world), f"--output_dir={tmp_path}/failing"]) == 0  # a single process continues
    assert bytes_of(tmp_path / "failing") == bytes_of(alone)


def test_vllm_requires_a_single_process(chat_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simpo.generation.sample.Processes.join", lambda: Processes(0, 2))
    assert cli.main(options(chat_world, engine="vllm", output_dir=tmp_path / "out")) == 2
    assert "engine: vllm uses all GPUs from one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
