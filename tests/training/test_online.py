"""Training on the model's own answers: gradients against the definition, rollout files, and exact resume."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.sampled import sampled
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from simpo.errors import SimpoError
from simpo.training.configs import OnlineConfig
from simpo.training.online import OnlineTrainer
from simpo.training.rollouts import Schedule

K = 8
GRADIENTS = ("reinforce", "rloo", "grpo", "dr_grpo", "gspo")  # ppo: test_ppo.py


def annotate(answered):
    """Return rewards that differ between answers and depend on nothing else."""
    return [[(sum(sampled.ids) % 17) / 10 for sampled in one.samples] for one in answered]


@pytest.fixture
def online(chat_world, tmp_path):
    """``online(**settings)``: a trainer for the tiny chat model in float64, without clipping or weight decay."""

    def make(
        *,
        model=None,
        annotator=annotate,
        callbacks=None,
        prompts=12,
        dtype=torch.float64,
        eval_dataset=None,
        **settings,
    ):
        quiet = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        plain = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
        own = {"max_length": 40, "max_new_tokens": 6, "num_generations": K, "per_device_train_batch_size": 4}
        rows = [{"prompt": f"What is {a} and {b}?"} for a in range(4) for b in range(8)][:prompts]
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(chat_world / "model", dtype=dtype)
        return OnlineTrainer(
            model,
            OnlineConfig(**quiet | plain | own | settings),
            rows,
            eval_dataset=eval_dataset,
            processing_class=AutoTokenizer.from_pretrained(chat_world / "model"),
            callbacks=callbacks,
            annotator=annotator,
        )

    return make


@pytest.mark.parametrize("settings", [{"objective": "grpo"}, {"objective": "dpo", "beta": 0.1, "kl_weight": 0.1}])
def test_exactly_the_metrics_of_held_out_pairs_are_known(settings, online):
    held_out = [{"prompt": f"What is {a} and 1?", "chosen": "Yes.", "rejected": "No."} for a in range(4)]
    trainer = online(eval_dataset=held_out, **settings)
    found = {name for name in trainer.evaluate() if not name.endswith(("runtime", "per_second"))}
    assert {f"eval_{name}" for name in trainer.evaluated_names} == found - {"epoch"}


class Watch(TrainerCallback):
    """Records logs, and the gradients and number of rollout files before each optimizer step."""

    def __init__(self):
        self.logs, self.gradients, self.files = [], [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(
            torch.cat(
                [parameter.grad.flatten().clone() for parameter in model.parameters() if parameter.grad is not None]
            )
        )
        self.files.append(len(list(Path(args.output_dir, "rollouts").glob("0*.jsonl"))))


def rollout(folder, number=0):
    return [json.loads(line) for line in (Path(folder) / "rollouts" / f"{number:06}.jsonl").read_text().splitlines()]


def naive_loss(name, model, records, args):
    """Return the differentiable loss of one on-policy step by the papers' formulas, one sequence at a time."""
    total, count = 0.0, 0
    rewards = []
    for record in records:
        kl = [sum(b) - sum(r) for b, r in zip(record["behavior_logps"], record["ref_logps"], strict=True)]
        penalty = args.kl_coef if args.kl_in == "reward" else 0.0
        rewards.append([score - penalty * one for score, one in zip(record["scores"], kl, strict=True)])
    everything = [reward for own in rewards for reward in own]
    for record, own in zip(records, rewards, strict=True):
        mean = sum(own) / len(own)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in own) / (len(own) - 1))
        for k, ids in enumerate(record["response_ids"]):
            sequence = torch.tensor([record["prompt_ids"] + ids])
            logits = model(input_ids=sequence).logits[0]
            logps = torch.log_softmax(logits, -1)[len(record["prompt_ids"]) - 1 : -1].gather(
                1, torch.tensor(ids)[:, None]
            )
            logps = logps[:, 0]
            others = (sum(own) - own[k]) / (len(own) - 1)
            advantage = {
                "reinforce": own[k] - sum(everything) / len(everything),
                "rloo": own[k] - others,
                "grpo": (own[k] - mean) / (std + 1e-6),
                "dr_grpo": own[k] - mean,
                "gspo": (own[k] - mean) / (std + 1e-6),
            }[name]
            ratio = (logps - logps.detach()).exp()
            if name in ("reinforce", "rloo"):
                loss = -advantage * ratio.prod()
            elif name == "gspo":
                loss = -advantage * ratio.prod() ** (1 / len(ids))
            else:
                loss = -(advantage * ratio).sum() / (len(ids) if name == "grpo" else args.max_new_tokens)
            if args.kl_in == "loss":
                difference = torch.tensor(record["ref_logps"][k], dtype=torch.float64) - logps
                k3 = difference.exp() - 1 - difference
                loss = loss + args.kl_coef * k3.sum() / (args.max_new_tokens if name == "dr_grpo" else len(ids))
            total, count = total + loss, count + 1
    return total / count


