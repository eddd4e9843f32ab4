"""Calls to vLLM and its outputs, with a fake; benchmarks/vllm_cpu.sh runs the real engine."""

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from tests.forked import run_ranks

from simpo.cli import main
from simpo.errors import SimpoError
from simpo.generation.engine import Sampled
from simpo.generation.sample import Job, PromptArguments
from simpo.generation.settings import SamplingSettings
from simpo.generation.vllm import VllmEngine
from simpo.models.settings import ModelArguments

STOP = 9


class LLM:
    """Answers every prompt with its reverse and, if there is room, a stop token."""

    def __init__(self, **options):
        if options.get("gpu_memory_utilization", 0) > 1:
            raise ValueError("1 validation error:\n must be at most 1")
        if options["tensor_parallel_size"] > 8:
            raise RuntimeError("Engine core initialization failed")
        self.options = options

    def generate(self, prompts, parameters, *, use_tqdm):
        assert not use_tqdm
        self.seeds = [wanted.seed for wanted in parameters]
        return [self._answer(p["prompt_token_ids"], w) for p, w in zip(prompts, parameters, strict=True)]

    def _answer(self, prompt, wanted):
        assert wanted.stop_token_ids == [STOP] and wanted.logprobs == 0
        ids = [*reversed(prompt), STOP]
        reason = "stop" if len(ids) <= wanted.max_tokens else "length"
        ids = ids[: wanted.max_tokens]
        logprobs = [{token_id: SimpleNamespace(logprob=-token_id / 10)} for token_id in ids]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)])


@dataclasses.dataclass
class EngineArgs:
    """A few of the real engine arguments."""

    model: str = ""
    dtype: str = ""
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    enable_sleep_mode: bool = False


@pytest.fixture
def vllm(monkeypatch):
    def namespace(**values):
        return SimpleNamespace(**values)

    module = namespace(LLM=LLM, SamplingParams=namespace, TokensPrompt=dict, EngineArgs=EngineArgs, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.fixture
def engine(vllm):
    return VllmEngine(ModelArguments("some/model", dtype="bfloat16"), [STOP])


def test_outputs_are_read_from_vllm(engine):
    settings = SamplingSettings(max_new_tokens=3)
    first, second = engine.generate([[1, 2], [3, 4, 5]], settings, seed=7)
    assert first == Sampled([2, 1, STOP], True, pytest.approx(-1.2))
    assert second == Sampled([5, 4, 3], False, pytest.approx(-1.2))


def test_every_request_has_its_own_seed(engine):
    settings = SamplingSettings(max_new_tokens=3)
    engine.generate([[1]] * 4, settings, seed=7)
    seeds = engine._llm.seeds
    assert len(set(seeds)) == 4
    engine.generate([[1]] * 2, settings, seed=7)
    assert engine._llm.seeds == seeds[:2]


def test_new_weights_are_loaded_and_caches_are_reset(engine, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        LLM, "collective_rpc", lambda self, name, *, kwargs: calls.append((name, kwargs)), raising=False
    )
    monkeypatch.setattr(LLM, "reset_prefix_cache", lambda self: len(calls) == 1, raising=False)
    engine.reload(tmp_path)
    assert calls == [("reload_weights", {"weights_path": str(tmp_path)})]
    with pytest.raises(SimpoError, match="engine: vLLM could not clear its prefix cache"):
        engine.reload(tmp_path)
    monkeypatch.setattr(LLM, "collective_rpc", lambda self, name: None)  # as in an older vLLM
    with pytest.raises(SimpoError, match=r"engine: vLLM 0\.0 cannot load other weights: .*kwargs"):
        engine.reload(tmp_path)


def test_its_processes_end_with_a_killed_parent(vllm, monkeypatch, tmp_path):
    class Starting(LLM):
        def __init__(self, **options):
            super().__init__(**options)
            self.process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
            self.process.start()
            (tmp_path / "pid").write_text(str(self.process.pid))

    def killed():
        engine = VllmEngine(ModelArguments("some/model"), [STOP])
        os.kill(os.getpid(), signal.SIGKILL)
        return engine

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Starting)
    assert run_ranks(1, killed, folder=tmp_path).codes == [-signal.SIGKILL]
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_checkpoints_sampling_settings_are_not_used(engine):
    assert engine._llm.options["generation_config"] == "vllm"
    assert engine._llm.options["dtype"] == "bfloat16"


def test_an_adapter_must_be_merged_first(engine, tmp_path):
    LoraConfig(base_model_name_or_path="some/model").save_pretrained(tmp_path)
    with pytest.raises(SimpoError, match="merge the adapter first with 'simpo merge'"):
        VllmEngine(ModelArguments(str(tmp_path)), [STOP])


def test_a_missing_vllm_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SimpoError, match=r"vLLM is not installed; pip install 'simpo\[vllm\]'"):
        VllmEngine(ModelArguments("some/model"), [STOP])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_model_length": 9}, "engine_args: vLLM 0.0 has no 'max_model_length'; did you mean max_model_len?"),
        ({"dtype": "float16"}, "engine_args: dtype is set by simpo"),
        ({"gpu_memory_utilization": 3.0}, "must be at most 1"),
        ({"tensor_parallel_size": 16}, "'tensor_parallel_size': 16.*Engine core initialization failed"),
    ],
)
def test_unusable_engine_arguments_give_a_one_line_error(vllm, given, message):
    with pytest.raises(SimpoError, match=message) as raised:
        VllmEngine(ModelArguments("some/model", dtype="bfloat16"), [STOP], given)
    assert "\n" not in str(raised.value)


def sample(chat_world, tmp_path, *options):
    """Run ``simpo sample``."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is 1 and 2?"}) + "\n")
    return main(["sample", str(chat_world / "model"), str(prompts), f"--output_dir={tmp_path / 'out'}", *options])


def test_the_commands_engine_arguments_reach_vllm_and_the_record(vllm, chat_world, tmp_path, monkeypatch):
    started = []

    class Seen(LLM):
        def __init__(self, **options):
            started.append(options)
            raise ValueError("enough")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Seen)
    options = ["--max_model_len=64", "--engine_args", "enforce_eager=True", '{"gpu_memory_utilization": 0.5}']
    assert sample(chat_world, tmp_path, "--engine=vllm", *options) == 2
    given = {"max_model_len": 64, "enforce_eager": True, "gpu_memory_utilization": 0.5}
    assert started[0].items() >= given.items()
    settings = SamplingSettings(max_new_tokens=8)
    source = PromptArguments(str(tmp_path / "prompts.jsonl"))
    model = ModelArguments(str(chat_world / "model"))
    job = Job.prepare(model, source, settings, "vllm", lambda line: None, given)
    assert {key: job.identity()[f"engine_args/{key}"] for key in given} == given
    with pytest.raises(SimpoError, match="max_new_tokens: 64 leaves no room"):
        Job.prepare(model, source, SamplingSettings(max_new_tokens=64), "vllm", lambda line: None, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_model_len=64"], "max_model_len: engine transformers does not use it"),
        (["--engine_args", "enforce_eager=true"], "engine_args: engine transformers does not use it"),
        (["--engine=vllm", "--engine_args", "enforce_eager"], "a JSON object, got 'enforce_eager'"),
        (["--engine=vllm", "--engine_args", "{1, 2"], "expected KEY=VALUE or a JSON object"),
        (["--engine=vllm", "--max_model_len=64", "--engine_args", "max_model_len=8"], "max_model_len is given twice"),
    ],
)
def test_invalid_engine_arguments_are_rejected(options, message, vllm, chat_world, tmp_path, capsys):
    assert sample(chat_world, tmp_path, *options) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
