"""The sampling engine based on vLLM, an optional dependency."""

from __future__ import annotations

import dataclasses
import multiprocessing
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simpo.config.fields import nearest
from simpo.errors import SimpoError, third_party
from simpo.generation.engine import Images, Sampled
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.models.adapters import find_adapter
from simpo.models.settings import ModelArguments

# Engine arguments that simpo sets itself, from its own options or because sampling depends on them.
_SET_BY_SIMPO = (
    "model", "tokenizer", "revision", "trust_remote_code", "dtype",
    "generation_config", "logprobs_mode", "runner",
)  # fmt: skip


def import_vllm(engine_args: Mapping[str, Any]) -> Any:
    """Import vLLM; raises :class:`SimpoError` if it is not installed or does not accept ``engine_args``."""
    try:
        import vllm  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError("engine: vLLM is not installed; pip install 'simpo[vllm]'") from error
    known = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
    for name in engine_args:
        if name in _SET_BY_SIMPO:
            raise SimpoError(f"engine_args: {name} is set by simpo; remove it")
        if name not in known:
            raise SimpoError(f"engine_args: vLLM {vllm.__version__} has no {name!r}{nearest(name, known)}")
    return vllm


def load_vllm(model: ModelArguments, engine_args: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Import vLLM as :func:`import_vllm` does, and reject adapters, which this engine does not load."""
    vllm = import_vllm(engine_args)
    if find_adapter(model.model_name_or_path, model.model_revision) is not None:
        raise SimpoError("engine: vLLM needs a full model; merge the adapter first with 'simpo merge'")
    return vllm


class VllmEngine:
    """Samples with vLLM on all GPUs of this machine.

    ``engine_args`` are additional ``vllm.EngineArgs``, such as ``max_model_len``.

    Raises:
        SimpoError: vLLM rejects an argument or cannot start; see also :func:`load_vllm`.
    """

    def __init__(
        self, model: ModelArguments, stop_ids: list[int], engine_args: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._vllm = load_vllm(model, engine_args)
        self._stop_ids = stop_ids
        given: dict[str, Any] = {"tensor_parallel_size": max(1, torch.cuda.device_count()), **engine_args}
        others = multiprocessing.active_children()
        with third_party(f"engine: vLLM cannot start with {given}"):
            self._llm = self._vllm.LLM(
                model=model.model_name_or_path,
                revision=model.model_revision,
                trust_remote_code=model.trust_remote_code,
                dtype=model.dtype,
                generation_config="vllm",  # ignore the checkpoint's own sampling settings
                logprobs_mode="raw_logprobs",
                **given,
            )

        self._watcher = _kill_on_exit([p for p in multiprocessing.active_children() if p not in others])

    def reload(self, folder: Path) -> None:
        """Load new weights of the same model from ``folder``, and clear the prefix cache."""
        with third_party(f"engine: vLLM {self._vllm.__version__} cannot load other weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self._llm.reset_prefix_cache():
            raise SimpoError("engine: vLLM could not clear its prefix cache; run the same command again")

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """Sample one response per prompt; images are rejected. See :class:`simpo.generation.engine.Engine`."""
        if any(images):
            raise SimpoError("engine: vllm does not support images here; use transformers")
        parameters = [
            self._vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_new_tokens,
                seed=derived_seed(seed, number),
                stop_token_ids=self._stop_ids,
                logprobs=0,  # only the sampled token's
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        responses = []
        for request in self._llm.generate(inputs, parameters, use_tqdm=False):
            output = request.outputs[0]
            ids = list(output.token_ids)
            logp = sum(step[token_id].logprob for step, token_id in zip(output.logprobs, ids, strict=True))
            responses.append(Sampled(ids, output.finish_reason == "stop", float(logp)))
        return responses


def _kill_on_exit(processes: Sequence[Any]) -> subprocess.Popen[bytes]:
    """Start a watcher that kills ``processes`` once this process ends or the watcher is garbage-collected.

    Otherwise vLLM's workers would survive if this process were killed, and hold on to the GPU memory.
    """
    command = ["sh", "-c", 'read -r line; kill -9 "$@"', "sh", *(str(process.pid) for process in processes)]
    return subprocess.Popen(  # noqa: S603 - the arguments are process ids
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
