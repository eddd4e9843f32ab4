"""PPO training: one update against the definition, the value function in steps and checkpoints, and resuming."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from simpo.cli import main
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled, TransformersEngine
from simpo.models.settings import ModelArguments
from simpo.training.configs import OnlineConfig
from simpo.training.online import OnlineTrainer
from simpo.training.rollouts import adapted_columns, training_rows
from simpo.training.value import ValueFunction

K = 8


def annotate(answered):
    return [[(sum(sampled.ids) % 17) / 10 for sampled in one.samples] for one in answered]


class ShortAnswers(TransformersEngine):
    """Truncates answers to different lengths, because a model with random weights would never end them."""

    def generate(self, prompts, settings, seed):
        found = super().generate(prompts, settings, seed)
        return [Sampled(one.ids[: 1 + sum(one.ids) % 6], sum(one.ids) % 6 < 5, None) for one in found]


@pytest.fixture(scope="module")
def reward_model(chat_world):
    """The folder of a random reward model with the policy's vocabulary."""
    folder = chat_world / "reward"
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=12, n_layer=1, n_head=2, n_positions=64, pad_token_id=2, num_labels=1
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    hf.GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def ppo(chat_world, tmp_path):
    """``ppo(**settings)``: a PPO trainer for the tiny chat model in float64."""

    def make(*, model=None, annotator=annotate, callbacks=None, prompts=4, dtype=torch.float64, **settings):
        quiet = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        plain = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
        own = {"max_length": 40, "max_new_tokens": 6, "num_generations": K, "per_device_train_batch_size": prompts}
        rows = [{"prompt": f"What is {a} and {b}?"} for a in range(4) for b in range(8)]
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(chat_world / "model", dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
        return OnlineTrainer(
            model,
            OnlineConfig(**quiet | plain | own | {"objective": "ppo", "learning_rate": 3e-2} | settings),
            rows[:prompts],
            processing_class=tokenizer,
            callbacks=callbacks,
            annotator=annotator,
            engine=ShortAnswers(model, tokenizer),
        )

    return make


def rollout(folder, number=0):
    path = folder / "rollouts" / f"{number:06}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- updates ----


def naive_estimates(records, args):
    """Return advantages and returns for every token, by the papers' sums over later tokens."""
    scores = [score for record in records for score in record["scores"]]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    advantages, returns = [], []
    for record in records:
        for k, values in enumerate(record["values"]):
            score = min(max((record["scores"][k] - mean) / std, -args.score_clip), args.score_clip)
            logps = zip(record["behavior_logps"][k], record["ref_logps"][k], strict=True)
            rewards = [-args.kl_coef * (logp - ref) if args.kl_in == "reward" else 0.0 for logp, ref in logps]
            rewards[-1] += score
            following = [*values[1:], 0.0]
            deltas = [r + args.discount * n - v for r, n, v in zip(rewards, following, values, strict=True)]
            decay = args.discount * args.gae_lambda
            own = [sum(decay ** (j - t) * deltas[j] for j in range(t, len(deltas))) for t in range(len(deltas))]
            advantages.append(own)
            returns.append([a + v for a, v in zip(own, values, strict=True)])
    flat = [value for own in advantages for value in own]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    return [[(value - mean) / std for value in own] for own in advantages], returns


def naive_loss(trainer, initial_model, records, demonstrations):
    """Return the PPO-ptx loss, one sequence and token at a time, and the share of clipped tokens."""
    args, model, value = trainer.args, trainer.model, trainer._value
    advantages, returns = naive_estimates(records, args)
    answers = [(record, k) for record in records for k in range(K)]
    total, tokens, clipped_tokens = 0.0, 0, 0
    for number, (record, k) in enumerate(answers):
        ids, start = record["response_ids"][k], len(record["prompt_ids"]) - 1
        sequence = torch.tensor([record["prompt_ids"] + ids])
        states = model.transformer(input_ids=sequence)[0][0]
        distributions = torch.log_softmax(model.lm_head(states), -1)[start:-1]
        with torch.no_grad():
            reference = torch.log_softmax(initial_model(input_ids=sequence).logits[0], -1)[start:-1]
        if value.head is None:
            states = value.module.transformer(input_ids=sequence)[0][0]
            values = value.module.score(states)[start:-1, 0]
        else:
            values = value.head(states)[start:-1, 0]
        for t, token in enumerate(ids):
            ratio = (distributions[t, token] - record["behavior_logps"][k][t]).exp()
            advantage = advantages[number][t]
            clipped = min(max(ratio, 0.8), 1.2)
            total = total - min(ratio * advantage, clipped * advantage)
            clipped_tokens += int(clipped * advantage < ratio * advantage)
            old, target = record["values"][k][t], returns[number][t]
            near = old + min(max(values[t] - old, -args.value_clip), args.value_clip)
            total = total + args.value_weight * 0.5 * max((values[t] - target) ** 2, (near - target) ** 2)
            entropy = -(distributions[t].exp() * distributions[t]).sum()
            total = total - args.entropy_coef * entropy
            if args.kl_in == "loss":  # exact KL
                total = total + args.kl_coef * (distributions[t].exp() * (distributions[t] - reference[t])).sum()
            tokens += 1
    nll, count = 0.0, 0
    for prompt, response in demonstrations:
        logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0], -1)
        for t, token in enumerate(response):
            nll = nll - logps[len(prompt) - 1 + t, token]
            count += 1
    return total / tokens + (args.ptx_weight * nll / count if count else 0.0), clipped_tokens / tokens


