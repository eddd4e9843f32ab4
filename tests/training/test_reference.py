"""The reference is the policy at the start of training: computed once, cached, and never anything else."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants
from torch.profiler import ProfilerActivity, profile

from simpo import SimpoError
from simpo.models.adapters import add_adapter
from simpo.training import reference
from simpo.training.batches import REF_LOGPS
from simpo.training.reference import policy_fingerprint

SETTINGS = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}


@pytest.fixture
def counted(make_trainer):
    """``counted(rows, **settings)``: a DPO trainer, and the number of rows its reference has scored so far."""

    def make(rows, **settings):
        trainer = make_trainer(rows, **{"objective": "dpo"} | settings)
        scored, response_logps = [], trainer.response_logps
        trainer.response_logps = lambda part: (scored.append(len(part)), response_logps(part))[1]
        return trainer, scored

    return make


def flat(logps) -> list[float]:
    return [logp for several in logps for logp in several]


def test_reference_log_probabilities_come_from_the_initial_model(counted, pairs, naive_responses, make_model):
    rows = pairs(7)
    trainer, _ = counted(rows)
    expected = naive_responses(make_model("gpt2"), rows["prompt_ids"][:], rows["response_ids"][:]).logp.tolist()
    assert flat(trainer.add_columns(rows)[REF_LOGPS]) == pytest.approx(expected, abs=1e-9)


def test_the_reference_is_computed_once_for_all_objectives(counted, pairs, monkeypatch):
    monkeypatch.setattr(reference, "_ROWS_PER_FILE", 3)
    rows, held_out = pairs(8), pairs(3, seed=1)
    first, scored = counted(rows, eval_dataset=held_out)
    first.train()
    assert scored == [3, 3, 2, 3]
    for settings in ({}, {"objective": "ipo"}, {"seed": 3, "max_batch_tokens": 40}):
        other, scored = counted(rows, eval_dataset=held_out, **settings)
        other.train()
        other.evaluate()
        assert scored == []
        assert other.add_columns(rows)[REF_LOGPS][:] == first.add_columns(rows)[REF_LOGPS][:]
    kto, scored = counted(rows, objective="kto")
    kto.add_columns(kto.train_dataset)
    assert scored == [3, 3, 2]  # only the mismatched responses


def test_a_killed_reference_computation_continues(counted, pairs, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(reference, "_ROWS_PER_FILE", 2)
    rows = pairs(7)
    trainer, scored = counted(rows)
    expected = trainer.add_columns(rows)[REF_LOGPS][:]
    (folder,) = (path for path in (tmp_path / "reference").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{number}.json" for number in range(4)]
    (folder / "00003.json").unlink()
    (folder / "00001.json").write_text("[1.0")
    text = (folder / "00000.json").read_text()
    (folder / "00000.json").write_text(text.replace("-", "-1", 1))
    again, scored = counted(rows)
    assert again.add_columns(rows)[REF_LOGPS][:] == expected
    assert scored == [2, 2, 1]
    for number in (0, 1):
        assert f"0000{number}.json is damaged; computing it again" in caplog.text


def test_an_unnamed_cache_is_found_by_its_fingerprint(counted, pairs, monkeypatch, tmp_path, make_model):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    for std in (0.3, 0.2):
        trainer, scored = counted(pairs(3), reference_cache=None, model=make_model("gpt2", std=std))
        trainer.add_columns(pairs(3))
        assert scored == [3]
    assert len(list((tmp_path / "home" / "simpo" / "reference").iterdir())) == 2


def test_a_cache_folder_of_another_model_is_rejected(counted, pairs, make_model, tmp_path):
    counted(pairs(3))[0].add_columns(pairs(3))
    with pytest.raises(SimpoError, match=f"reference_cache: {tmp_path}.* of another model or precision; use"):
        counted(pairs(3), model=make_model("gpt2", std=0.2))
    (tmp_path / "reference" / "policy.json").write_text("{")
    with pytest.raises(SimpoError, match=r"reference_cache: .*policy.json cannot be read"):
        counted(pairs(3))


def test_a_cache_folder_without_its_fingerprint_is_not_used(counted, pairs, make_model, tmp_path):
    rows = pairs(3)
    first, other = counted(rows)[0].add_columns(rows)[REF_LOGPS][:], make_model("gpt2", std=0.2)
    (tmp_path / "reference" / "policy.json").unlink()
    trainer, scored = counted(rows, model=other)
    assert trainer.add_columns(rows)[REF_LOGPS][:] != first
    assert scored == [3]


def test_the_fingerprint_covers_everything_that_affects_the_policy(make_model):
    def fingerprint(precision="no", **changes):
        return policy_fingerprint(make_model("gpt2", **changes), precision)

    assert fingerprint() == fingerprint()
    assert (
        len(
            {
                fingerprint(),
                fingerprint("bf16"),
                fingerprint(dtype=torch.float32),
                fingerprint(std=0.2),
                fingerprint(activation_function="relu"),
            }
        )
        == 5
    )
    model = make_model("gpt2")
    before = policy_fingerprint(model, "no")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-12
    assert policy_fingerprint(model, "no") != before


def test_a_new_adapter_does_not_change_the_fingerprint(make_model):
    """So runs with other adapters, and full fine-tuning, reuse the cache."""
    targets = ["c_attn", "c_fc", "wte"]
    given = [{"lora_r": 4}, {"lora_r": 8, "lora_target_modules": targets}, {"lora_modules_to_save": ["lm_head"]}]
    fresh = [add_adapter(make_model("gpt2"), settings) for settings in given]
    prints = [policy_fingerprint(model, "no") for model in [make_model("gpt2"), *fresh]]
    assert prints[0] == prints[1] == prints[2]
    assert prints[3] != prints[0]  # a fully trained layer does not count as unchanged
    for factor in ("lora_B", "lora_embedding_A"):
        (tensor, *_) = (tensor for name, tensor in fresh[1].named_parameters() if f".{factor}." in name)
        with torch.no_grad():
            tensor[0, 0] = 1e-12
        moved = policy_fingerprint(fresh[1], "no")
        assert moved not in prints
        with torch.no_grad():
            tensor.zero_()


def test_rows_passed_too_late_are_rejected(counted, pairs):
    trainer, _ = counted(pairs(4), max_steps=1)
    trainer.train()
    trainer.evaluate(pairs(4))
    with pytest.raises(SimpoError, match=r"eval_dataset: .*precompute_ref_log_probs"):
        trainer.evaluate(pairs(3, seed=1))


def test_a_non_finite_reference_is_reported(counted, random_comparisons, as_dataset, make_model):
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[22] = torch.nan  # only the last row, which no self-check sees, gets there
    rows = as_dataset(random_comparisons(*[(4, (5, 6))] * 18, (25, (2, 3))))
    with pytest.raises(SimpoError, match="the reference's log-probability is not finite; rows: made up:18; fix"):
        counted(rows, model=model)[0].train()


@pytest.mark.parametrize(
    "settings", [{}, {"precompute_ref_log_probs": False}, {"objective": "kto"}, {"kl_weight": 0.5}]
)
def test_a_resumed_run_has_the_same_reference(settings, make_trainer, make_model, pairs, tmp_path):
    """Not the checkpoint's policy, even if the cache is gone."""
    rows, held_out, settings = pairs(10), pairs(4, seed=2), {"objective": "dpo"} | SETTINGS | settings

    def run(name, resume=None, **changes):
        cache = {"reference_cache": str(tmp_path / name)}
        trainer = make_trainer(
            rows, model=make_model("gpt2", torch.float32), eval_dataset=held_out, **settings | cache | changes
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.score_rows(held_out)["loss"].tolist(), trainer.model.state_dict()

    losses, final_metrics, weights = run("a", save_strategy="steps", save_steps=4)
    for name in ("a", "b"):
        again = run(name, str(tmp_path / "checkpoint-4"))
        assert again[:2] == (losses, final_metrics)
        for key, weight in weights.items():
            torch.testing.assert_close(again[2][key], weight, rtol=0, atol=0, msg=key)


def products(trainer, batch) -> list[tuple[str, str]]:
    """Return every matrix product in a step, with its shapes."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        trainer.training_step(trainer.model, batch)
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")
    return sorted((e.name, str(e.input_shapes)) for e in profiled.events() if e.name.startswith(names))


def test_a_dpo_step_costs_the_same_as_a_simpo_step(make_trainer, make_model, pairs):
    """The same matrix products with the same shapes; computing the reference alongside adds more."""
    rows, counted = pairs(6), {}
    for name, settings in {"simpo": {}, "dpo": {}, "beside": {"precompute_ref_log_probs": False}}.items():
        objective = "dpo" if name == "beside" else name
        model = make_model("llama", torch.float32)
        trainer = make_trainer(rows, model=model, objective=objective, per_device_train_batch_size=6, **settings)
        trainer.create_optimizer()
        batch = next(iter(trainer.get_train_dataloader()))
        counted[name] = products(trainer, batch)
    assert len(counted["simpo"]) > 20
    assert counted["dpo"] == counted["simpo"]
    assert len(counted["beside"]) > len(counted["simpo"])
