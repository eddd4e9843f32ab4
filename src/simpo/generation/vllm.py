"""The engine on vLLM, an optional dependency."""

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

# Engine arguments that the command's own options set, or that sampling depends on.
_FIXED = (
    "model", "tokenizer", "revision", "trust_remote_code", "dtype",
    "generation_config", "logprobs_mode", "runner",
)  # fmt: skip


def import_vllm(engine_args: Mapping[str, Any]) -> Any:
    """Import the package; raises :class:`SimpoError` if it is not installed or has no such engine arguments."""
    try:
        import vllm  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError("engine: vLLM is not installed; pip install 'simpo[vllm]'") from error
    known = [field.name for field in dataclasses.fields(vllm.EngineArgs)]
    for name in engine_args:
        if name in _FIXED:
            raise SimpoError(f"engine_args: {name}: is set by simpo and its own options; leave it out")
        if name not in known:
            raise SimpoError(f"engine_args: vLLM {vllm.__version__} has no {name!r}{nearest(name, known)}")
    return vllm


def load_vllm(model: ModelArguments, engine_args: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Like :func:`import_vllm`, but also refuses a model that vLLM cannot load."""
    vllm = import_vllm(engine_args)
    if find_adapter(model.model_name_or_path, model.model_revision) is not None:
        raise SimpoError("engine: vLLM takes whole models here; 'simpo merge' the adapter first")
    return vllm


class VllmEngine:
    """Samples with vLLM on all GPUs of this machine.

    ``engine_args`` are further arguments of ``vllm.EngineArgs``, such as ``max_model_len``.

    Raises:
        SimpoError: see :func:`load_vllm`; vLLM cannot use an argument; or it cannot start.
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
                generation_config="vllm",  # ignores the checkpoint's own sampling settings
                logprobs_mode="raw_logprobs",
                **given,
            )

        self._watcher = _end_with_this_process([one for one in multiprocessing.active_children() if one not in others])

    def reload(self, folder: Path) -> None:
        """Load the weights in ``folder``, which are of the same model, and clear the prefix cache."""
        with third_party(f"engine: vLLM {self._vllm.__version__} cannot load other weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self._llm.reset_prefix_cache():
            raise SimpoError("engine: vLLM keeps what it computed with other weights; run the same command again")

    def generate(
        self, prompts: Sequence[list[int]], settings: SamplingSettings, seed: int, *, images: Sequence[Images] = ()
    ) -> list[Sampled]:
        """One response to every prompt, without images; see :class:`simpo.generation.engine.Engine`."""
        if any(images):
            raise SimpoError("engine: vllm gets no images here; use transformers")
        parameters = [
            self._vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_new_tokens,
                seed=derived_seed(seed, number),
                stop_token_ids=self._stop_ids,
                logprobs=0,  # for the sampled token only
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        found = []
        for request in self._llm.generate(inputs, parameters, use_tqdm=False):
            output = request.outputs[0]
            ids = list(output.token_ids)
            logp = sum(step[token_id].logprob for step, token_id in zip(output.logprobs, ids, strict=True))
            found.append(Sampled(ids, output.finish_reason == "stop", float(logp)))
        return found


def _end_with_this_process(processes: Sequence[Any]) -> subprocess.Popen[bytes]:
    """Start a watcher that kills ``processes`` once this process ends or the watcher is garbage-collected.

    vLLM's own would outlive a process that was killed, and keep the memory of the GPUs.
    """
    command = ["sh", "-c", 'read -r line; kill -9 "$@"', "sh", *(str(process.pid) for process in processes)]
    return subprocess.Popen(  # noqa: S603 - numbers of processes
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
