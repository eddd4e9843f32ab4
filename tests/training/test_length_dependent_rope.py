"""Training with rotary frequencies that depend on row length: mixed lengths, in any micro-batches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tests.sampled import sampled

from simpo import PreferenceTrainer, score_answers
from simpo.packing.layout import TokenizedComparison
from simpo.training.reward import RewardConfig, RewardTrainer

BORDER = 24
_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": BORDER} | _FACTORS
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MODELS = {
    "longrope": ("phi3", {"rope_parameters": _LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": BORDER}),
}
# short pairs, long pairs, and pairs across the border
SHAPES = [
    (4, (5, 3)),
    (20, (9, 14)),
    (15, (4, 20)),
    (3, (4, 4)),
    (15, (20, 4)),
    (6, (7, 2)),
    (2, (1, 40)),
    (30, (3, 3)),
]


@pytest.fixture(params=MODELS)
def model(request, make_model):
    name, changes = MODELS[request.param]
    return make_model(name, torch.float32, std=0.15, **changes)


def losses(trainer):
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 80, "per_device_train_batch_size": 8},
        {"max_batch_tokens": 1000, "per_device_train_batch_size": 3},
        {"max_batch_tokens": 1000, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"forward_path": "padded", "max_batch_tokens": 160, "per_device_train_batch_size": 4},
        {"precompute_ref_log_probs": False, "activation_checkpointing": True, "per_device_train_batch_size": 4},
        {"kl_weight": 0.5, "per_device_train_batch_size": 4},
    ],
)
@pytest.mark.parametrize("adapter", sampled([False, True], kept=[True]))
def test_dpo_starts_at_ln_2(model, config, random_comparisons, as_dataset, settings, adapter):
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if (
        "activation_checkpointing" in settings
        and "activation_checkpointing" not in hf.TrainingArguments.__annotations__
    ):
        settings = {key.replace("activation", "gradient"): value for key, value in settings.items()}
    args = config(objective="dpo", beta=0.5, learning_rate=0.0, logging_steps=1, num_train_epochs=2, **settings)
    data = as_dataset(random_comparisons(*SHAPES))
    for loss in losses(PreferenceTrainer(model, args, data)):
        assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_kto_starts_at_1(model, config, random_comparisons, as_dataset):
    """Also checks the reference point, which uses responses paired with other rows' prompts."""
    args = config(objective="kto", learning_rate=0.0, logging_steps=1, per_device_train_batch_size=4)
    for loss in losses(PreferenceTrainer(model, args, as_dataset(random_comparisons(*SHAPES)))):
        assert loss == pytest.approx(1.0, abs=1e-6)  # half per response, two responses


@pytest.mark.parametrize("objective", ["simpo", "orpo"])
def test_losses_and_weights_do_not_depend_on_micro_batches(
    make_model, config, random_comparisons, as_dataset, objective
):
    shapes = [*SHAPES, (10, (5, 20, 9)), (12, (14, 3, 11))]
    scores = [[float(-k) for k in range(len(responses))] for _, responses in shapes]
    data = as_dataset(random_comparisons(*shapes)).add_column("scores", scores)
    name, changes = MODELS["longrope"]
    found = []
    for budget in (90, 1000):
        model = make_model(name, torch.float32, std=0.15, **changes)
        args = config(objective=objective, learning_rate=1e-3, logging_steps=1, max_batch_tokens=budget)
        args.per_device_train_batch_size = 5
        found.append((losses(PreferenceTrainer(model, args, data)), [p.detach() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_rewards_do_not_depend_on_the_batch(config, random_comparisons, as_dataset, tmp_path, make_model):
    source = make_model("phi3", torch.float32, rope_parameters=_LONGROPE).config
    source.num_labels = 1
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(source).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    rows = random_comparisons(*SHAPES)
    with torch.no_grad():
        expected = torch.cat(
            [
                copy.deepcopy(model)(input_ids=torch.tensor([row.prompt_ids + response]), use_cache=False).logits[0]
                for row in rows
                for response in row.response_ids
            ]
        )
        for path in ("packed", "padded"):
            torch.testing.assert_close(score_answers(model, rows, path=path), expected, rtol=0, atol=1e-5)
            one = [score_answers(model, [TokenizedComparison(r.prompt_ids, r.response_ids)], path=path) for r in rows]
            torch.testing.assert_close(torch.cat(one), expected, rtol=0, atol=1e-5)
    expected_loss = -torch.nn.functional.logsigmoid(expected[0::2] - expected[1::2]).mean().item()
    args = RewardConfig(
        str(tmp_path / "rm"), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=0.0
    )
    args.per_device_train_batch_size, args.logging_steps = len(rows), 1
    assert losses(RewardTrainer(model, args, as_dataset(rows)))[0] == pytest.approx(expected_loss, abs=1e-5)
