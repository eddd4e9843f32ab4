"""Answers from weights handed over as files: an engine that reads them samples like the model in memory.

vLLM is not installed where these tests run. Instead, a stand-in engine loads the same folders at the same times with
transformers; ``benchmarks/vllm_cpu.sh`` runs the real one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tests.cli.test_online import sharded
from tests.forked import run_ranks
from tests.generation.test_vllm import EngineArgs
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.cli import main
from simpo.generation.engine import TransformersEngine
from simpo.runs.files import read_lines
from simpo.training import sampling
from simpo.training.online import OnlineTrainer

RECIPE = {
    "objective": "rloo", "num_generations": 4, "max_length": 40, "max_new_tokens": 8, "sync_every": 2,
    "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 6, "report_to": "none", "use_cpu": True,
    "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "trust_remote_code": True, "dtype": "float64",
    "annotator": "function:deadly_scorers:short", "generation_batch_size": 32,
}  # fmt: skip
SCORERS = """
import os, signal
from pathlib import Path

def short(prompt, response):
    if response != "Answer." and "KILL_AT" in os.environ:
        calls = Path("calls.txt")
        calls.write_text(calls.read_text() + "." if calls.exists() else ".")
        if calls.stat().st_size == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
    return -len(response)
"""


class FolderEngine:
    """Loads a folder whenever vLLM would, and samples from it like from a model in memory."""

    def __init__(self, model, stop_ids, engine_args):
        assert "RANK" not in os.environ and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        self._dtype, self._arguments = getattr(torch, model.dtype), engine_args
        self._tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
        self._stop_ids = stop_ids
        with Path("started.txt").open("a") as file:
            file.write("started\n")
        self.read(Path(model.model_name_or_path))

    def read(self, folder):
        assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt")]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype, use_safetensors=True)
        self._engine = TransformersEngine(model, self._tokenizer)
        assert self._engine.stop_ids == self._stop_ids

    reload = read

    def generate(self, prompts, settings, seed):
        with Path("asked.txt").open("a") as file:
            file.write(f"{os.getpid()} {len(prompts)} {json.dumps(self._arguments)}\n")
        return self._engine.generate(prompts, settings, seed)


class StaleEngine(FolderEngine):
    """Never reloads anything after the first folder."""

    def reload(self, folder):
        pass


@pytest.fixture
def recipe(chat_world, tmp_path, monkeypatch):
    """``recipe(**changes)``: arguments for a small run that hands its weights to the engine standing in for vLLM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=EngineArgs, __version__="0.0"))
    monkeypatch.setattr(sampling, "VllmEngine", FolderEngine)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    (tmp_path / "deadly_scorers.py").write_text(SCORERS)

    def write(**changes):
        here = {"model_name_or_path": str(chat_world / "model"), "dataset_name": str(chat_world / "train.jsonl")}
        merged = RECIPE | here | {"output_dir": "out", "engine": "vllm"} | changes
        Path("recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))
        return ["online", "recipe.yaml"]

    return write


def rollouts(folder):
    """Return the lines of all rollouts, and separately the engine's log-probabilities."""
    rows = [row for path in sorted(Path(folder, "rollouts").glob("0*.jsonl")) for row in read_lines(path)]
    return rows, [row.pop("engine_logps", None) for row in rows]


def weights(folder, name="model.safetensors"):
    return load_file(Path(folder, name))


def differs(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("objective", ["rloo", "simpo"])
def test_handed_over_weights_give_the_same_rollouts_as_weights_in_memory(recipe, objective):
    """All answers, scores and weights are bit-identical, and no weight files are left behind."""
    assert main(recipe(objective=objective, engine="transformers", output_dir="memory")) == 0
    assert main(recipe(objective=objective)) == 0
    (expected, none), (found, logps) = rollouts("memory"), rollouts("out")
    assert found == expected and len(found) == 24 and none == [None] * 24
    for row, own in zip(found, logps, strict=True):
        assert own == pytest.approx([sum(one) for one in row["behavior_logps"]], abs=1e-5)  # generate has fp32 logits
    assert differs(weights("memory"), weights("out")) == 0
    left = {path.name for path in Path("out/rollouts").iterdir() if not path.name.startswith((".0", "0"))}
    assert left == {"training.json"}
    gaps = [line["rollout/engine_gap"] for line in read_lines(Path("out/metrics.jsonl")) if "rollout/reward" in line]
    assert len(gaps) == 3 and all(0 <= gap < 1e-6 for gap in gaps)
    assert not any("rollout/engine_gap" in line for line in read_lines(Path("memory/metrics.jsonl")))


def test_an_adapter_is_merged_into_a_copy(recipe, chat_world, monkeypatch):
    """The adapter and its base weights stay unchanged, and the answers come from the merged model."""
    adapter = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["c_attn"], "dtype": "float32"}
    watched = []
    write = sampling.VllmSampler._write_weights

    def watch(self):
        model = self._trainer.model
        assert isinstance(model, PeftModel)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        write(self)
        after = model.state_dict()
        watched.append(before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before))

    monkeypatch.setattr(sampling.VllmSampler, "_write_weights", watch)
    assert main(recipe(**adapter, learning_rate=0.1, engine="transformers", output_dir="memory")) == 0
    assert main(recipe(**adapter, learning_rate=0.1)) == 0
    assert watched == [True] * 3
    (expected, _), (found, logps) = rollouts("memory"), rollouts("out")
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in expected]
    for row, own in zip(found, logps, strict=True):
        assert own == pytest.approx([sum(one) for one in row["behavior_logps"]], abs=1e-4)
    # the adapter changed the log-probabilities by more than that
    moved = [
        sum(own) - sum(start)
        for row in found[-8:]
        for own, start in zip(row["behavior_logps"], row["ref_logps"], strict=True)
    ]
    assert max(map(abs, moved)) > 0.01
    name = "adapter_model.safetensors"
    assert differs(weights("memory", name), weights("out", name)) < 1e-3


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_one_of_two_processes_runs_the_engine(recipe, parallelism, tmp_path):
    """It gets all prompts of a rollout and complete weights; both processes train like one with weights in memory."""
    shared = {"optim": "sgd", "learning_rate": 0.1, "sync_every": 1, "save_strategy": "no"}
    assert main(recipe(**shared, engine="transformers", output_dir="memory")) == 0
    layers = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "GPT2Block"}, "ddp_backend": "gloo"}
    arguments = recipe(**shared | (layers if parallelism == "fsdp" else {}), per_device_train_batch_size=2)
    found = run_ranks(2, sharded if parallelism == "fsdp" else main, arguments, folder=tmp_path)
    assert found.codes == [0, 0], found.stderr
    asked = [line.split(maxsplit=2) for line in Path("asked.txt").read_text().splitlines()]
    assert len({process for process, _, _ in asked}) == 1 and [int(count) for _, count, _ in asked] == [16] * 6
    assert differs(weights("memory"), weights("out")) < 1e-9
    (expected, _), (rows, _) = rollouts("memory"), rollouts("out")
    assert [row["response_ids"] for row in rows] == [row["response_ids"] for row in expected]


