"""Two ranks (DDP on gloo) against the definition in one process: gradients, rows, logs and evaluation."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import load_from_disk
from transformers import TrainerCallback

from simpo import PreferenceConfig, PreferenceTrainer

WORLD = 2
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "max_batch_tokens": 40,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "num_train_epochs": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "ddp_backend": "gloo",
    "report_to": [],
    "disable_tqdm": True,
}


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([parameter.grad.clone() for parameter in model.parameters()])


def train_rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    gradients, seen, backwards = Gradients(), [], []
    rows = load_from_disk(folder / "rows")
    args = PreferenceConfig(output_dir=str(folder / "out"), **SETTINGS)
    trainer = PreferenceTrainer(model, args, rows, eval_dataset=rows, callbacks=[gradients])
    training_step, backward = trainer.training_step, trainer.accelerator.backward

    def watched_step(model, inputs, *rest, **kwargs):
        batches = inputs["micro_batches"]
        seen.append([r for b in batches for r, w in zip(b.rows, b.packed.weights.tolist(), strict=True) if w])
        backwards.append(len(batches))
        return training_step(model, inputs, *rest, **kwargs)

    def watched_backward(loss, **kwargs):
        backwards[-1] -= 1
        return backward(loss, **kwargs)

    trainer.training_step, trainer.accelerator.backward = watched_step, watched_backward
    trainer.train()
    found = {"gradients": gradients.steps, "seen": seen, "left": backwards, "log": trainer.state.log_history}
    found |= {"evaluation": trainer.evaluate(), "scores": trainer.score_rows(rows)}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(make_model, pairs, naive_losses, naive_pairs, tmp_path):
    model, rows = make_model("gpt2"), pairs(7)
    model.save_pretrained(tmp_path / "model")
    rows.save_to_disk(tmp_path / "rows")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_rank, args=(rank, port, tmp_path)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]

    steps = [sorted(first + second) for first, second in zip(*(rank["seen"] for rank in found), strict=True)]
    assert [len(step) for step in steps] == [4, 3, 4, 3]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(7))
    assert [rank["left"] for rank in found] == [[0] * 4] * WORLD  # as many backward calls as micro-batches
    log = [entry for entry in found[0]["log"] if "loss" in entry]
    for number, step in enumerate(steps):
        model.zero_grad()
        chosen, rejected = naive_pairs(model, rows.select(step))
        loss = naive_losses(model, rows.select(step)).mean()
        loss.backward()
        for rank in found:
            for gradient, parameter in zip(rank["gradients"][number], model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-9)
        assert log[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log[number]["rewards/margins"] == pytest.approx(2 * (chosen - rejected).mean().item(), rel=1e-5)
    losses = naive_losses(model, rows).tolist()
    for rank in found:
        assert rank["evaluation"]["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
        assert rank["scores"]["loss"].tolist() == pytest.approx(losses, rel=1e-5)
