"""The comparison of objectives: correct metrics, tuning, and stored measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.compare_objectives import MODIFIED, Tuned, clustered_mean, pairs_that_fit, report, table_rows, tune
from benchmarks.objective_runs import Bench, HeldOut, Measured, train
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import compare_objectives
from simpo.data.settings import TokenizeSettings
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES
from simpo.training.batches import comparisons_of
from simpo.training.preference import PreferenceConfig
from simpo.world.pairs import make_pairs, write_model, write_pairs

FOUND = Measured([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0], [0.1] * 4, [-0.1] * 4, [0.01] * 4, 0.3)


@pytest.fixture
def folder(tmp_path):
    """A tiny model with twelve training and six held-out pairs."""
    write_model(tmp_path / "model", seed=0)
    write_pairs(tmp_path / "train.jsonl", 12, seed=0)
    write_pairs(tmp_path / "test.jsonl", 6, seed=0, held_out=True)
    return tmp_path


def test_metrics_agree_with_the_models(folder):
    name = str(folder / "model")
    start, given = (AutoModelForCausalLM.from_pretrained(name) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = make_pairs(6, 0, held_out=True)
    held_out = prepare(Dataset.from_list(rows), tokenizer, TokenizeSettings(max_length=128), label="eval").dataset
    keys = {"objective": "dpo", "learning_rate": 1e-3, "max_length": 128, "per_device_train_batch_size": 4}
    keys |= {"save_strategy": "no", "report_to": "none"}
    bench = HeldOut(AutoModelForCausalLM.from_pretrained(name), comparisons_of(held_out, range(6)))
    trainer, seconds = train(given, tokenizer, Dataset.from_list(make_pairs(12, 0)), keys, folder / "out")
    found = bench.measure(trainer.model, trainer.objective, seconds)
    preferences = bench.start_preferences()
    trainer.save_model(str(folder / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")

    for number, row in enumerate(rows):
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ratios, changes, divergences, starts = [], [], [], []
        for side in ("chosen", "rejected"):
            response = [*tokenizer(row[side], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                before, after = (
                    model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (start, trained)
                )
            own = before.gather(1, torch.tensor(response)[:, None])
            starts.append((own.mean(), own.sum(), len(response)))
            change = (after - before).gather(1, torch.tensor(response)[:, None]).squeeze(1)
            ratios.append(change.sum().item())
            changes.append(change.mean().item())
            divergences += (after.exp() * (after - before)).sum(-1).tolist()
        assert preferences[number].tolist() == [bool(one > other) for one, other in zip(*starts, strict=True)]
        assert found.correct[number] == (ratios[0] > ratios[1])
        assert found.apart[number] == (changes[0] > changes[1])
        assert found.chosen[number] == pytest.approx(changes[0], rel=1e-3, abs=1e-5)
        assert found.rejected[number] == pytest.approx(changes[1], rel=1e-3, abs=1e-5)
        assert found.kl[number] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found.step_seconds > 0


@pytest.fixture
def run_main(folder, monkeypatch):
    """Call the command on the fixture's files with changed options; return the exit code."""

    def call(**options) -> int:
        given = {"model": folder / "model", "train": folder / "train.jsonl", "test": folder / "test.jsonl"}
        given |= {"output_dir": folder / "out", "rows": 4, "tuning": 2, "held_out": 4, "max_length": 128}
        given |= {"pairs_per_step": 2, "threads": 1}
        words = [word for key, value in (given | options).items() for word in (f"--{key}", *str(value).split())]
        monkeypatch.setattr("sys.argv", ["", *words])
        return compare_objectives.main()

    return call


def test_measurements_are_stored_and_failures_reported(run_main, folder, capsys, monkeypatch):
    rest = {"objectives": "dpo", "learning_rates": "1e-3 1e-2", "seeds": "1 2"}
    monkeypatch.setattr(compare_objectives, "MODIFIED", ({"objective": "dpo", "ld_alpha": 0.5, "sft_weight": 1.0},))
    assert run_main(**rest) == 0
    output = capsys.readouterr().out
    assert output.startswith("| objective")
    assert "ld_alpha 0.5, sft_weight 1.0 at 1e-3 failed: ld_alpha: " in output
    assert len(list((folder / "out").glob("dpo-*.json"))) == 3  # two rates, and the better one with the other seed
    monkeypatch.setattr("benchmarks.objective_runs.train", None)  # stored measurements are not repeated
    monkeypatch.setattr(compare_objectives, "MODIFIED", ())
    assert run_main(**rest) == 0
    assert set(capsys.readouterr().out.splitlines()) < set(output.splitlines())
    assert run_main(**rest, max_length=64) == 2
    assert "max_length" in capsys.readouterr().err