# ---- updates ----


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_match_the_definition(online, name):
    watch = Watch()
    trainer = online(objective=name, max_steps=2, callbacks=[watch], learning_rate=1e-2, kl_coef=0.3, logging_steps=1)
    trainer.train()
    # use the second step: the policy has moved away from the reference but is still on-policy
    again = online(
        objective=name, max_steps=1, learning_rate=1e-2, kl_coef=0.3, output_dir=trainer.args.output_dir + "/a"
    )
    again.train()  # leaves the weights after the first step
    model, records = again.model, rollout(trainer.args.output_dir, 1)
    model.zero_grad()
    naive_loss(name, model, records, trainer.args).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (watch.gradients[1] - expected).abs().max() < 1e-9 and expected.abs().max() > 1e-4
    assert watch.logs[0]["rollout/kl"] == pytest.approx(0, abs=1e-12) and abs(watch.logs[1]["rollout/kl"]) > 1e-6


@pytest.mark.parametrize("name", GRADIENTS)
def test_ratios_are_1_until_the_first_update(online, name):
    watch = Watch()
    trainer = online(objective=name, sync_every=3, max_steps=3, callbacks=[watch], learning_rate=1e-2, logging_steps=1)
    trainer.train()
    first, second = watch.logs[:2]
    assert first["policy/ratio"] == 1 and first["policy/clip_fraction"] == 0 and first["rollout/staleness"] == 0
    assert second["policy/ratio"] != 1 and second["rollout/staleness"] == 1


def test_logged_rollout_metrics_are_means_over_prompts(online, tmp_path):
    """Means over the step's prompts, recomputed from the answers in the rollout file."""
    watch = Watch()
    online(max_steps=1, callbacks=[watch], logging_steps=1, temperature=0.001, prompts=4).train()
    records, log = rollout(tmp_path), watch.logs[0]

    def mean(value):
        return pytest.approx(sum(map(value, records)) / len(records), rel=1e-5)

    assert log["rollout/reward"] == mean(lambda row: sum(row["scores"]) / K)
    assert log["rollout/length"] == mean(lambda row: sum(map(len, row["response_ids"])) / K)
    assert log["rollout/ended"] == mean(lambda row: sum(row["finished"]) / K)
    assert log["rollout/identical"] == mean(lambda row: 1 - len({tuple(ids) for ids in row["response_ids"]}) / K)
    assert 0 < log["rollout/identical"] < 1
    tokens = [[logp for own in row["behavior_logps"] for logp in own] for row in records]
    assert log["policy/entropy"] == pytest.approx(-sum(sum(own) / len(own) for own in tokens) / 4, rel=1e-5)
    assert log["seconds/rollouts"] > 0 and log["seconds/training"] > 0


def test_in_mixed_precision_the_training_policy_equals_the_sampling_policy(online, chat_world, tmp_path):
    """Log-probabilities equal those in bf16 within rounding, and the first ratios are exactly 1."""
    watch = Watch()
    online(dtype=torch.float32, bf16=True, max_steps=2, sync_every=2, callbacks=[watch], logging_steps=1).train()
    first, second = watch.logs[:2]
    assert first["policy/ratio"] == 1 and first["policy/clip_fraction"] == 0 and first["rollout/kl"] == 0
    assert second["policy/ratio"] != 1
    model, differences = AutoModelForCausalLM.from_pretrained(chat_world / "model"), []
    for row in rollout(tmp_path)[:4]:
        for ids, stored in zip(row["response_ids"], row["behavior_logps"], strict=True):
            sequence = torch.tensor([row["prompt_ids"] + ids])
            logps = model(sequence).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            naive = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
            differences.append((naive - torch.tensor(stored)).abs().max().item())
    assert 1e-5 < max(differences) < 0.05


