"""Describes the memory and speed of graphics cards, and measures the speed of this machine."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import constants
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM

from simpo.config.fields import nearest
from simpo.errors import SimpoError, third_party
from simpo.models.devices import device
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import choose_path, policy_logprobs
from simpo.planning.memory import Cost, Tracer, attended
from simpo.runs.files import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """The speed of a machine at each part of a :class:`~simpo.planning.memory.Cost`."""

    product: float  # FLOP/s of matrix products, in half precision or, on a CPU without autocast, in fp32
    attention: float  # FLOP/s of attention, counting masked scores too
    moved: float  # bytes read and written per second
    overhead: float  # fixed seconds per operation

    def seconds(self, cost: Cost) -> float:
        """Return the seconds that operations of this cost take when run one after the other."""
        computed = cost.product / self.product + cost.attention / self.attention
        return computed + cost.moved / self.moved + cost.operations * self.overhead


@dataclass(frozen=True)
class Card:
    """The data sheet of a graphics card; None means unknown."""

    name: str
    memory_gb: float  # GiB that a process can allocate
    tflops: float | None  # TFLOP/s of dense half-precision matrix products with fp32 accumulation
    terabytes: float | None  # memory bandwidth in TB/s
    watts: float | None = None  # power limit
    link: float = 25.0  # GB/s to and from other cards in the same machine

    @property
    def model(self) -> str:
        """The name without the memory size."""
        return self.name.rpartition("-")[0]

    @property
    def rates(self) -> Rates | None:
        """Rates reached in practice, as fractions of the data sheet (fitted in docs/plan.md); None if unknown."""
        if self.tflops is None or self.terabytes is None:
            return None
        return Rates(
            product=_PRODUCT_SHARE * self.tflops * 1e12,
            attention=_ATTENTION_SHARE * self.tflops * 1e12,
            moved=_MOVED_SHARE * self.terabytes * 1e12,
            overhead=_LAUNCH,
        )


# Fractions of the data sheet reached in practice, and seconds to launch a kernel. Then memory other than tensors: bytes
# of the CUDA context with library workspaces, bytes of NCCL, and the fraction of the peak lost to fragmentation.
_PRODUCT_SHARE, _ATTENTION_SHARE, _MOVED_SHARE, _LAUNCH = 0.54, 0.45, 0.85, 4e-6
CONTEXT, COMMUNICATION, FRAGMENTATION = 0.6 * 2**30, 1.0 * 2**30, 0.06

_SHEETS = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
CARDS = {name: Card(name, *values) for name, values in _SHEETS.items()}


def find_card(
    name: str | None, memory_gb: float | None = None, tflops: float | None = None, terabytes: float | None = None
) -> Card:
    """Find a card by name, and override its data sheet with any values given; see :class:`Card` for their units.

    ``name`` is a key of :data:`CARDS`, in any case and with any separators; without a memory size, the first card of
    that model is used. A new name needs ``memory_gb`` and ``tflops``; its ``terabytes`` default to 1 per 300 TFLOP/s.
    """
    normalized = _normalize(name or "")
    card = next((c for c in CARDS.values() if normalized in (_normalize(c.name), _normalize(c.model))), None)
    if card is None:
        if memory_gb is None or tflops is None:
            hint = nearest(name or "", CARDS) or ""
            raise SimpoError(
                f"gpu: {name!r} is unknown{hint}; choose from {', '.join(CARDS)}; for any other card, give "
                "gpu_memory_gb and gpu_tflops"
            )
        card = Card(name or f"{memory_gb:g} GB", memory_gb, tflops, tflops / 300)
    given: dict[str, Any] = {"memory_gb": memory_gb, "tflops": tflops, "terabytes": terabytes}
    return replace(card, **{field: value for field, value in given.items() if value is not None})


def _normalize(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# ---- This machine.


def local_card() -> Card | None:
    """Return this machine's first GPU, with its data sheet if the model is known, otherwise without rates."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    memory = gpu.total_memory / 2**30
    matching = [  # by whole words, because an "L40" is not an L4
        card for card in CARDS.values() if re.search(rf"\b{card.model.replace('-', '[ -]')}\b", gpu.name, re.IGNORECASE)
    ]
    if not matching:
        return Card(gpu.name, memory, tflops=None, terabytes=None)
    closest = max(matching, key=lambda card: (len(card.model), -abs(card.memory_gb - memory)))
    return replace(closest, name=gpu.name, memory_gb=memory)


