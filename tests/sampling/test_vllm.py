"""What is asked of vLLM and read from its answers, with a stand-in: it runs on GPUs only."""

import sys
from types import SimpleNamespace

import pytest
from peft import LoraConfig

from simpo.errors import SimpoError
from simpo.sampling.engine import Sampled
from simpo.sampling.settings import SamplingSettings
from simpo.sampling.vllm import VllmEngine
from simpo.training.model_arguments import ModelArguments

STOP = 9


class LLM:
    """Answers every prompt with itself backwards and a stop token, if there is room for it."""

    def __init__(self, **options):
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


@pytest.fixture
def engine(monkeypatch):
    def namespace(**values):
        return SimpleNamespace(**values)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=namespace, TokensPrompt=dict))
    return VllmEngine(ModelArguments("some/model", dtype="bfloat16"), [STOP])


def test_answers_of_vllm(engine):
    settings = SamplingSettings(max_new_tokens=3)
    first, second = engine.generate([[1, 2], [3, 4, 5]], settings, seed=7)
    assert first == Sampled([2, 1, STOP], True, pytest.approx(-1.2))
    assert second == Sampled([5, 4, 3], False, pytest.approx(-1.2))


def test_every_request_has_a_seed_of_its_own(engine):
    settings = SamplingSettings(max_new_tokens=3)
    engine.generate([[1]] * 4, settings, seed=7)
    seeds = engine._llm.seeds
    assert len(set(seeds)) == 4
    engine.generate([[1]] * 2, settings, seed=7)
    assert engine._llm.seeds == seeds[:2]


def test_the_checkpoints_own_sampling_is_not_asked_for(engine):
    assert engine._llm.options["generation_config"] == "vllm"
    assert engine._llm.options["dtype"] == "bfloat16"


def test_an_adapter_is_to_be_merged_first(engine, tmp_path):
    LoraConfig(base_model_name_or_path="some/model").save_pretrained(tmp_path)
    with pytest.raises(SimpoError, match="'simpo merge' the adapter first"):
        VllmEngine(ModelArguments(str(tmp_path)), [STOP])


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SimpoError, match=r"vLLM is not installed; pip install 'simpo\[vllm\]'"):
        VllmEngine(ModelArguments("some/model"), [STOP])