@pytest.mark.parametrize("objective", sampled(["rloo", "ppo", "simpo", "dpo"], kept=("ppo", "simpo")))
def test_micro_batches_do_not_change_a_step(online, objective, tmp_path):
    found = []
    for parts, budget in ((1, 4096), (2, 140), (4, 80)):
        watch = Watch()
        trainer = online(
            objective=objective,
            pairs="all",
            max_steps=2,
            sync_every=2,
            callbacks=[watch],
            learning_rate=1e-2,
            max_batch_tokens=budget,
            output_dir=str(tmp_path / str(parts)),
        )
        calls = []
        backward = trainer.accelerator.backward
        trainer.accelerator.backward = lambda loss, call=backward, calls=calls: (calls.append(1), call(loss))
        trainer.train()
        assert len(calls) == 2 * parts
        found.append(watch.gradients)
    for gradients in found[1:]:
        assert all((one - other).abs().max() < 1e-9 for one, other in zip(gradients, found[0], strict=True))


def test_a_prompt_without_a_pair_has_no_gradient(online):
    watch = Watch()
    trainer = online(
        objective="simpo", annotator=lambda answered: [[0.5] * K for _ in answered], max_steps=1, callbacks=[watch]
    )
    trainer.train()
    assert not watch.gradients[0].any()
    assert trainer.mean_loss() == 0


def test_soft_labels_are_the_preference_probabilities_of_the_scores(online, tmp_path):
    watch, beta = Watch(), 0.5
    trainer = online(
        objective="dpo",
        beta=beta,
        soft_labels=True,
        num_generations=2,
        max_steps=1,
        callbacks=[watch],
        learning_rate=0.0,
    )
    trainer.train()
    records, model, total = rollout(tmp_path), trainer.model, 0.0
    assert len(records) == 4 and any(record["scores"][0] != record["scores"][1] for record in records)
    model.zero_grad()
    for record in records:
        prompt = record["prompt_ids"]
        first, second = (
            torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
            .gather(1, torch.tensor(ids)[:, None])
            .sum()
            for ids in record["response_ids"]
        )
        margin = beta * (first - first.detach() - second + second.detach())  # policy and reference are still equal
        p = 1 / (1 + math.exp(record["scores"][1] - record["scores"][0]))
        if p != 0.5:
            total = total - p * torch.nn.functional.logsigmoid(margin)
            total = total - (1 - p) * torch.nn.functional.logsigmoid(-margin)
    (total / len(records)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (watch.gradients[0] - expected).abs().max() < 1e-9 and expected.abs().max() > 1e-4


def test_the_reference_of_an_adapter_is_its_base_model(online, chat_world, tmp_path):
    watch = Watch()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chat_world / "model"), LoraConfig(r=2, fan_in_fan_out=True)
    )
    trainer = online(model=model, max_steps=2, callbacks=[watch], learning_rate=0.1, logging_steps=1, kl_in="loss")
    frozen = {name: weight.clone() for name, weight in model.state_dict().items() if "lora" not in name}
    trainer.train()
    assert watch.logs[0]["rollout/kl"] == pytest.approx(0, abs=1e-5) and abs(watch.logs[1]["rollout/kl"]) > 1e-3
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in frozen.items())


# ---- rollouts ----