def test_a_killed_run_continues_with_a_new_engine(recipe, tmp_path):
    """To identical bytes; weights left behind by a killed process are replaced."""
    assert main(recipe(output_dir="whole")) == 0
    arguments = recipe()
    for moment in (2, 50, 90):  # during the annotation of each rollout
        found = run_ranks(1, main, arguments, folder=tmp_path, environment={"KILL_AT": str(moment)})
        assert found.codes == [-signal.SIGKILL], found.stderr
        Path("out/rollouts/weights").mkdir()
        Path("out/rollouts/weights/config.json").write_text("{}")
    assert main(arguments) == 0
    for path in [*Path("whole/rollouts").glob("0*"), Path("whole/model.safetensors")]:
        assert (Path("out") / path.relative_to("whole")).read_bytes() == path.read_bytes()


def test_an_engine_that_keeps_old_weights_is_restarted(recipe, monkeypatch, caplog):
    """Its answers are discarded: rollouts and weights equal those of the model in memory."""
    assert main(recipe(engine="transformers", output_dir="memory")) == 0
    monkeypatch.setattr(sampling, "VllmEngine", StaleEngine)
    assert main(recipe()) == 0
    assert rollouts("out")[0] == rollouts("memory")[0] and differs(weights("memory"), weights("out")) == 0
    started = Path("started.txt").read_text().splitlines()
    assert len(started) == 3 and len(Path("asked.txt").read_text().splitlines()) == 4  # one of them was discarded
    assert sum("restarting it for every rollout" in record.getMessage() for record in caplog.records) == 1


