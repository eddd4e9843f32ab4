"""The page about one GPU: its commands work in order on a tiny model, and its table matches simpo plan."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
from tests.planning.test_one_gpu_recipes import estimated, write_llama

from simpo.cli import main
from simpo.runs.results import read_results
from simpo.world.pairs import write_model, write_pairs, write_prompts

_ROOT = Path(__file__).parents[2]
_TEXT = (_ROOT / "docs/one-gpu.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| (\S+GB) \| (?:\[`(.+?)`\].*?|the same) \|.*\| ([\d.]+) GiB \| ([\d.]+) h \|$", re.MULTILINE)
# Replacements for names and sizes on the page and in its recipe.
_STAND_INS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "model",
    "princeton-nlp/llama3-ultrafeedback": "data",
    "reward:Skywork/Skywork-Reward-V2-Llama-3.1-8B": "logp:model",
    "simpo sample": "simpo sample --max_new_tokens 16",  # an untrained model does not stop on its own
    "simpo compare": "simpo compare --max_new_tokens 16",
    "simpo pair": "simpo pair --keep_unfinished true",
    "max_length: 2048": "max_length: 128",
    "--max_length 2048": "--max_length 128",
    "max_prompt_length: 1800": "max_prompt_length: 64",
    "per_device_train_batch_size: 128": "per_device_train_batch_size: 8",
    "eval_steps: 200": "eval_steps: 2",
}


def _with_stand_ins(text: str) -> str:
    for name, stand_in in _STAND_INS.items():
        text = text.replace(name, stand_in)
    return text


@pytest.mark.slow
def test_every_command_works(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Sort 5, 2, 9.\n/exit\n"))
    write_model(tmp_path / "model", seed=0)
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data/train.jsonl", 16, seed=0)
    write_pairs(tmp_path / "data/test.jsonl", 8, seed=0, held_out=True)
    write_prompts(tmp_path / "prompts.jsonl", 12, seed=0)
    ran = []
    for block in map(_with_stand_ins, _BLOCK.findall(_TEXT)):
        for line in block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "simpo"
            for recipe in (Path(one) for one in arguments if one.startswith("recipes/")):
                recipe.parent.mkdir(exist_ok=True)
                recipe.write_text(_with_stand_ins((_ROOT / recipe).read_text()))
            assert main(arguments) == 0, capsys.readouterr().err
            ran.append(arguments[0])
    own = ["sample", "annotate", "pair", "train"]
    assert ran == ["inspect", "plan", "train", "report", "compare", *own, "merge", "chat", "push"]
    trained = read_results(Path("outputs/one-gpu/results.json"))
    assert {metric.stage for metric in trained.metrics} >= {"before", "after"}
    assert {metric.name for metric in read_results(Path("outputs/one-gpu-compared/results.json")).metrics} >= {
        "win_rate/logp"
    }


def test_the_table_matches_simpo_plan(tmp_path) -> None:
    """To the digits shown."""
    write_llama(tmp_path)
    options = re.search(r"`simpo plan RECIPE --gpu CARD ([^`]+)`", _TEXT)[1]  # type: ignore[index]
    rows, recipe = _ROW.findall(_TEXT), ""
    assert len(rows) == 7
    for card, named, memory, hours in rows:
        recipe = named or recipe
        command = ["--command", "reward"] if recipe.startswith("reward") else []
        found = estimated(_ROOT / f"recipes/{recipe}.yaml", tmp_path, [*command, "--gpu", card, *options.split()])
        assert found["total_gib"] == pytest.approx(float(memory), abs=0.06), (card, recipe)
        assert found["total_seconds"] / 3600 == pytest.approx(float(hours), abs=0.06), (card, recipe)