def test_every_step_uses_its_prompts_and_answers_are_stored_before_training(online, tmp_path):
    watch, asked = Watch(), []

    def counting(answered):
        asked.append([one.prompt.id for one in answered])
        return annotate(answered)

    trainer = online(
        sync_every=4, rollout_epochs=2, num_train_epochs=2, prompts=18, annotator=counting, callbacks=[watch]
    )
    trainer.train()
    # 18 prompts, 4 per step: 5 minibatches, 2 per rollout; the last rollout has 1 step per pass, with 2 prompts
    assert trainer.state.global_step == 2 * 5 * 2
    assert list(map(len, asked)) == [8, 8, 2] * 2
    assert watch.files == [1] * 4 + [2] * 4 + [3] * 2 + [4] * 4 + [5] * 4 + [6] * 2
    assert all(len(set(asked[a] + asked[a + 1] + asked[a + 2])) == 18 for a in (0, 3)) and asked[:3] != asked[3:]
    for record in rollout(tmp_path):
        assert len(record["responses"]) == len(record["scores"]) == len(record["finished"]) == K
        assert list(map(len, record["behavior_logps"])) == list(map(len, record["response_ids"]))


def test_each_pass_over_a_rollout_covers_all_of_its_prompts():
    schedule = Schedule(18, per_step=4, sync_every=6, rollout_epochs=3, seed=1, drop_last=False)
    places = [schedule.position(1, step) for step in range(schedule.steps)]
    assert [(one.rollout, one.first_step, one.epoch, one.minibatch) for one in places[:6]] == [
        (3, 15, epoch, minibatch) for epoch in range(3) for minibatch in range(2)
    ]
    assert [(one.rollout, one.epoch, one.minibatch) for one in places[12:]] == [(5, epoch, 0) for epoch in range(3)]
    assert sorted(prompt for one in (places[0], places[6], places[12]) for prompt in one.prompts) == list(range(18))
    orders = [schedule.order(place).tolist() for place in places[:6:2]]
    assert orders[0] == list(range(8)) and orders[0] != orders[1] != orders[2]
    assert all(sorted(order) == orders[0] for order in orders)


@pytest.mark.parametrize("objective", ["rloo", "simpo"])
def test_prompts_with_equal_scores_are_counted(objective, online):
    """In this test, the first of the step's four prompts."""

    def flat(answered):
        first, *others = annotate(answered)
        return [[0.5] * len(first), *others]

    watch = Watch()
    online(objective=objective, annotator=flat, max_steps=1, callbacks=[watch], logging_steps=1).train()
    assert watch.logs[0]["rollout/equal_scores"] == 0.25


def test_answers_without_a_score_are_counted_and_have_no_gradient(online, tmp_path):
    def score_some(answered):
        return [[None, math.nan, *scores[2:]] for scores in annotate(answered)]

    watch = Watch()
    trainer = online(annotator=score_some, max_missing_scores=0.25, max_steps=1, callbacks=[watch], logging_steps=1)
    trainer.train()
    assert watch.logs[0]["rollout/missing_scores"] == 0.25
    (rows,) = [trainer.step_rows]
    for row, record in zip(rows, rollout(tmp_path), strict=True):
        first_two = sum(map(len, record["response_ids"][:2]))
        assert record["scores"][:2] == [None, None]
        assert not any(row["advantages"][:first_two]) and any(row["advantages"][first_two:])
    with pytest.raises(SimpoError, match=r"rollout 0: no score for 8 of 32 .*max_missing_scores 0\.1.*train_dataset\["):
        online(annotator=score_some, output_dir=str(tmp_path / "other")).train()


def test_the_gold_annotator_runs_last_and_is_named_in_its_errors(online):
    """It does not run on answers if the annotator leaves too many of them unscored."""
    asked = []

    def score_nothing(answered):
        asked.append("annotator")
        return [[None] * len(one.texts) for one in answered]

    def one_too_few(answered):
        asked.append("gold_annotator")
        return [[0.0] * len(one.texts) for one in answered[1:]]

    def judged_by(annotator):
        trainer = online(annotator=annotator, max_steps=1)
        trainer.gold_annotator = one_too_few
        return trainer

    with pytest.raises(SimpoError, match=r"^annotator: rollout 0: no score for 32 of 32"):
        judged_by(score_nothing).train()
    assert asked == ["annotator"]
    with pytest.raises(SimpoError, match=r"^gold_annotator: rollout 0: "):
        judged_by(annotate).train()
    assert asked == ["annotator", "gold_annotator"]


