"""ZeRO-2 and ZeRO-3 on two CPU processes against one process without DeepSpeed, and DeepSpeed configuration."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import json
import os
import shutil
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from tests.forked import Ended, run_ranks
from torch.testing import assert_close
from transformers import AutoTokenizer, TrainerCallback

from simpo import SimpoError, cli
from simpo.models.zero import read_config, unset_batch_sizes
from simpo.runs.results import read_results
from simpo.training.packed import PackedTrainer

# The paper's accelerate_configs/deepspeed_zero3.yaml, except for precision, number of processes, and the CPU.
PAPER = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "deepspeed_config": {
        "deepspeed_multinode_launcher": "standard",
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero3_save_16bit_model": True,
        "zero_stage": 3,
    },
    "distributed_type": "DEEPSPEED",
    "downcast_bf16": "no",
    "machine_rank": 0,
    "main_training_function": "main",
    "num_machines": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
} | {"mixed_precision": "no", "num_processes": 2, "use_cpu": True}
# Otherwise all weights of a tiny model are below the threshold and stay unpartitioned.
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

KINDS = {
    "simpo": ["train"],
    "dpo": ["train", "--objective=dpo", "--beta=0.1"],
    "live": ["train", "--objective=dpo", "--beta=0.1", "--precompute_ref_log_probs=false"],
    "kto": ["train", "--objective=kto", "--beta=0.1", "--precompute_ref_log_probs=false"],
    "kl": ["train", "--kl_weight=0.1"],
    "lora": ["train", "--use_peft=true", "--lora_r=2", "--objective=dpo", "--beta=0.1"],
    "sft": ["sft", "--dataset_train_split=train[:16]", "--dataset_test_split=train[16:]"],
    "reward": ["reward"],
    "diverging": ["train"],
}
LAUNCHED = {
    "zero2": ["through-simpo", "killed-simpo", "simpo", "dpo", "live", "lora"],
    "zero3": ["through-simpo", "killed-simpo", "simpo", "dpo", "live", "sft"],
    "partitioned": ["live", "kl", "lora", "reward", "diverging"],
}


class Killed(TrainerCallback):
    """Stops the run after its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def run_in_turn(runs: dict[str, list[str]], folder: Path) -> int:
    """Run each kind in turn; "killed" ones stop early and are then continued by the same command."""
    # Compiling the operator takes a minute and would only speed up gloo. (``deepspeed.comm.torch`` is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    codes, train = {}, PackedTrainer.train

    def killed(self, *args, **kwargs):
        self.add_callback(Killed())
        return train(self, *args, **kwargs)

    for name, arguments in runs.items():
        PackedTrainer.train = killed if name.startswith("killed") else train
        try:
            codes[name] = cli.main(arguments)
        except (KeyboardInterrupt, SystemExit):
            codes[name] = 130
        except Exception:
            traceback.print_exc()
            codes[name] = 1
        gc.collect()  # on all processes at the same time, because DeepSpeed objects communicate on deletion
        (folder / f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))
    return 0


def launch_file(stage: str, folder: Path) -> dict:
    """Return the paper's launch file with another ZeRO stage or a DeepSpeed config file."""
    if stage == "zero3":
        return PAPER
    if stage == "zero2":
        return PAPER | {"deepspeed_config": {"zero_stage": 2}}
    (folder / "zero.json").write_text(json.dumps(PARTITIONED))
    given = {"deepspeed_config_file": str(folder / "zero.json"), "zero3_init_flag": True}
    return {key: value for key, value in PAPER.items() if key != "mixed_precision"} | {"deepspeed_config": given}


@pytest.fixture(scope="module")
def world(chat_world, make_model):
    """The chat world with a Llama whose output embeddings are not tied."""
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    tokenizer.save_pretrained(chat_world / "llama")
    make_model("llama", torch.float32, vocab_size=len(tokenizer), pad_token_id=2).save_pretrained(chat_world / "llama")
    return chat_world


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """``alone(kind)``: the folder of a single-process run without DeepSpeed."""

    @functools.cache
    def run(kind: str) -> Path:
        output = tmp_path_factory.mktemp("alone") / kind
        assert cli.main(options(world, kind, output, 8)) == 0
        return output

    return run


