"""Every command takes its settings from a recipe, the command line, or both, and documents them."""

from __future__ import annotations

import re

import pytest

from simpo.cli import COMMANDS, command_named, main
from simpo.evaluation.runner import BENCHMARKS

NAMES = [name for name in sorted(COMMANDS) if name != "evaluate"] + [f"evaluate {name}" for name in BENCHMARKS]


@pytest.mark.parametrize("command", NAMES)
def test_help_has_two_examples_and_describes_every_setting(command, capsys):
    name, *rest = command.split()
    with pytest.raises(SystemExit) as caught:
        command_named(name)([*rest, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith(f"usage: simpo {command} [RECIPE.yaml]")
    examples = text.partition("examples:\n")[2].partition("\n\n")[0]
    assert len(re.findall(rf"^  simpo {command}\b", examples, re.MULTILINE)) == 2
    settings = text.partition("the command line takes precedence.")[2].partition("transformers' TrainingArguments:")[0]
    entries = re.split(r"\n  (?=--|[A-Z_]+, --)", settings)[1:]
    without = [entry.split()[0] for entry in entries if not re.search(r"[a-z].* \[", " ".join(entry.split()[1:]))]
    assert entries and not without


def test_training_help_lists_the_objectives_and_explains_beta(capsys):
    with pytest.raises(SystemExit):
        command_named("train")(["--help"])
    text = " ".join(capsys.readouterr().out.partition("the command line takes precedence.")[2].split())
    objective = re.search(r"--objective (.*?)\]", text)[1]
    assert {"simpo", "dpo", "kto"} <= set(re.findall(r"\w+", objective))
    assert "2.0" in re.search(r"--beta (.*?)\]", text)[1]


@pytest.mark.parametrize(
    ("command", "text", "parts"),
    [
        (
            "sample",
            "prompts: p.jsonl\noutput_dir: out\ntemprature: 1\nn: many",
            ["3 problems", ":3: temprature", ":4: n:"],
        ),
        ("sample", "model: m\nprompts: p.jsonl\noutput_dir: out\nn: 0", ["recipe.yaml:4: n: must be at least 1"]),
        (
            "annotate",
            "responses: r.jsonl\noutput_dir: out\njudge_ulr: x",
            [":3: judge_ulr", "judge_url?", "annotator is"],
        ),
        ("compare", "a: x.json\nb: y.json\njudge: [exact\n", ["recipe.yaml:4: not YAML"]),
        (
            "pair",
            "annotated: a\noutput_dir: out\npairs: best",
            ["recipe.yaml:3: pairs: 'best' is not one of best_worst"],
        ),
        ("inspect", "model: m\ndata: d.jsonl\ntruncation: cut", ["recipe.yaml:3: truncation: 'cut' is not one of"]),
        ("merge", "model: m\nsave_dtype: int8", ["recipe.yaml:2: save_dtype: 'int8'", "output_dir is missing"]),
        ("chat", "temperature: -1", ["recipe.yaml:1: temperature", "model_name_or_path is missing"]),
        ("evaluate gsm8k", "model: m\noutput_dir: out\nlimit: 0", ["recipe.yaml:3: limit: must be at least 1"]),
        (
            "evaluate alpaca_eval",
            "output_dir: out\nanotations: a.json",
            [":2: anotations: unknown key", "annotations?"],
        ),
        ("evaluate mt_bench", "model: m\nquestions: q.jsonl", ["output_dir is missing"]),
    ],
)
def test_mistakes_in_a_recipe_are_located(command, text, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    assert main([*command.split(), "recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