def test_a_truncated_answer_can_get_a_fixed_score(online, tmp_path):
    watch = Watch()
    trainer = online(unfinished_score=-3.0, max_steps=1, callbacks=[watch], logging_steps=1)
    trainer.train()
    records = rollout(tmp_path)
    expected = [s if f else -3 for r in records for s, f in zip(r["scores"], r["finished"], strict=True)]
    assert watch.logs[0]["rollout/reward"] == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize(("pairs", "count"), [("best_worst", 2), ("all", K)])
def test_pairs_use_the_best_and_worst_answer_or_all_answers(online, tmp_path, pairs, count):
    trainer = online(objective="simpo", pairs=pairs, max_steps=1, dtype=torch.float32)
    trainer.train()
    for row, record in zip(trainer.step_rows, rollout(tmp_path), strict=True):
        assert len(row["response_ids"]) == count and row["scores"] == sorted(row["scores"], reverse=True)
        assert row["scores"][0] == max(record["scores"]) and row["scores"][-1] == min(record["scores"])
        for ids, score in zip(row["response_ids"], row["scores"], strict=True):
            assert record["scores"][record["response_ids"].index(ids)] == score


# ---- resuming ----


class StoppedError(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
@pytest.mark.parametrize("moment", ["annotation", "before the step", "after the step"])
def test_a_stopped_run_resumes_to_identical_weights(online, tmp_path, objective, moment):
    shared = {"objective": objective, "sync_every": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    shared |= {"learning_rate": 1e-2, "dtype": torch.float32, "disable_dropout": False, "lr_scheduler_type": "cosine"}
    whole = online(**shared, output_dir=str(tmp_path / "whole"))
    whole.train()
    files = sorted((tmp_path / "whole" / "rollouts").glob("0*.jsonl"))
    assert len(files) == 4 and whole.state.global_step == 6

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if moment == "before the step" and state.global_step == 4:
                raise StoppedError

        def on_step_end(self, args, state, control, **kwargs):
            if moment == "after the step" and state.global_step == 5:
                raise StoppedError

    asked = []

    def stopping(answered):
        torch.manual_seed(len(asked))  # annotators are allowed to use random numbers
        if moment == "annotation" and len(asked) == 2:
            raise StoppedError
        asked.append(answered)
        return annotate(answered)

    with pytest.raises(StoppedError):
        online(**shared, annotator=stopping, callbacks=[Stop()], output_dir=str(tmp_path / "stopped")).train()
    moment = "never"
    again = online(**shared, annotator=stopping, output_dir=str(tmp_path / "stopped"))
    again.train(resume_from_checkpoint=True)
    assert len(asked) == len(files)  # no rollout was sampled twice
    for path in files:
        assert (tmp_path / "stopped" / "rollouts" / path.name).read_bytes() == path.read_bytes()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


@pytest.mark.parametrize("damage", [lambda text: text.replace("0", "1", 1), lambda text: text[: len(text) // 2]])
def test_damaged_rollouts_are_resampled_or_rejected(online, tmp_path, damage, caplog):
    shared = {"objective": "grpo", "sync_every": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = online(**shared)
    whole.train()
    folder = Path(whole.args.output_dir)
    shutil.rmtree(folder / "checkpoint-6")  # checkpoint-4 is in the middle of rollout 2
    path = folder / "rollouts" / "000003.jsonl"
    sampled = path.read_bytes()
    path.write_text(damage(path.read_text()))
    again = online(**shared)
    again.train(resume_from_checkpoint=True)
    assert path.read_bytes() == sampled and "000003.jsonl is damaged" in caplog.text
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "rollouts" / "000000.jsonl").write_bytes(sampled)
    path = folder / "rollouts" / "000002.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(SimpoError, match=r"000002\.jsonl is missing or damaged"):
        online(**shared).train(resume_from_checkpoint=True)
    assert {metric.stage for metric in again.summary()} == {"after"}  # the first file was tampered with
    (folder / "rollouts" / "000000.jsonl").unlink()
    assert {metric.stage for metric in again.summary()} == {"after"}
    assert caplog.text.count("000000.jsonl is missing or damaged") == 2
    (folder / "rollouts" / "training.json").write_text("[]")
    with pytest.raises(SimpoError, match=r"training\.json is damaged"):
        online(**shared).train(resume_from_checkpoint=True)


def test_incomplete_files_left_by_a_kill_are_removed(online, tmp_path):
    left = tmp_path / "rollouts/.000000.jsonl.7.partial"
    left.parent.mkdir()
    left.write_text("{")
    online(max_steps=1, prompts=4).train()
    assert not left.exists() and [path.name for path in tmp_path.glob("rollouts/0*.jsonl")] == ["000000.jsonl"]


def test_rollouts_from_another_run_are_rejected(online):
    online(max_steps=1).train()
    with pytest.raises(SimpoError, match=r"output_dir: .*rollouts"):
        online(max_steps=1, learning_rate=2e-3).train()


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_every": 0}, "sync_every: .*0"),
        ({"sync_every": 3, "rollout_epochs": 2}, "rollout_epochs: 2 .*sync_every, 3"),
        ({"objective": "rloo", "num_generations": 1}, "num_generations: .*rloo"),
        ({"objective": "dpo", "num_generations": 1}, "num_generations: 1"),
        ({"objective": "pppo"}, "objective: 'pppo'"),
        ({"objective": "kto"}, "objective: kto"),
        ({"objective": "simpo", "kl_coef": 0.1}, "kl_coef: "),
        ({"objective": "rloo", "beta": 0.1}, "beta: .*rloo"),
        ({"objective": "grpo", "kl_estimator": "k1"}, "kl_estimator: "),
        ({"kl_coef": -1.0}, "kl_coef: .*-1"),
        ({"clip_low": 0.0}, "clip_low: .*0"),
        ({"max_new_tokens": 40, "max_length": 40}, "max_new_tokens: 40 .*max_length 40"),
        ({"temperature": -1.0}, "temperature: .*-1"),
        ({"max_missing_scores": 2.0}, "max_missing_scores: .*2"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: "),
        ({"objective": "dpo", "ld_alpha": 0.0}, "ld_alpha: .*sampled answers"),
        ({"objective": "rloo", "soft_labels": True}, "soft_labels: .*rloo"),
        ({"objective": "dpo", "soft_labels": True, "num_generations": 4}, "soft_labels: .*4"),
        ({"objective": "ipo", "soft_labels": True, "num_generations": 2}, "soft_labels: ipo"),
        ({"objective": "rloo", "value_clip": 0.1}, "value_clip: .*rloo"),
        ({"objective": "simpo", "whiten_advantages": True}, "whiten_advantages: "),
        ({"objective": "ppo", "gae_lambda": 1.5}, r"gae_lambda: .*1\.5"),
        ({"objective": "ppo", "value_weight": 0.0}, r"value_weight: .*0\.0"),
        ({"objective": "ppo", "kl_estimator": "exact"}, "kl_estimator: .*kl_in: loss"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_target: .*kl_coef"),
        ({"kl_horizon": 10}, "kl_horizon: .*kl_target"),
        ({"objective": "rloo", "gae_lambda": 0.0}, "gae_lambda: .*rloo"),
        ({"entropy_coef": -1.0}, r"entropy_coef: .*-1\.0"),
        ({"ptx_weight": 1.0}, "ptx_weight: .*ptx_dataset_name"),
    ],
)
def test_unusable_settings_are_reported_by_name(tmp_path, settings, message):
    with pytest.raises(SimpoError, match=message):
        OnlineConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_prompts_that_leave_no_room_for_an_answer_are_reported(online):
    with pytest.raises(SimpoError, match=r"train_dataset\[0\].*max_new_tokens 60 .*64 positions"):
        online(max_new_tokens=60, max_length=100)
    with pytest.raises(SimpoError, match="max_prompt_length 2"):
        online(max_new_tokens=38)


def test_a_horizon_that_could_make_kl_coef_negative_is_rejected(online):
    assert online(kl_target=1.0).args.kl_horizon == 10_000
    with pytest.raises(SimpoError, match="kl_horizon: 1 "):
        online(kl_target=1.0, kl_horizon=1)
