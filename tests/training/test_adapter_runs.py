"""Adapter runs: their output, resuming after a kill, chained runs, and every objective on real pairs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from tests.sampled import sampled
from tests.training_runs import killed_after_step
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo import OBJECTIVES, PreferenceConfig, PreferenceTrainer, TokenizedComparison, cli, score_responses
from simpo.models.loading import load_model, load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.terminal import printable

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
ADAPTER = "adapter_model.safetensors"


def options(world, output, command="train", **changes) -> list[str]:
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / ("sft.jsonl" if command == "sft" else "train.jsonl"),
        "output_dir": output,
        "use_peft": "true",
        "lora_r": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "disable_dropout": "false",  # includes the adapter's dropout
    } | changes
    return [command, *(f"--{key}={value}" for key, value in given.items() if value is not None)]


@pytest.fixture(scope="module")
def uninterrupted(chat_world, tmp_path_factory):
    """An uninterrupted adapter run of three steps."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cli.main(options(chat_world, output, eval_dataset_name=chat_world / "test.jsonl")) == 0
    return output


def test_a_run_saves_an_adapter_that_peft_can_load(uninterrupted, chat_world):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {ADAPTER, "adapter_config.json", "tokenizer.json", "generation_config.json", "README.md"}
    assert "model.safetensors" not in names
    step = {path.name for path in (uninterrupted / "checkpoint-2").iterdir()}
    assert {ADAPTER, "optimizer.pt", "manifest.json"} <= step
    assert "model.safetensors" not in step
    card = (uninterrupted / "README.md").read_text()
    assert "library_name: peft" in card
    assert "| `lora_r` | 4 |" in card

    tokenizer = AutoTokenizer.from_pretrained(uninterrupted)
    assert tokenizer.chat_template
    base = AutoModelForCausalLM.from_pretrained(chat_world / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, uninterrupted).eval()
    ours = load_model(str(uninterrupted)).eval()
    for line in (chat_world / "test.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["chosen"], return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [0, 2])
def test_a_killed_run_resumes_to_identical_weights(step, uninterrupted, chat_world, tmp_path):
    """Even when killed before the first checkpoint: the new adapter is initialized from the seed."""
    output, world = tmp_path / "run", chat_world
    with killed_after_step(step):
        cli.main(options(world, output, eval_dataset_name=world / "test.jsonl"))
    assert cli.main(options(world, output, eval_dataset_name=world / "test.jsonl")) == 0
    assert (output / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    first, second = (json.loads((folder / "results.json").read_text())["metrics"] for folder in (output, uninterrupted))
    assert first == second


def test_changed_adapter_settings_make_a_different_run(uninterrupted, chat_world, tmp_path, capsys):
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    assert cli.main(options(chat_world, output, lora_r=8, eval_dataset_name=chat_world / "test.jsonl")) == 2
    assert 'lora_r: was "4", now "8"' in capsys.readouterr().err


def test_the_best_adapter_is_loaded_at_the_end(chat_world, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "rewards/margins", "learning_rate": 0.1}
    best |= {"eval_dataset_name": chat_world / "test.jsonl", "load_best_model_at_end": "true"}
    output = tmp_path / "run"
    assert cli.main(options(chat_world, output, greater_is_better="false", **best)) == 0
    kept = Path(json.loads((output / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert kept.name != "checkpoint-3"
    assert (kept / ADAPTER).read_bytes() == (output / ADAPTER).read_bytes()


def test_sft_preference_training_and_sampling_chain_on_one_adapter(chat_world, tmp_path, capsys, monkeypatch):
    """The second run continues the first run's adapter, and its held-out metrics before training come from it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 1 and 2?"}\n')
    assert cli.main(options(chat_world, tmp_path / "sft", "sft", save_strategy="no")) == 0
    sft = {"model_name_or_path": tmp_path / "sft", "use_peft": None, "lora_r": None}
    given = options(chat_world, tmp_path / "simpo", **sft, eval_dataset_name=chat_world / "test.jsonl")
    assert cli.main(given) == 0
    metrics = json.loads((tmp_path / "simpo/results.json").read_text())["metrics"]
    before = {m["name"]: m["value"] for m in metrics if m["stage"] == "before"}
    config = PreferenceConfig(str(tmp_path / "out"), use_cpu=True, report_to=[])
    tokenizer = load_tokenizer(str(tmp_path / "sft"))
    rows = load_dataset("json", data_files=str(chat_world / "test.jsonl"), split="train")
    start = PreferenceTrainer(load_model(str(tmp_path / "sft")), config, rows, processing_class=tokenizer)
    scores = start.score_rows(start.train_dataset)
    assert before["eval_rewards/margins"] == pytest.approx(scores["rewards/margins"].mean(), rel=1e-6)
    assert before["eval_rewards/margins"] != 0
    sample = ["sample", str(tmp_path / "simpo"), str(prompts), "--max_new_tokens=4", "--temperature=0"]
    assert cli.main([*sample, f"--output_dir={tmp_path / 'answers'}"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 and 2?\n"))
    capsys.readouterr()
    assert cli.main(["chat", str(tmp_path / "simpo"), "--max_new_tokens=4", "--temperature=0"]) == 0
    answer = json.loads((tmp_path / "answers/responses.jsonl").read_text())["responses"][0]
    assert printable(answer.strip()) in capsys.readouterr().out


# ---- real pairs ----


@pytest.fixture(scope="module")
def real_pairs(tmp_path_factory):
    """Four short real pairs as a text dataset."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not available")
    pairs = str(SHARED / "data/preferences/alpacaeval_balanced_test.jsonl.gz")
    rows = load_dataset("json", data_files=pairs, split="train", cache_dir=tmp_path_factory.mktemp("cache"))
    return rows.filter(lambda row: len(row["chosen"]) + len(row["rejected"]) < 300).shuffle(seed=0).select(range(4))


@pytest.mark.parametrize("objective", sampled(OBJECTIVES, kept=("simpo", "dpo", "kto", "bco", "listwise_dpo")))
def test_objectives_on_real_pairs_match_plain_peft(objective, real_pairs, naive_logprobs, config, tmp_path):
    """Two steps of every objective; the saved adapter gives the same results in plain peft as the trained model."""
    name = str(SHARED / "models/tiny-english")
    torch.manual_seed(0)
    model = load_model(ModelArguments(name, use_peft=True, lora_r=4))
    args = config(
        objective=objective, per_device_train_batch_size=2, learning_rate=1e-3, reference_cache=str(tmp_path / "cache")
    )
    trainer = PreferenceTrainer(model, args, real_pairs, processing_class=load_tokenizer(name))
    rows = [TokenizedComparison(row["prompt_ids"], row["response_ids"]) for row in trainer.train_dataset]
    with torch.no_grad():
        before = score_responses(model, rows).avg
    trainer.train()
    with torch.no_grad():
        after = score_responses(model.eval(), rows)
    assert trainer.state.global_step == 2
    assert (after.avg - before).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "adapter"))

    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with torch.no_grad():
        theirs = naive_logprobs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), rows)
    ends = after.length.cumsum(0).long().tolist()
    expected = torch.stack([theirs[end - int(n) : end].mean() for end, n in zip(ends, after.length, strict=True)])
    torch.testing.assert_close(after.avg, expected, rtol=0, atol=1e-5)