class Compare(TrainerCallback):
    """Before the second step, compares the gradients of policy and value function with naive ones."""

    def __init__(self, folder, initial_model):
        self.folder, self.initial_model, self.trainer, self.logs = folder, initial_model, None, []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        if state.global_step != 1:
            return
        parameters = [*trainer.model.parameters(), *trainer._value.parameters]
        self.found = [parameter.grad.clone() for parameter in parameters]
        rows = trainer._ptx.rows if trainer._ptx else ()
        demonstrations = [(row["prompt_ids"], row["response_ids"][0]) for row in rows]
        loss, self.clipped = naive_loss(trainer, self.initial_model, rollout(self.folder), demonstrations)
        self.expected = torch.autograd.grad(loss, parameters)


EVERYTHING = {
    "sync_every": 2, "rollout_epochs": 2, "max_steps": 2, "logging_steps": 1, "kl_coef": 0.3, "entropy_coef": 0.05,
    "discount": 0.9, "gae_lambda": 0.8, "value_clip": 0.01, "value_weight": 0.4,
    "normalize_scores": True, "score_clip": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("network", [False, True])
def test_gradients_in_the_second_pass_match_the_definition(ppo, chat_world, reward_model, tmp_path, network):
    compare = Compare(tmp_path / "run", AutoModelForCausalLM.from_pretrained(chat_world / "model").double())
    more = {"value_model": str(reward_model), "max_batch_tokens": 80}
    if not network:
        more = {"kl_in": "loss", "kl_estimator": "exact"}
        more |= {"ptx_weight": 0.7, "ptx_dataset_name": str(chat_world / "sft.jsonl"), "ptx_batch_size": 24}
    trainer = compare.trainer = ppo(**EVERYTHING, **more, callbacks=[compare])
    calls, backward = [], trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss: (calls.append(1), backward(loss))
    rows, forward = [], trainer.forward_rows
    trainer.forward_rows = lambda model, batch: (rows.append(batch.rows), forward(model, batch))[1]
    trainer.train()
    for found, expected in zip(compare.found, compare.expected, strict=True):
        assert (found - expected).abs().max() < 1e-9
    assert max(each.abs().max() for each in compare.expected) > 1e-3
    first, second = compare.logs[:2]
    assert first["policy/ratio"] == 1 and first["policy/clip_fraction"] == 0
    assert first["rollout/kl"] == pytest.approx(0, abs=1e-12)
    assert compare.clipped > 0 and second["policy/clip_fraction"] > 0 and second["policy/ratio"] != 1
    assert sorted(row for batch in rows for row in batch) == sorted([0, 1, 2, 3] * 2)
    assert len(rows) > 2 if network else len(rows) == 2
    assert len(calls) == len(rows) + (0 if network else 2)  # plus one for the demonstrations in each step
    records = rollout(tmp_path / "run")
    values = torch.tensor([value for record in records for own in record["values"] for value in own]).double()
    returns = torch.tensor([value for own in naive_estimates(records, trainer.args)[1] for value in own]).double()
    explained = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert first["value/explained_variance"] == pytest.approx(explained.item(), rel=1e-5)
    assert (values == 0).all() != network


# ---- the value function and the optimizer ----


def test_the_value_function_mirrors_the_policy_and_is_not_in_the_saved_model(ppo, chat_world, reward_model, tmp_path):
    """It gets an adapter if the policy has one, has its own learning rate, and is only in checkpoints; K = 1."""
    lora = LoraConfig(r=2, fan_in_fan_out=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_world / "model"), lora)
    settings = {"value_model": str(reward_model), "value_learning_rate": 0.5, "num_generations": 1, "max_steps": 1}
    trainer = ppo(model=model, **settings, save_strategy="steps", save_steps=1)
    value = dict(trainer._value.module.named_parameters())
    before = {name: each.detach().clone() for name, each in value.items()}
    trained = {name for name, each in value.items() if each.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    trainer.train()
    groups = trainer.optimizer.param_groups
    rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in trainer._value.parameters} == {0.5}
    assert {rates[id(parameter)] for parameter in model.parameters() if parameter.requires_grad} == {3e-2}
    changed = {name for name, each in value.items() if not torch.equal(each, before[name])}
    assert any("score" in name for name in changed) and changed <= trained
    checkpoint = tmp_path / "run" / "checkpoint-1"
    stored = load_file(checkpoint / "value.safetensors")
    assert stored.keys() == trained and all(torch.equal(value[name], each) for name, each in stored.items())
    trainer.save_model(str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").glob("*.safetensors")} == {"adapter_model.safetensors"}
    (checkpoint / "value.safetensors").unlink()
    with pytest.raises(SimpoError, match="value function"):
        trainer._value.load(checkpoint)


def test_policy_and_value_function_gradients_are_clipped_separately(ppo):
    trainer = ppo(optim="sgd", learning_rate=1.0, max_grad_norm=1e-3, max_steps=1)
    own = [list(trainer.model.parameters()), trainer._value.parameters]
    before = [[each.detach().clone() for each in parameters] for parameters in own]
    trainer.train()
    for parameters, old in zip(own, before, strict=True):
        moved = [(new - each).detach().flatten() for new, each in zip(parameters, old, strict=True)]
        assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_value_function_follows_the_policys_loading_permissions(chat_world, reward_model, tmp_path, capsys):
    """Pickled weights, and code that comes with the model; neither is loaded without permission."""
    pickled = shutil.copytree(reward_model, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    model = hf.GPT2ForSequenceClassification.from_pretrained(reward_model)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    custom = shutil.copytree(reward_model, tmp_path / "custom")
    (custom / "own_code.py").write_text(
        "from transformers import GPT2Config, GPT2ForSequenceClassification\n\n\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'simpo_test_own'\n\n\n"
        "class OwnReward(GPT2ForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    config = json.loads((custom / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForSequenceClassification": "own_code.OwnReward"}
    config |= {"model_type": "simpo_test_own", "architectures": ["OwnReward"], "auto_map": auto}
    (custom / "config.json").write_text(json.dumps(config))
    policy, expected = AutoModelForCausalLM.from_pretrained(chat_world / "model"), model.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    for folder, key in ((pickled, "allow_pickle"), (custom, "trust_remote_code")):
        config = OnlineConfig(str(tmp_path / "run"), objective="ppo", value_model=str(folder), use_cpu=True)
        for loading in (None, ModelArguments("policy")):
            with pytest.raises(SimpoError, match=f"value_model: .*{key}"):
                ValueFunction(policy, config, tokenizer, loading)
        value = ValueFunction(policy, config, tokenizer, ModelArguments("policy", **{key: True}))
        found = value.module.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    annotator = {"annotator": "reward:" + str(pickled), "value_model": pickled, "objective": "ppo", "use_cpu": True}
    recipe = {"model_name_or_path": chat_world / "model", "dataset_name": chat_world / "train.jsonl", **annotator}
    recipe |= {"max_length": 40, "max_new_tokens": 4, "max_steps": 1, "per_device_train_batch_size": 2}
    recipe |= {"report_to": "none", "save_strategy": "no", "output_dir": tmp_path / "out"}
    arguments = ["online", *(f"--{key}={value}" for key, value in recipe.items())]
    assert main(arguments) == 2
    assert "allow_pickle" in capsys.readouterr().err
    assert main([*arguments, "--allow_pickle=true"]) == 0


def test_a_reward_model_that_cannot_read_the_policys_tokens_is_rejected(ppo, chat_world, reward_model, tmp_path):
    with pytest.raises(SimpoError, match=r"value_model: .*model"):
        ppo(value_model=str(chat_world / "model"))
    short = shutil.copytree(reward_model, tmp_path / "short")
    config = hf.AutoConfig.from_pretrained(short)
    config.n_positions = 12
    hf.GPT2ForSequenceClassification(config).save_pretrained(short)
    with pytest.raises(SimpoError, match=r"max_new_tokens 6 .*12 positions"):
        ppo(value_model=str(short), max_length=18)
    other = shutil.copytree(reward_model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(SimpoError, match=r"value_model: .*other.*vocabulary"):
        ppo(value_model=str(other))


# ---- logs ----


def test_the_value_loss_covers_only_answers_with_a_score(ppo, tmp_path):
    """Three of eight answers per prompt have a score, and none for the last prompt; initial values are 0."""

    def score_some(answered):
        *most, last = annotate(answered)
        return [*([None] * 5 + scores[5:] for scores in most), [None] * len(last)]

    compare = Compare(tmp_path / "run", None)
    settings = {"max_missing_scores": 1.0, "max_steps": 1, "logging_steps": 1}
    compare.trainer = trainer = ppo(annotator=score_some, callbacks=[compare], **settings)
    trainer.train()
    losses = []
    for row in training_rows(rollout(tmp_path / "run"), trainer.args):
        known = [value for value in row["returns"] if not math.isnan(value)]
        assert len(known) < len(row["returns"])
        losses += [sum(0.5 * value**2 for value in known) / len(known)] if known else []
    assert len(losses) == 3 and min(losses) > 0
    assert compare.logs[0]["value/loss"] == pytest.approx(sum(losses) / 3)


def test_the_logged_pretraining_loss_continues_after_a_resume(ppo, chat_world, tmp_path):
    """Logging every three steps, with a checkpoint after the second."""
    demonstrations = {"ptx_weight": 0.7, "ptx_dataset_name": str(chat_world / "sft.jsonl"), "ptx_batch_size": 8}
    settings = {"max_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, **demonstrations}
    through, resumed = ppo(**settings), ppo(**settings)
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found, expected = (
        {key: value for key, value in trainer.state.log_history[0].items() if "seconds" not in key}
        for trainer in (resumed, through)
    )
    assert expected["ptx/loss"] > 0 and found == expected


# ---- training rows from a rollout ----


def record(*, scores, values, kl_coef=0.1, score_mean=0.0, score_std=1.0, shift=0.0):
    """Return a prompt with an answer of two tokens for every score."""
    count = len(scores)
    return {
        "prompt_ids": [1, 2], "response_ids": [[3 + k, 4] for k in range(count)], "where": "rows:1",
        "finished": [True] * count, "scores": scores, "values": values,
        "behavior_logps": [[-1.0 + shift, -2.0]] * count, "ref_logps": [[-1.5, -1.0]] * count,
        "kl_coef": kl_coef, "score_mean": score_mean, "score_std": score_std,
    }  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        return OnlineConfig(str(tmp_path), use_cpu=True, objective="ppo", max_length=40, max_new_tokens=6, **changes)

    return make


def test_answers_without_a_score_train_neither_policy_nor_value_function(settings):
    values = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    args = settings(whiten_rewards=True)
    (score_some,) = training_rows([record(scores=[None, 1.0, 2.0], values=values)], args)
    (known,) = training_rows([record(scores=[1.0, 2.0], values=values[1:])], args)
    assert score_some["advantages"][:2] == [0, 0] and all(math.isnan(value) for value in score_some["returns"][:2])
    assert score_some["advantages"][2:] == pytest.approx(known["advantages"]) and any(known["advantages"])
    assert score_some["returns"][2:] == pytest.approx(known["returns"])


def test_kl_coef_and_score_scale_continue_from_the_previous_rollout(settings):
    args = settings(kl_coef=0.2, kl_target=0.25, kl_horizon=10, normalize_scores=True)
    first = [record(scores=[1.0, 3.0], values=None)]
    assert adapted_columns(first, None, args) == {"kl_coef": 0.2, "score_mean": 2.0, "score_std": 1.0}
    before = [record(scores=[5.0, 5.0], values=None, kl_coef=0.3, score_mean=2.0, score_std=1.0, shift=0.55)]
    # two answers 0.05 nats from the initial model; deviations from the target are clipped to 0.2 of it
    found = adapted_columns(first, before, args)
    assert found == {"kl_coef": pytest.approx(0.3 * (1 - 0.2 * 2 / 10)), "score_mean": 2.0, "score_std": 1.0}
    with pytest.raises(SimpoError, match=r"normalize_scores: .*5"):
        adapted_columns(before, None, args)
