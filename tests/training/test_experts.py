"""The load-balancing loss over micro-batches on one and two processes, against the model's own forward."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from tests.forked import run_ranks
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from simpo import PreferenceConfig, PreferenceTrainer, SFTConfig, SFTTrainer

WEIGHT, BETA, MARGIN = 0.7, 2.0, 1.0
ROWS, ROWS_PER_STEP = 11, 6  # the last step has 5 rows; two processes get 3 and 2
SETTINGS = {
    "num_train_epochs": 1,
    "learning_rate": 0.0,  # so that every step starts from the same weights
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}
UNEVEN, ROW_BY_ROW = {"max_batch_tokens": 40}, {"max_batch_tokens": 20}  # every row has 20 tokens
CHECKPOINTING = {"gradient_checkpointing": True}
ALONE = {"one": UNEVEN, "one-row-by-row": ROW_BY_ROW}
IN_TWO = {
    "ddp": UNEVEN,
    "ddp-sft": UNEVEN,
    "ddp-row-by-row": ROW_BY_ROW,
    "fsdp": UNEVEN,
    "fsdp-sft": UNEVEN | CHECKPOINTING,
    "fsdp-row-by-row": ROW_BY_ROW | CHECKPOINTING,
}


def train(name: str, settings: dict, folder: Path, world: int) -> dict:
    """Train one epoch; return each step's micro-batches and gradients on this rank, and the log."""
    sharded, supervised = name.startswith("fsdp"), "sft" in name
    settings = SETTINGS | {"per_device_train_batch_size": ROWS_PER_STEP // world} | settings
    if world > 1:
        settings["ddp_backend"] = "gloo"
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "MixtralDecoderLayer"}}
    kind, config = (SFTTrainer, SFTConfig) if supervised else (PreferenceTrainer, PreferenceConfig)
    own = {} if supervised else {"beta": BETA, "gamma_beta_ratio": MARGIN / BETA}
    args = config(output_dir=str(folder / name), **settings | own)
    if sharded:
        # On a CPU, accelerate turns FSDP into DDP. It shards on what looks like an accelerator, here backed by gloo.
        PartialState().distributed_type = DistributedType.MULTI_XPU
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float64, experts_implementation="eager"
    )
    trainer = kind(model, args, load_from_disk(folder / ("sft" if supervised else "rows")))
    batches, gradients, step = [], [], trainer.training_step

    def watched(model, inputs, *rest, **kwargs):
        micro = inputs["micro_batches"]
        batches.append([list(zip(batch.rows, batch.packed.weights.tolist(), strict=True)) for batch in micro])
        loss = step(model, inputs, *rest, **kwargs)
        gradients.append([whole(parameter.grad) for parameter in model.parameters()])
        return loss

    trainer.training_step = watched
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"batches": batches, "gradients": gradients, "log": log, "type": trainer.accelerator.distributed_type}


def train_in_two(folder: Path) -> int:
    for name, settings in IN_TWO.items():
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate's leftovers from the previous job
        torch.save(train(name, settings, folder, 2), folder / f"{name}.{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
    return 0


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def naive(model, rows, steps, *, supervised: bool):
    """For each step, return the gradients, the model's balancing loss and its objective by the definition.

    Every sequence is computed separately with all logits. ``steps`` holds the micro-batches of all processes.
    """
    for step in steps:
        total = sum(weight for batch in step for _, weight in batch)
        objective, balance = torch.zeros(()), torch.zeros(())
        for batch in step:
            layers = None
            for number, weight in batch:
                means, routed = sequences(model, rows[number], supervised=supervised)
                loss = -means[0] if supervised else -F.logsigmoid(BETA * (means[0] - means[1]) - MARGIN)
                objective = objective + weight / total * loss
                layers = routed if layers is None else [torch.cat(both) for both in zip(layers, routed, strict=True)]
            share = sum(weight for _, weight in batch) / total
            balance = balance + share * load_balancing_loss_func(
                tuple(layers), model.num_experts, model.num_experts_per_tok
            )
        gradients = torch.autograd.grad(objective + WEIGHT * balance, list(model.parameters()))
        yield gradients, balance.item(), objective.item()


def sequences(model, row, *, supervised: bool):
    """Return a row's average log-probabilities, and its router logits by layer for the prompt and each response."""
    means, layers = [], []
    for place, response in enumerate(row["response_ids"]):
        prompt = row["prompt_ids"]
        ids = torch.tensor([prompt + response])
        found = model(input_ids=ids, use_cache=False, output_router_logits=True)
        logps = found.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        means.append(logps.mean())
        layers.append([logits[0 if place == 0 else len(prompt) :] for logits in found.router_logits])
    return means, [torch.cat(parts) for parts in zip(*layers, strict=True)]


@pytest.fixture(scope="module")
def done(make_model, pairs, tmp_path_factory):
    """``done(name)``: what each rank recorded; ``done.expected(name)``: the same by the definition."""
    folder = tmp_path_factory.mktemp("experts")
    rows = {"rows": pairs(ROWS), "sft": pairs(ROWS, responses=1)}
    for name, several in rows.items():
        several.save_to_disk(folder / name)
    model = make_model("mixtral", output_router_logits=True, router_aux_loss_coef=WEIGHT)
    model.save_pretrained(folder / "model")
    ended = run_ranks(2, train_in_two, folder, folder=folder, timeout=300)
    assert ended.codes == [0, 0], ended.stderr

    def ranks_of(name):
        if name in ALONE:
            return [train(name, ALONE[name], folder, 1)]
        return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]

    def expected(name, ranks):
        steps = [list(chain(*shares)) for shares in zip(*(rank["batches"] for rank in ranks), strict=True)]
        return list(naive(model, rows["sft" if "sft" in name else "rows"], steps, supervised="sft" in name))

    ranks_of.expected = expected
    return ranks_of


@pytest.mark.parametrize("name", [*ALONE, *IN_TWO])
def test_micro_batches_are_weighted_correctly(name, done):
    """The result does not depend on how a step is split into micro-batches or across two processes."""
    ranks = done(name)
    kind = DistributedType.FSDP if name.startswith("fsdp") else DistributedType.MULTI_CPU
    assert [rank["type"] for rank in ranks] == ([DistributedType.NO] if name in ALONE else [kind] * 2)
    expected = done.expected(name, ranks)
    assert len(expected) == 2
    for number, (gradients, balance, objective) in enumerate(expected):
        entry = ranks[0]["log"][number]
        assert entry["router/aux_loss"] == pytest.approx(balance, abs=1e-6)
        assert entry["loss"] == pytest.approx(objective, abs=1e-6)  # the balancing loss is logged separately
        for rank in ranks:
            for found, wanted in zip(rank["gradients"][number], gradients, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ddp-row-by-row", "fsdp-row-by-row"])
def test_two_processes_with_the_same_micro_batches_train_like_one(name, done):
    (alone,) = done("one-row-by-row")
    for rank in done(name):
        for step, gradients in enumerate(rank["gradients"]):
            for found, wanted in zip(gradients, alone["gradients"][step], strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