def test_an_engine_with_the_wrong_weights_is_an_error(recipe, monkeypatch, capsys):
    class Other(FolderEngine):
        def read(self, folder):
            super().read(folder)
            with torch.no_grad():
                self._engine.model.get_output_embeddings().weight.mul_(30)

    monkeypatch.setattr(sampling, "VllmEngine", Other)
    assert main(recipe()) == 2
    error = capsys.readouterr().err
    assert error.startswith("simpo: error: engine: vLLM's log-probabilities") and error.count("\n") == 1, error


def test_the_engine_fits_the_longest_answer_and_gets_the_recipes_arguments(recipe):
    """Arguments that only affect memory are not part of the run's identity; other engine arguments are."""
    own = {"engine_args": {"enforce_eager": True}, "max_steps": 1}
    assert main(recipe(gpu_memory_utilization=0.3, **own)) == 0
    asked = Path("asked.txt").read_text()
    assert json.loads(asked.split(maxsplit=2)[2]) == {
        "max_model_len": 40,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": True,
    }
    assert main(recipe(gpu_memory_utilization=0.2, max_model_len=64, **own)) == 0
    assert Path("asked.txt").read_text() == asked  # the run is already finished
    assert main(recipe(gpu_memory_utilization=0.3, max_steps=1)) == 2
    assert main(recipe(engine="transformers", max_steps=1)) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "sglang"}, ["engine", "transformers, vllm"]),
        ({"engine": None, "max_model_len": 64}, ["max_model_len", "engine transformers"]),
        ({"engine": None, "engine_args": {"enforce_eager": True}}, ["engine_args", "engine transformers"]),
        ({"engine_args": {"enforce_eagr": True}}, ["enforce_eagr", "enforce_eager"]),
        ({"engine_args": {"dtype": "float16"}}, ["engine_args: dtype"]),
        ({"engine_args": {"enable_sleep_mode": True}}, ["enable_sleep_mode", "gpu_memory_utilization"]),
        ({"engine_args": ["enforce_eager"]}, ["KEY=VALUE"]),
        ({"max_model_len": 39}, ["max_model_len: 39", "max_length 40"]),
        ({"engine_args": {"max_model_len": 39}}, ["max_model_len: 39", "max_length 40"]),
    ],
)
def test_mistakes_give_a_one_line_error(recipe, changes, words, capsys):
    assert main(recipe(**changes)) == 2
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0 and all(word in error for word in words), error
    assert not Path("out").exists()


def test_a_missing_vllm_is_reported(recipe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(recipe()) == 2
    assert capsys.readouterr().err == "simpo: error: engine: vLLM is not installed; pip install 'simpo[vllm]'\n"
    assert not Path("out").exists()


def test_4_bit_weights_are_rejected(recipe, monkeypatch, capsys):
    load = OnlineTrainer.load

    def as_if_quantized(*arguments):
        model = load(*arguments)
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr(OnlineTrainer, "load", as_if_quantized)
    assert main(recipe(use_peft=True, dtype="float32")) == 2
    error = capsys.readouterr().err
    assert error.startswith("simpo: error: engine: vllm ") and "4 bits" in error and error.count("\n") == 1, error