def test_tuning_pairs_must_not_be_training_pairs(run_main, folder, capsys):
    assert run_main(rows=8, tuning=6) == 2
    assert "--tuning" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_first_or_last_pairs_that_fit_are_taken(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turns = ["prompt", "chosen", "rejected"]

    def fits(row) -> bool:
        lengths = [len(tokenizer(row[turn], add_special_tokens=False).input_ids) for turn in turns]
        return 3 + lengths[0] + max(lengths[1:]) + 1 <= 40  # begin, user and assistant; end of turn

    rows = [row for row in make_pairs(12, 0) if fits(row)]
    assert 2 < len(rows) < 12
    source, model = str(folder / "train.jsonl"), str(folder / "model")
    assert list(map(json.loads, pairs_that_fit(source, len(rows) - 1, model, 40))) == rows[:-1]
    assert list(map(json.loads, pairs_that_fit(source, len(rows) - 1, model, 40, last=True))) == rows[1:]
    with pytest.raises(SimpoError, match=f"{len(rows)} pairs .* max_length 40; 12 are"):
        pairs_that_fit(source, 12, model, 40)


def test_all_objectives_and_valid_modifiers_are_rows():
    rows = table_rows(list(OBJECTIVES))
    assert [keys["objective"] for keys in rows.values()][: len(OBJECTIVES)] == list(OBJECTIVES)
    assert len(rows) == len(OBJECTIVES) + len(MODIFIED)
    for keys in rows.values():
        PreferenceConfig("unused", **keys)  # rejects keys that an objective does not have
    assert list(table_rows(["ipo", "bco"])) == ["ipo", "bco", "ipo, length_normalized true"]
    with pytest.raises(SimpoError, match="nothing"):
        table_rows(["ipo", "nothing"])


def test_the_first_seed_chooses_the_rate_for_the_others():
    tuning_of = {
        "1e-5": FOUND,  # right on one of the two tuning pairs
        "1e-4": replace(FOUND, correct=[1.0, 1.0, 0.0, 0.0], kl=[0.5] * 4),
        "1e-3": replace(FOUND, correct=[1.0, 1.0, 0.0, 1.0]),  # as accurate there, and moved less
        "1e-2": "step 2: the loss is not finite",
    }
    asked = []

    class Fake(Bench):
        def __init__(self) -> None:
            self.clusters = np.array([0, 1])

        def run(self, label, keys, rate, seed):
            asked.append((rate, seed))
            return tuning_of[rate]

    row = tune("dpo", {"objective": "dpo"}, list(tuning_of), [7, 8, 9], Fake())
    assert row.rate == "1e-3"
    assert row.runs == [tuning_of["1e-3"]] * 3
    assert asked == [*((rate, 7) for rate in tuning_of), ("1e-3", 8), ("1e-3", 9)]
    assert row.failures == ["dpo at 1e-2 failed: step 2: the loss is not finite"]


def test_the_table_has_means_over_seeds_and_differences_from_dpo():
    other = replace(FOUND, correct=[0.0, 0.0, 0.0, 1.0], apart=[0.0, 0.0, 1.0, 1.0], step_seconds=0.6)
    table = {"ipo": Tuned("1e-4", [other, other], []), "dpo": Tuned("1e-5", [FOUND, other], ["dpo at 1 failed: why"])}
    lines = list(report(table, np.array([0, 1])))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [(row[0], row[1], row[2], row[3]) for row in cells] == [
        ("`ipo`", "1e-4", "0.500", "0.500 to 0.500"),
        ("`dpo`", "1e-5", "0.750", "0.500 to 1.000"),
    ]
    assert [row[4][:5] for row in cells] == ["1.000", "0.750"]
    assert cells[0][5].startswith("+0.250")
    assert cells[1][5] == ""
    assert [row[9] for row in cells] == ["1.33", "1.00"]  # 0.6 relative to the median of 0.3 and 0.6
    assert "dpo at 1 failed: why" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_pairs_with_the_same_prompt_are_resampled_together():
    """Duplicating every pair adds no information, so the interval stays the same."""
    values = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    once = clustered_mean(values, np.arange(40))
    copied = clustered_mean(np.repeat(values, 5), np.repeat(np.arange(40), 5))
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high))
    alone = clustered_mean(np.repeat(values, 5), np.arange(200))
    assert alone.high - alone.low < 0.6 * (once.high - once.low)
