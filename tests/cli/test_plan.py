"""``simpo plan``: from a folder with only a configuration to memory, time and keys; and what it rejects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers as hf

from simpo.cli import main
from simpo.cli.plan import sharding_of
from simpo.world.pairs import write_model, write_pairs

LENGTHS = ["--prompt_tokens", "50", "--response_tokens", "30", "--rows", "1000"]


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(vocab_size=500, num_hidden_layers=3, max_position_embeddings=512, **sizes)
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def planned(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out if code == 0 else captured.err


def test_a_configuration_is_enough(folder, capsys) -> None:
    machine = ["--gpu", "h100-80gb", "--gpus", "2", "--sharding", "ddp", "--price", "2"]
    given = [folder, "--dataset_name", "none", *LENGTHS, *machine, "--max_length", "256", "--json", "true"]
    code, text = planned(capsys, *given)
    assert code == 0
    found = json.loads(text)
    own = found["recipe"]
    assert own["fits"] and found["fastest"]["fits"]
    weights = 2 * 500 * 64 + 3 * (64 * 64 * 3 + 3 * 64 * 96 + 2 * 64) + 64  # of the configuration above
    assert own["weights"] == weights
    assert own["steps"] == 63  # of 8 pairs per device
    assert own["tokens_per_step"] == pytest.approx(16 * 110, rel=0.01)
    hours = own["total_seconds"] / 3600
    assert own["cost"] == pytest.approx(hours * 2 * 2)
    assert own["kilowatt_hours"] == pytest.approx(hours * 2 * 0.7)
    assert found["fastest"]["keys"]["activation_checkpointing"] is False


def test_the_fastest_plan_takes_the_least_time_and_shards_as_requested(folder, capsys) -> None:
    """Memory is so slow that the optimizer step dominates, which fsdp divides among GPUs."""
    machine = ["--gpu_memory_gb", "80", "--gpu_tflops", "100", "--gpu_terabytes", "0.001", "--gpus", "2"]
    given = [folder, "--dataset_name", "none", *LENGTHS, *machine, "--max_length", "256", "--json", "true"]
    found = {}
    for sharding in ("ddp", "fsdp", None):
        code, text = planned(capsys, *given, *(["--sharding", sharding] if sharding else []))
        assert code == 0
        found[sharding] = json.loads(text)
        assert found[sharding]["fastest"]["sharding"] == (sharding or "fsdp")
        assert found[sharding]["fastest"]["step_seconds"] <= found[sharding]["recipe"]["step_seconds"]
    seconds = {sharding: each["fastest"]["step_seconds"] for sharding, each in found.items()}
    assert seconds[None] == seconds["fsdp"] < seconds["ddp"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu", "H900"], ["gpu", "H900", "H100-80GB", "gpu_memory_gb"]),
        (["--gpu_memory_gb", "0.6", "--gpu_tflops", "100"], ["0.6 GiB", "use_peft", "optim"]),
        (["--gpu", "h100", "--optim", "galore_adamw"], ["optim", "galore_adamw", "adamw_torch"]),
        (["--gpu", "h100", "--sharding", "fsdp"], ["sharding", "gpus"]),
        (["--gpu_memory_gb", "0"], ["gpu_memory_gb", "above 0"]),
    ],
)
def test_what_cannot_be_planned_is_reported(arguments, parts, folder, capsys) -> None:
    code, error = planned(capsys, folder, "--dataset_name", "none", *LENGTHS, *arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert all(part in error for part in parts)


def test_a_missing_configuration_is_reported(tmp_path, capsys) -> None:
    code, error = planned(capsys, str(tmp_path), "--dataset_name", "none", *LENGTHS, "--gpu", "h100")
    assert code == 2
    assert "model_name_or_path" in error
    assert error.count("\n") == 1


def test_the_command_determines_the_available_keys(folder, tmp_path, capsys) -> None:
    code, error = planned(capsys, folder, "--dataset_name", "none", *LENGTHS, "--command=sft", "--beta", "2")
    assert code == 2
    assert "beta" in error
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("command: reward\n")
    code, error = planned(capsys, str(recipe), folder, "--dataset_name", "none", *LENGTHS)
    assert code == 2
    assert "--command reward" in error


def test_a_recipe_may_have_all_keys_of_its_command(folder, capsys) -> None:
    """Including keys that only matter during training."""
    given = [folder, "--dataset_name", "none", *LENGTHS, "--gpu", "h100", "--json", "true", "--eval_generations", "8"]
    code, text = planned(
        capsys, *given, "--command", "online", "--annotator", "exact", "--max_new_tokens", "20", "--engine", "vllm"
    )
    assert code == 0
    assert json.loads(text)["recipe"]["fits"]


def test_the_launcher_determines_the_sharding(monkeypatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    plain = SimpleNamespace(deepspeed_plugin=None, fsdp=None)
    assert sharding_of(plain) == "ddp"
    assert sharding_of(SimpleNamespace(deepspeed_plugin=None, fsdp=True)) == "fsdp"
    stages = [SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), fsdp=None) for stage in (1, 2, 3)]
    assert list(map(sharding_of, stages)) == ["ddp", "zero2", "zero3"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of(plain) == "fsdp"


MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


def test_an_8b_recipe_is_planned_in_10_seconds_and_1_gb(tmp_path) -> None:
    """On two cores; the limit applies to each of them."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    hf.LlamaConfig(vocab_size=128256, num_hidden_layers=32, **sizes).save_pretrained(tmp_path)
    machine = ["--gpu", "H100-80GB", "--gpus", "8", "--bf16", "true"]
    command = [sys.executable, "-m", "simpo", "plan", str(tmp_path), "--dataset_name", "none", *LENGTHS, *machine]
    measured = [sys.executable, "-c", MEASURE, *command]  # a child's peak includes its parent's memory at the fork
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(measured, env=environment, capture_output=True, text=True, check=True)
    code, seconds, kilobytes = json.loads(done.stdout)
    assert code == 0, done.stderr
    assert seconds < 20
    assert kilobytes * 1024 < 1e9


@pytest.fixture
def run(tmp_path):
    """Arguments for training a tiny model on the tiny world."""
    write_model(tmp_path / "model", seed=0)
    write_pairs(tmp_path / "pairs.jsonl", 16, seed=0)
    given = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "out",
        "max_length": 128,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
    }
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def test_a_run_that_fits_states_its_peak_and_runs(run, tmp_path, capsys) -> None:
    assert main(["train", *run, "--plan"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("plan:"))
    assert " GiB, peak in " in line
    assert (tmp_path / "out/results.json").exists()


def test_a_run_that_does_not_fit_names_keys_that_would_help(run, tmp_path, monkeypatch, capsys) -> None:
    """On a machine with 16 MiB, enough for the model with one row at a time but not with all of them."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=16 * 2**20))
    rows = ["--max_batch_tokens", "10000", "--per_device_train_batch_size", "16"]
    assert main(["train", *run, *rows, "--plan"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("GiB, peak in ", "backward", "it fits with max_batch_tokens: ", "activation_checkpointing: "):
        assert part in error
    assert not (tmp_path / "out").exists()
