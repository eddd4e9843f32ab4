"""``benchmarks/gpu.sh`` on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(device: str, output: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"DEVICE": device, "PYTHON": sys.executable, "OUTPUT": str(output)}
    return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_passes_and_claims_nothing_about_cuda(tmp_path) -> None:
    done = run("cpu", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing was verified on CUDA" in done.stdout
    assert "0 FAILED" in done.stdout
    variants = json.loads((tmp_path / "8b.json").read_text())["variants"]
    assert [(variant["name"], variant.get("failed")) for variant in variants] == [
        ("simpo 512,checkpointed=0.5", None),
        ("simpo", None),
    ]
    entrants = json.loads((tmp_path / "peers.json").read_text())["entrants"]
    assert [entrant["name"] for entrant in entrants] == ["loop alone"]
    skipped = [line for line in done.stdout.splitlines() if "needs CUDA" in line]
    assert skipped
    assert all(line.startswith("skipped: ") for line in skipped)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests behavior without a GPU")
def test_without_a_gpu_it_exits_with_code_2(tmp_path) -> None:
    done = run("cuda", tmp_path)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
