"""PPO in training: one update against the definition, the value function's place in steps and checkpoints, resume."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from simpo.generation.engine import Sampled, TransformersEngine
from simpo.training.online import OnlineTrainer
from simpo.training.online_config import OnlineConfig

K = 8


def annotate(answered):
    return [[(sum(sampled.ids) % 17) / 10 for sampled in one.samples] for one in answered]


class ShortAnswers(TransformersEngine):
    """Answers of different lengths, which a model with random weights would never end."""

    def generate(self, prompts, settings, seed):
        found = super().generate(prompts, settings, seed)
        return [Sampled(one.ids[: 1 + sum(one.ids) % 6], sum(one.ids) % 6 < 5, None) for one in found]


@pytest.fixture(scope="module")
def reward_model(chat_world):
    """A random reward model of the policy's vocabulary, as a folder."""
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
    """``ppo(**settings)``: a trainer with PPO of the tiny chat model in float64."""

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


# ---- One update.


def naive_estimates(records, args):
    """Advantages and returns of every token of every answer, by the papers' sums over later tokens."""
    scores = [score for record in records for score in record["scores"]]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    advantages, returns = [], []
    for record in records:
        for k, values in enumerate(record["values"]):
            score = min(max((record["scores"][k] - mean) / std, -args.score_clip), args.score_clip)
            logps = zip(record["behavior_logps"][k], record["ref_logps"][k], strict=True)
            rewards = [-args.kl_coef * (logp - ref) for logp, ref in logps]
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


def naive_loss(trainer, records, demonstrations):
    """PPO-ptx's loss, one sequence and one token at a time, and the share of tokens that clipping affects."""
    args, model, value = trainer.args, trainer.model, trainer._value
    advantages, returns = naive_estimates(records, args)
    answers = [(record, k) for record in records for k in range(K)]
    total, tokens, clipped_tokens = 0.0, 0, 0
    for number, (record, k) in enumerate(answers):
        ids, start = record["response_ids"][k], len(record["prompt_ids"]) - 1
        sequence = torch.tensor([record["prompt_ids"] + ids])
        states = model.transformer(input_ids=sequence)[0][0]
        distributions = torch.log_softmax(model.lm_head(states), -1)[start:-1]
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
            tokens += 1
    nll, count = 0.0, 0
    for prompt, response in demonstrations:
        logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + response])).logits[0], -1)
        for t, token in enumerate(response):
            nll = nll - logps[len(prompt) - 1 + t, token]
            count += 1
    return total / tokens + (args.ptx_weight * nll / count if count else 0.0), clipped_tokens / tokens


class Compare(TrainerCallback):
    """Before the second step, with the weights after the first: gradients of policy and value function, and naive."""

    def __init__(self, folder):
        self.folder, self.trainer, self.logs = folder, None, []

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
        loss, self.clipped = naive_loss(trainer, rollout(self.folder), demonstrations)
        self.expected = torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("network", [False, True])
def test_the_gradient_of_a_second_pass_is_that_of_the_definition(ppo, chat_world, reward_model, tmp_path, network):
    compare = Compare(tmp_path / "run")
    more = {"ptx_weight": 0.7, "ptx_dataset_name": str(chat_world / "sft.jsonl"), "ptx_batch_size": 24}
    trainer = ppo(
        **{"value_model": str(reward_model)} if network else more,
        sync_every=2,
        rollout_epochs=2,
        max_steps=2,
        max_batch_tokens=140,
        **{"kl_coef": 0.3, "kl_in": "reward", "entropy_coef": 0.05, "normalize_scores": True, "score_clip": 1.0},
        **{"discount": 0.9, "gae_lambda": 0.8, "value_clip": 0.01, "value_weight": 0.4},
        callbacks=[compare],
        logging_steps=1,
    )
    compare.trainer = trainer
    trainer.train()
    for found, expected in zip(compare.found, compare.expected, strict=True):
        assert (found - expected).abs().max() < 1e-9
    assert max(each.abs().max() for each in compare.expected) > 1e-3
    first, second = compare.logs[:2]
    assert first["policy/ratio"] == 1 and first["policy/clip_fraction"] == 0
    assert first["rollout/kl"] == pytest.approx(0, abs=1e-12)
    assert compare.clipped > 0 and second["policy/clip_fraction"] > 0 and second["policy/ratio"] != 1
