"""ZeRO-2 and ZeRO-3 with two processes on a CPU, against one process without DeepSpeed, which has to be installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simpo import cli
from simpo.results import read_results

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# The contents of the paper's accelerate_configs/deepspeed_zero3.yaml; what differs from it: precision, processes, CPU.
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
# Without it all weights of a tiny model are small enough to stay whole.
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

KINDS = {
    "simpo": ["train"],
    "dpo": ["train", "--objective=dpo", "--beta=0.1"],
    "live": ["train", "--objective=dpo", "--beta=0.1", "--precompute_ref_log_probs=false"],
    "kto": ["train", "--objective=kto", "--beta=0.1", "--precompute_ref_log_probs=false"],
    "kl": ["train", "--kl_weight=0.1"],
    "lora": ["train", "--use_peft=true", "--lora_r=2", "--objective=dpo", "--beta=0.1"],
    "sft": ["sft"],
    "reward": ["reward"],
}

# Runs every kind; the first is killed after its third step, and then the same command continues it.
SCRIPT = """
import gc, json, os, sys, traceback
from transformers import TrainerCallback
from simpo import cli
from simpo.training.packed import PackedTrainer

class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

codes, train = {}, PackedTrainer.train

def killed(self, *args, **kwargs):
    self.add_callback(Killed())
    return train(self, *args, **kwargs)

for name, options in json.loads(sys.argv[1]).items():
    if name.startswith("killed"):
        PackedTrainer.train = killed
    try:
        codes[name] = cli.main(options)
    except (KeyboardInterrupt, SystemExit):
        codes[name] = 130
    except Exception:
        traceback.print_exc()
        codes[name] = 1
    PackedTrainer.train = train
    gc.collect()
    if os.environ["RANK"] == "0":
        print(f"CODE {name} {codes[name]}", flush=True)
"""


def options(world: Path, kind: str, output: Path, rows: int) -> list[str]:
    data = "sft" if kind == "sft" else "train"
    given = {
        "model_name_or_path": world / "llama",
        "dataset_name": world / f"{data}.jsonl",
        "eval_dataset_name": world / ("sft.jsonl" if kind == "sft" else "test.jsonl"),
        "output_dir": output,
        "reference_cache": output.parent / f"{output.name}-reference",
        "per_device_train_batch_size": rows,
        "max_steps": 5,
        "learning_rate": 1e-3,
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
    return [*KINDS[kind], *(f"--{key}={value}" for key, value in given.items())]
