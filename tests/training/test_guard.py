"""The guard: what counts as a sign of collapse, and runs whose learning rate provokes one."""

from __future__ import annotations

import json
import re
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from simpo import cli
from simpo.errors import SimpoError
from simpo.training.checkpoints import last_good_checkpoint
from simpo.training.guard import Guard


@pytest.fixture
def guard(tmp_path):
    """A guard for a trainer without held-out rows, so it only sees logs."""
    args = SimpleNamespace(output_dir=str(tmp_path), torch_compile=False, seed=0)
    return Guard(SimpleNamespace(eval_dataset=None, command="train", args=args), "warn")


@pytest.mark.parametrize(
    "logs, sign",
    [
        ({"grad_norm": 101.0}, "gradient"),
        ({"grad_norm": 99.0}, None),
        ({"kl": 1.01}, "kl"),
        ({"eval_kl": 0.99}, None),
        ({"rollout/kl": 21.0, "rollout/length": 20.0}, "kl"),
        ({"rollout/kl": 19.0, "rollout/length": 20.0}, None),
        ({"loss": 1e9}, None),
    ],
)
def test_signs_of_collapse_in_logs(guard, logs, sign):
    for norm in (0.5, 1.0, 1.0, 1.0, 3.0):
        assert not list(guard._signs({"grad_norm": norm}))
    assert [found for found, _ in guard._signs(logs)] == ([] if sign is None else [sign])


def test_each_sign_is_reported_once(guard, caplog):
    for step in (3, 4):
        guard.on_log(None, SimpleNamespace(global_step=step), None, {"kl": 5.0})
    assert caplog.text.count("KL divergence") == 1 and "step 3" in caplog.text and "learning_rate" in caplog.text


def options(world, output, **changes):
    given = {
        "model_name_or_path": world / "model", "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl", "output_dir": output, "per_device_train_batch_size": 4,
        "max_steps": 8, "warmup_steps": 0, "logging_steps": 4, "eval_strategy": "no",
        "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3,
    } | changes  # fmt: skip
    return ["train", *(f"--{key}={value}" for key, value in given.items())]


def test_a_provoked_collapse_stops_at_the_last_good_checkpoint(chat_world, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(options(chat_world, output, learning_rate=0.3, guard="stop")) == 2
    error = capsys.readouterr().err
    kept = last_good_checkpoint(output)
    step = int(re.search(r"step (\d+): preferred held-out responses have lost", error)[1])
    assert step <= 4 and error.count("\n") == 1
    assert kept.name == f"checkpoint-{step - 1}" and str(kept) in error and "learning_rate" in error
    assert "guard: stop" in (output / "log.txt").read_text()


def test_a_run_stopped_by_its_gradient_norm_stops_there_again(chat_world, tmp_path, capsys, monkeypatch):
    """The same command continues from a checkpoint, where the norms logged before it still count."""
    assert cli.main(options(chat_world, tmp_path / "off", guard="off", logging_steps=1)) == 0
    logs = [json.loads(line) for line in (tmp_path / "off/metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in logs if "grad_norm" in line]
    ratios = {step: norms[step - 1] / median(norms[: step - 1]) for step in range(6, 9)}  # five norms are needed
    last = max(ratios, key=ratios.get)
    monkeypatch.setattr("simpo.training.guard._MAX_NORM_RATIO", ratios[last] * (1 - 1e-9))
    errors = []
    for _ in range(2):
        assert cli.main(options(chat_world, tmp_path / "run", guard="stop", logging_steps=1)) == 2
        errors.append(capsys.readouterr().err)
        assert last_good_checkpoint(tmp_path / "run").name == f"checkpoint-{last - 1}"
    assert errors[0] == errors[1]
    assert f"step {last}: " in errors[0] and f"median of {median(norms[: last - 1]):.3g}" in errors[0]


def test_warning_mode_does_not_change_training_and_a_healthy_run_has_no_warnings(chat_world, tmp_path):
    weights = {}
    for mode, rate in (("warn", 0.3), ("off", 0.3), ("warn", 1e-3)):
        output = tmp_path / f"{mode}-{rate}"
        given = {"learning_rate": rate, "guard": mode, "save_strategy": "no"}
        assert cli.main(options(chat_world, output, **given)) == 0
        warned = "preferred held-out responses" in (output / "log.txt").read_text()
        assert warned == (mode == "warn" and rate > 0.1)
        weights[mode, rate] = load_file(output / "model.safetensors")
    warned, unguarded = weights["warn", 0.3], weights["off", 0.3]
    assert all((warned[name] == unguarded[name]).all() for name in warned)


def test_probes_use_at_most_5_percent_of_the_trained_tokens(make_trainer, pairs, tmp_path):
    """When logging at every step: after the initial probes, later ones must fit the budget, also after resuming."""
    rows, held_out, per_step = pairs(16), pairs(4, seed=1), 16 * 20

    def probed(steps, checkpoint=None):
        trainer = make_trainer(
            rows,
            eval_dataset=held_out, per_device_train_batch_size=16, max_steps=steps, logging_steps=1,
            save_strategy="steps", save_steps=40, output_dir=str(tmp_path / "run"),
        )  # fmt: skip
        found, score = [], trainer.response_logps

        def counted(rows):
            tokens = sum(len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows)
            found.append((trainer.state.global_step, tokens))
            return score(rows)

        trainer.response_logps = counted
        trainer.add_callback(Guard(trainer, "warn"))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.trained_tokens() == steps * per_step
        return found

    for found, first in ((probed(40), 0), (probed(80, str(tmp_path / "run" / "checkpoint-40")), 40)):
        (cost,) = {tokens for _, tokens in found}
        assert cost == sum(len(row["prompt_ids"]) + len(row["response_ids"][0]) for row in held_out)
        steps = [step for step, _ in found]
        assert first or steps[:7] == [0, 2, 3, 4, 5, 6, 8]
        late = [(number, step) for number, step in enumerate(steps, start=1) if step > 8]
        assert all(number * cost <= 0.05 * (step - first) * per_step for number, step in late)
        assert len(found) * cost > 0.05 * 40 * per_step - cost


def test_a_probe_averages_over_scored_tokens_of_preferred_responses(make_trainer, pairs):
    """Also with ld_alpha, which weights tokens by the other response's length, and with unscored tokens."""
    rows, held_out = pairs(4), pairs(3, seed=1)
    for masked in (False, True):
        masks = [
            [[not masked or place % 2 == 0 for place in range(len(ids))] for ids in r] for r in held_out["response_ids"]
        ]
        trainer = make_trainer(
            rows,
            eval_dataset=held_out.add_column("scored", masks) if masked else held_out,
            objective="dpo",
            ld_alpha=0.3,
            max_batch_tokens=40,
        )
        expected = []
        for prompt, (ids, _), mask in zip(held_out["prompt_ids"], held_out["response_ids"], masks, strict=True):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(logits[range(len(ids)), ids][torch.tensor(mask[0])].mean().item())
        assert Guard(trainer, "warn")._start == pytest.approx(sum(expected) / 3, abs=1e-9)


def test_guard_off_can_be_given_as_a_yaml_boolean(chat_world, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("guard: off\n")
    from simpo.config import parse_settings
    from simpo.training.configs import PreferenceConfig

    (config,) = parse_settings([str(recipe), f"--output_dir={tmp_path}"], (PreferenceConfig,), command="train")
    assert config.guard == "off"
    recipe.write_text("guard: halt\n")
    with pytest.raises(SimpoError, match="guard"):
        parse_settings([str(recipe)], (PreferenceConfig,), command="train")