def machine_name(*, half: bool) -> str:
    """Return the name of this machine's card, or of its CPU with the number of threads and the precision."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads{', bf16' if half else ''}"


def stored_rates() -> dict[str, Rates]:
    """Load the rates stored by :func:`store_rates`, by machine name; a damaged file is logged and ignored."""
    path = _rates_file()
    if not path.exists():
        return {}
    with suppress(SimpoError), third_party(str(path)):
        stored = {name: Rates(**rates) for name, rates in json.loads(path.read_text(encoding="utf-8")).items()}
        if all(0 < rate < math.inf for rates in stored.values() for rate in asdict(rates).values()):
            return stored
    logger.warning("%s is damaged and not used; measure the rates again with simpo plan --calibrate", path)
    return {}


def store_rates(rates: Mapping[str, Rates]) -> Path:
    """Store rates by machine name, keep those of other machines, and return the file."""
    merged = {name: asdict(values) for name, values in (stored_rates() | dict(rates)).items()}
    write_text(_rates_file(), json.dumps(merged, indent=2) + "\n")
    return _rates_file()


def _rates_file() -> Path:
    return Path(constants.HF_HOME) / "simpo" / "plan.json"


# ---- Calibration: time small training steps, and fit the rates to their operations.

# Hidden size, layers, vocabulary, number of pairs, and tokens in the prompt and in each of the two responses.
_CPU_STEPS = (
    (64, 4, 500, 8, 10),
    (64, 2, 16000, 8, 30),
    (128, 2, 8000, 4, 40),
    (128, 6, 4000, 8, 40),
    (128, 2, 500, 1, 500),
    (256, 6, 4000, 3, 50),
    (256, 2, 4000, 1, 300),
    (512, 2, 500, 8, 60),
)
_GPU_STEPS = ((1024, 4, 8000, 4, 300), (2048, 2, 32000, 16, 200), (4096, 2, 32000, 16, 300), (4096, 1, 500, 2, 4000))
_ROUNDS = 7


def measure_rates(report: Callable[[str], None]) -> dict[str, Rates]:
    """Measure this machine's rates by name: a GPU in half precision, a CPU also in fp32. Takes minutes."""
    cpu = device().type == "cpu"
    return {machine_name(half=half): _measure(report, cpu, half) for half in ((False, True) if cpu else (True,))}


def _measure(report: Callable[[str], None], cpu: bool, half: bool) -> Rates:
    shapes = _CPU_STEPS if cpu else _GPU_STEPS
    steps = [_make_step(*shape, cpu=cpu, half=half) for shape in shapes]
    # In rounds over all steps, a shared machine's slow minutes affect all of them alike.
    rounds = np.array([[_seconds(step, cpu) for _, step in steps] for _ in range(_ROUNDS)])
    medians = np.median(rounds, axis=0).tolist()
    for (hidden, layers, _, pairs, tokens), seconds in zip(shapes, medians, strict=True):
        report(f"{3 * pairs * tokens} tokens, hidden size {hidden}, {layers} layers: {seconds:.3g} s")
    return fit_rates([(cost, seconds) for (cost, _), seconds in zip(steps, medians, strict=True)])


def _make_step(
    hidden: int, layers: int, vocabulary: int, pairs: int, tokens: int, *, cpu: bool, half: bool
) -> tuple[Cost, Callable[[], None]]:
    """Return the cost of forward and backward of a small model, and a function that runs them."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // (32 if cpu else 128),
        num_key_value_heads=hidden // (64 if cpu else 512),
    )
    model: Any = LlamaForCausalLM(config).to(device(), torch.float32 if cpu else torch.bfloat16).train()
    ids = [3] * tokens
    batch = PackedBatch.build([TokenizedComparison(ids, [ids, ids])] * pairs).to(device())
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=cpu and half)
    with autocast():
        choose_path(model, batch)

    def step() -> None:
        with autocast():
            logps = policy_logprobs(model, batch)
        logps.sum().backward()

    step()
    with Tracer(attended(batch)) as tracer:
        step()
    return Cost(**tracer.costs), step


def _seconds(step: Callable[[], None], cpu: bool) -> float:
    # with one thread, processor time excludes other processes on the machine
    clock = time.process_time if cpu and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    if not cpu:
        torch.accelerator.synchronize()
    return clock() - start


def fit_rates(samples: Sequence[tuple[Cost, float]]) -> Rates:
    """Fit rates to costs and their seconds by non-negative least squares on the relative errors."""
    if not all(seconds > 0 for _, seconds in samples):
        raise SimpoError("--calibrate: a step took no measurable time; the clock of this machine is too coarse")
    features = np.array([np.array(astuple(cost)) / seconds for cost, seconds in samples])
    scale = features.max(axis=0)
    if missing := [field.name for field, largest in zip(fields(Cost), scale, strict=True) if not largest]:
        raise SimpoError(f"--calibrate: the measured steps contain no operations of type {', '.join(missing)}")
    solution, _ = nnls(features / scale, np.ones(len(samples)))
    product, attention, moved, overhead = np.maximum(solution / scale, 1e-30)
    return Rates(1 / product, 1 / attention, 1 / moved, overhead)
