"""The quick start's commands work, in order, on less data."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpo.cli import main
from simpo.runs.results import read_results
from simpo.world.pairs import write_model, write_prompts, write_sft

_PAGE = Path(__file__).parents[2] / "docs/quick-start.md"
_BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"cat > (\S+) <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)


def _blocks() -> list[str]:
    """Return the code blocks after the installation and before real models."""
    text = _PAGE.read_text(encoding="utf-8")
    return _BLOCK.findall(text[text.index("## Fine-tune") : text.index("## With a real model")])


def _commands(block: str) -> Iterator[list[str]]:
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("simpo: "):  # quoted messages
            yield shlex.split(line)


def _write_demo(folder: Path) -> None:
    """Write the parts of the demo's folder that the page uses."""
    write_model(folder / "start", seed=0)
    write_sft(folder / "sft.jsonl", 1000, seed=0)
    write_prompts(folder / "prompts.jsonl", 60, seed=0)
    write_prompts(folder / "held-out.jsonl", 40, seed=0, held_out=True)


@pytest.mark.slow
def test_every_command_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _write_demo(tmp_path / "runs/demo-1")
    ran = []
    for block in _blocks():
        for name, content in _HERE_DOCUMENT.findall(block):
            Path(name).write_text(content)
        for program, *arguments in _commands(_HERE_DOCUMENT.sub("", block)):
            monkeypatch.setattr("sys.stdin", io.StringIO("Sort 5, 2, 9.\n/exit\n"))
            assert program == "simpo"
            assert main(arguments) == 0, capsys.readouterr().err
            ran.append(arguments[0])
    pairs = ["annotate", "annotate", "pair", "pair"]
    assert ran == ["sft", "sample", "sample", *pairs, "inspect", "train", "sample", "compare", "chat"]
    assert "win_rate" in capsys.readouterr().out
    assert read_results(Path("runs/my-simpo/results.json")).command == "train"
