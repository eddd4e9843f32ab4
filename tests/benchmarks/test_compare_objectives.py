"""The table of all objectives: a run's metrics agree with its models, and results are kept."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from subprocess import CompletedProcess

import pytest
import torch
from benchmarks.compare_objectives import Budget, fitting, report
from benchmarks.objective_runs import FILE_NAME, Measured, work
from tests.forked import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import compare_objectives
from simpo.errors import SimpoError
from simpo.world.pairs import make_pairs, write_model, write_pairs

FOUND = Measured(0.7, 0.75, 0.6, 0.9, 16, 0.5, -0.1, -0.2, 0.01, 0.3, 500.0)


@pytest.fixture
def budget(tmp_path) -> Budget:
    """Three steps of four pairs on a tiny model; of six held-out pairs two choose the learning rate."""
    write_model(tmp_path / "model", seed=0)
    write_pairs(tmp_path / "train.jsonl", 12, seed=0)
    write_pairs(tmp_path / "test.jsonl", 6, seed=0, held_out=True)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    rest = {"max_length": 128, "pairs_per_step": 4, "epochs": 1, "seed": 0, "threads": 1}
    return Budget(str(tmp_path / "model"), **files, tuning=2, folder=tmp_path, **rest)


def test_a_runs_metrics_agree_with_its_models(budget, monkeypatch):
    folder = budget.run_folder("dpo", "1e-3")
    work(budget.arguments("dpo", "1e-3"), budget.tuning)
    monkeypatch.setattr(compare_objectives.subprocess, "run", None)  # what has been measured is not run again
    found = compare_objectives._run(budget, "dpo", "1e-3")
    assert (folder / FILE_NAME).exists()

    start, trained = (AutoModelForCausalLM.from_pretrained(where) for where in (budget.model, folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    changes: dict[str, list] = {"chosen": [], "rejected": []}
    divergences, correct = [], []
    for number, row in enumerate(make_pairs(6, 0, held_out=True)):
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ratios = []
        for side, moved in changes.items():
            response = [*tokenizer(row[side], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                before, after = (
                    model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (start, trained)
                )
            taken = torch.tensor(response)[:, None]
            change = (after - before).gather(1, taken).squeeze(1)
            ratios.append(change.sum().item())
            if number >= budget.tuning:
                moved.append(change.mean().item())
                divergences += (after.exp() * (after - before)).sum(-1).tolist()
        correct.append(ratios[0] > ratios[1])
    for side, moved in changes.items():
        assert getattr(found, side) == pytest.approx(sum(moved) / len(moved), rel=1e-3)
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found.tuning == pytest.approx(sum(correct[:2]) / 2)
    assert found.accuracy == pytest.approx(sum(correct[2:]) / 4)
    assert found.pairs == 4
    assert found.step_seconds > 0
    assert found.peak_mib > 100


def run_module(name, arguments):
    sys.argv[1:] = arguments
    runpy.run_module(name, run_name="__main__")
    return 0


def test_a_run_that_fails_is_reported_with_its_own_error(budget, tmp_path, monkeypatch):
    def forked(command, **options):  # and not started, which takes ten seconds
        ended = run_ranks(1, run_module, command[2], command[3:], folder=tmp_path)
        return CompletedProcess(command, ended.codes[0], ended.stdout, ended.stderr)

    monkeypatch.setattr(compare_objectives.subprocess, "run", forked)
    gone = replace(budget, model="/nowhere/at/all")
    assert compare_objectives._run(gone, "dpo", "1e-3") == "model_name_or_path: there is no folder '/nowhere/at/all'"


def test_the_first_or_last_pairs_that_fit_are_taken(budget):
    tokenizer = AutoTokenizer.from_pretrained(budget.model)
    turns = ["prompt", "chosen", "rejected"]

    def fits(row) -> bool:
        lengths = [len(tokenizer(row[turn], add_special_tokens=False).input_ids) for turn in turns]
        return 3 + lengths[0] + max(lengths[1:]) + 1 <= 40  # begin, user and assistant; end of turn

    rows = [row for row in make_pairs(12, 0) if fits(row)]
    assert 2 < len(rows) < 12
    source = str(budget.train)
    assert list(map(json.loads, fitting(source, len(rows) - 1, budget.model, 40))) == rows[:-1]
    assert list(map(json.loads, fitting(source, len(rows) - 1, budget.model, 40, last=True))) == rows[1:]
    with pytest.raises(SimpoError, match=f"{len(rows)} of .* max_length 40, not 12"):
        fitting(source, 12, budget.model, 40)


def test_pairs_that_are_trained_on_choose_no_learning_rate(budget, monkeypatch, capsys):
    given = {"model": budget.model, "train": budget.train, "test": budget.test, "output_dir": budget.folder / "out"}
    given |= {"rows": 8, "tuning": 6, "held_out": 4, "max_length": 128}
    monkeypatch.setattr("sys.argv", ["", *(f"--{key}={value}" for key, value in given.items())])
    assert compare_objectives.main() == 2
    assert "--tuning: " in capsys.readouterr().err
    assert not given["output_dir"].exists()


def test_every_objective_is_shown_at_its_best_rate():
    runs = {
        ("dpo", "1e-5"): FOUND,
        ("dpo", "1e-4"): replace(FOUND, tuning=0.8, accuracy=0.1, kl=0.5, step_seconds=0.2),
        ("dpo", "1e-3"): replace(FOUND, tuning=0.8, accuracy=0.2, kl=0.1),
        ("ipo", "1e-5"): "step 2: the loss is not finite",
        ("kto", "1e-5"): replace(FOUND, step_seconds=0.45),
    }
    lines = list(report(runs, 16))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [(row[0], row[1], row[7]) for row in cells] == [
        ("`dpo`", "1e-3", "1.00"),  # of two that are as good, the one that moved less
        ("`kto`", "1e-5", "1.50"),
    ]
    assert any("ipo at 1e-5 failed: step 2" in line for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
