"""Small models and files for the fuzzer, in a separate folder."""

from __future__ import annotations

import json
from contextlib import contextmanager

import datasets
import pytest
import torch
import transformers as hf
from openai import _base_client

from simpo.world.pairs import make_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """The working directory for all examples: ``model``, ``pairs.jsonl``, ``test.jsonl``, ``prompts.jsonl``, ..."""
    folder = tmp_path_factory.mktemp("workshop")
    rows = [
        {"prompt": f"What is {a} and {b}?", "chosen": f"It is {a + b}.", "rejected": f"I would say {a * b + 9}, {a}."}
        for a in range(2)
        for b in range(6)
    ]
    answers = [
        {"id": str(n), "prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]}
        for n, row in enumerate(rows)
    ]
    scored = [row | {"scores": [1.0, 0.0]} for row in answers]
    tables = {"pairs": rows[:8], "test": rows[8:], "prompts": [{"prompt": row["prompt"]} for row in rows[:3]]}
    tables |= {"responses": answers, "annotated": scored}
    tables |= {"sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows[:8]]}
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    tokenizer = make_tokenizer([text for row in rows for text in row.values()], vocab_size=300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def inside(workshop, tmp_path_factory, monkeypatch):
    """Work in the workshop with separate caches, without API keys, and with short waits for servers."""
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop / "replies"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """``with scratch() as folder``: an empty folder, removed afterwards."""
    import shutil

    @contextmanager
    def make():
        folder = tmp_path_factory.mktemp("scratch")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return make
