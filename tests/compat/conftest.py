"""A tokenizer, an OPT and conversational pairs, in memory and on disk; and pair losses by their formula."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from simpo.world.pairs import make_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep tests from reading or writing the user's dataset cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def quiet() -> dict:
    """Settings for a short CPU run with rows in order and every step logged."""
    return {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Pairs whose chosen responses differ in length, so that means over tokens and over pairs differ."""
    return [
        {
            "prompt": _turn("user", f"What is {a} plus {b}?"),
            "chosen": _turn("assistant", f"It is {a + b}" + f", as {b} and {a} make {a + b}" * a + "."),
            "rejected": _turn("assistant", "I do not know." + " Sorry." * b),
        }
        for a in range(4)
        for b in range(2)
    ]


@pytest.fixture
def text_rows(rows) -> Dataset:
    """The same pairs as strings."""
    return Dataset.from_list([{key: value[0]["content"] for key, value in row.items()} for row in rows])


@pytest.fixture(scope="session")
def tokenizer(rows):
    return make_tokenizer([row[key][0]["content"] for row in rows for key in row], 300)


@pytest.fixture
def opt(make_model, tokenizer):
    """A tiny model with OPT-350M's architecture."""
    return make_model("opt", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)


@pytest.fixture
def model_folder(tmp_path, opt, tokenizer) -> str:
    folder = tmp_path / "model"
    opt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data_file(tmp_path, rows) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def naive_step():
    """``naive_step(model, pairs, beta, gamma, sft_weight)``: the loss of a batch as in TRL and the paper, ``[]``.

    Uses the model's own forward, one sequence at a time; the SFT term averages over all chosen tokens in the batch.
    """

    def logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    def naive(model, pairs, beta: float, gamma: float, sft_weight: float = 0.0) -> torch.Tensor:
        chosen = [logps(model, row["prompt_ids"], row["response_ids"][0]) for row in pairs]
        rejected = [logps(model, row["prompt_ids"], row["response_ids"][1]) for row in pairs]
        margins = torch.stack([c.mean() - r.mean() for c, r in zip(chosen, rejected, strict=True)])
        return -F.logsigmoid(beta * margins - gamma).mean() - sft_weight * torch.cat(chosen).mean()

    return naive