def options(world: Path, kind: str, output: Path, rows: int) -> list[str]:
    given = {
        "model_name_or_path": world / "llama",
        "dataset_name": world / ("sft.jsonl" if kind == "sft" else "train.jsonl"),
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "reference_cache": output.parent / f"{output.name}-reference",
        "per_device_train_batch_size": rows,
        "max_steps": 5,
        "learning_rate": 1e20 if kind == "diverging" else 1e-3,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_batch_tokens": 96,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    if kind in ("sft", "reward"):
        del given["reference_cache"]
    if kind == "sft":
        del given["eval_dataset_name"]
    return [*KINDS[kind], *(f"--{key}={value}" for key, value in given.items())]


def held_out_metrics(folder: Path) -> dict[tuple[str, str | None], float]:
    return {(m.name, m.stage): m.value for m in read_results(folder / "results.json").metrics if m.value is not None}


def logs(folder: Path) -> dict[tuple[int, str], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    wanted = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")
    return {(line["step"], key): line[key] for line in lines for key in wanted if key in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def launch(stage: str, runs: dict[str, list[str]], folder: Path, monkeypatch) -> Ended:
    """Run the commands on two processes under DeepSpeed and check that each ends as expected."""
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch_file(stage, folder)))
    ended: list[Ended] = []

    def run(args) -> None:  # replaces torchrun's own, in the environment that accelerate set up from the file
        ended.append(run_ranks(int(args.nproc_per_node), run_in_turn, runs, folder, folder=folder, timeout=900))

    monkeypatch.setattr(torch.distributed.run, "run", run)
    file = ["--config_file", str(folder / "launch.yaml"), "--main_process_port", "0"]
    launch_command(launch_command_parser().parse_args([*file, "no script"]))
    (done,) = ended
    expected = {name: 130 if name.startswith("killed") else 2 if name == "diverging" else 0 for name in runs}
    for rank in (0, 1):
        assert json.loads((folder / f"codes-{rank}.json").read_text()) == expected, done.stdout + done.stderr
    return done


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", LAUNCHED)
def test_two_processes_train_like_one(stage, world, alone, tmp_path, monkeypatch):
    """Compares losses, gradient norms, held-out metrics and saved weights; a killed run resumes to identical bits."""
    runs = {}
    for name in LAUNCHED[stage]:
        kind = name.rpartition("-")[2]
        runs[name] = options(world, kind, tmp_path / name.removeprefix("killed-"), 4)
    done = launch(stage, runs, tmp_path, monkeypatch)
    for name in runs.keys() & KINDS.keys() - {"diverging"}:
        assert_close(weights(tmp_path / name), weights(alone(name)), rtol=0, atol=1e-5)
        assert logs(tmp_path / name) == pytest.approx(logs(alone(name)), abs=1e-5, rel=1e-5)
        assert held_out_metrics(tmp_path / name) == pytest.approx(held_out_metrics(alone(name)), abs=1e-5, rel=1e-5)
    if "diverging" in runs:
        assert "step 3: the gradient is not finite" in done.stderr
    if "through-simpo" in runs:
        assert "continues from" in (tmp_path / "simpo" / "log.txt").read_text()
        assert_close(weights(tmp_path / "simpo"), weights(tmp_path / "through-simpo"), rtol=0, atol=0)
        assert logs(tmp_path / "simpo") == logs(tmp_path / "through-simpo")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "partitioned"])
def test_expert_balancing_matches_ddp(stage, world, make_model, tmp_path, monkeypatch):
    """The micro-batches are the same, and ``test_experts.py`` compares DDP with the definition."""
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 2, "std": 0.1, "output_router_logits": True}
    model = make_model("mixtral", torch.float32, router_aux_loss_coef=0.5, **settings)
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "llama")
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(world / name, tmp_path)
    command = options(tmp_path, "simpo", tmp_path / "ddp", 4)
    done = run_ranks(2, cli.main, [*command, "--ddp_backend=gloo", "--use_cpu=true"], folder=tmp_path)
    assert done.codes == [0, 0], done.stderr
    launch(stage, {"simpo": options(tmp_path, "simpo", tmp_path / "simpo", 4)}, tmp_path, monkeypatch)
    assert_close(weights(tmp_path / "simpo"), weights(tmp_path / "ddp"), rtol=0, atol=1e-5)
    lines = [map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) for name in ("simpo", "ddp")]
    found, expected = ([line["router/aux_loss"] for line in part if "router/aux_loss" in line] for part in lines)
    assert len(found) == 5
    assert found == pytest.approx(expected, abs=1e-5)


def test_agreeing_batch_sizes_are_left_to_the_trainer_and_others_are_errors():
    """Batch sizes in the file are accepted if they agree with the recipe; otherwise they are an error."""
    given = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    found = dict(given)
    unset_batch_sizes(found, 2, 4)
    assert found == dict.fromkeys(given, "auto")
    for key, value in {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}.items():
        with pytest.raises(SimpoError, match=f"{key} is {value}"):
            unset_batch_sizes(given | {key: value}, 2, 4)


@pytest.mark.parametrize(("given", "problem"), [("nowhere.json", "nowhere.json"), ("{", "not a JSON file")])
def test_an_unreadable_configuration_is_an_error(given, problem, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SimpoError, match=problem):
        read_config(given, 1, 1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SimpoError, match="start the run with torchrun"):
        read_config("{}", 1, 1)
