"""Graphics cards, how fast a machine computes, and the measurement of the machine at hand."""

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

    product: float  # FLOP/s of matrix products in half precision, or in single precision on a CPU
    attention: float  # FLOP/s of attention, with what a causal mask hides
    moved: float  # bytes read and written per second
    overhead: float  # seconds that an operation takes in any case

    def seconds(self, cost: Cost) -> float:
        """Seconds that operations of this cost take one after the other."""
        computed = cost.product / self.product + cost.attention / self.attention
        return computed + cost.moved / self.moved + cost.operations * self.overhead


@dataclass(frozen=True)
class Card:
    """A graphics card by its data sheet; None is not known."""

    name: str
    memory_gb: float  # GiB that a process can allocate
    tflops: float | None  # TFLOP/s of dense half-precision matrix products with fp32 accumulation
    terabytes: float | None  # per second to and from its memory
    watts: float | None = None  # its power limit
    link: float = 25.0  # GB/s to and from other cards of the same machine

    @property
    def model(self) -> str:
        """Its name without the memory."""
        return self.name.rpartition("-")[0]

    @property
    def rates(self) -> Rates | None:
        """Rates reached in practice, as shares of the data sheet (fitted in docs/plan.md); None without one."""
        if self.tflops is None or self.terabytes is None:
            return None
        return Rates(
            product=_PRODUCT_SHARE * self.tflops * 1e12,
            attention=_ATTENTION_SHARE * self.tflops * 1e12,
            moved=_MOVED_SHARE * self.terabytes * 1e12,
            overhead=_LAUNCH,
        )


# Shares of the data sheet that are reached, seconds to launch a kernel, and bytes next to PyTorch's tensors: the CUDA
# context with the libraries' workspaces, of NCCL, and the share of the peak that is lost to fragmentation.
_PRODUCT_SHARE, _ATTENTION_SHARE, _MOVED_SHARE, _LAUNCH = 0.54, 0.45, 0.85, 4e-6
CONTEXT, COMMUNICATION, FRAGMENTATION = 0.6 * 2**30, 1.0 * 2**30, 0.06

_SHEETS = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
CARDS = {name: Card(name, *figures) for name, figures in _SHEETS.items()}


def find_card(
    name: str | None, memory_gb: float | None = None, tflops: float | None = None, terabytes: float | None = None
) -> Card:
    """The card of a name, with the figures that are given by hand in place of its own; a name alone can be new.

    ``name`` is one of :data:`CARDS`, in any case and with any separators; without its memory, the first of that model.
    The figures are those of :class:`Card`; ``terabytes`` are by default one for 300 TFLOP/s.
    """
    plain = _plain(name or "")
    found = next((card for card in CARDS.values() if plain in (_plain(card.name), _plain(card.model))), None)
    if found is None:
        if memory_gb is None or tflops is None:
            hint = nearest(name or "", CARDS) or ""
            raise SimpoError(
                f"gpu: {name!r} is not known{hint}; there are {', '.join(CARDS)}; of another card give gpu_memory_gb "
                "and gpu_tflops"
            )
        found = Card(name or f"{memory_gb:g} GB", memory_gb, tflops, tflops / 300)
    by_hand: dict[str, Any] = {"memory_gb": memory_gb, "tflops": tflops, "terabytes": terabytes}
    return replace(found, **{part: value for part, value in by_hand.items() if value is not None})


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# ---- The machine at hand.


def card_at_hand() -> Card | None:
    """This machine's first GPU, with the data sheet of its name if that is known and without rates if not."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    matching = [  # by whole words: an "L40" is not an L4
        card
        for card in CARDS.values()
        if re.search(rf"\b{card.model.replace('-', '[ -]')}\b", found.name, re.IGNORECASE)
    ]
    if not matching:
        return Card(found.name, memory, tflops=None, terabytes=None)
    closest = max(matching, key=lambda card: (len(card.model), -abs(card.memory_gb - memory)))
    return replace(closest, name=found.name, memory_gb=memory)


def machine_name(*, half: bool) -> str:
    """The name of this machine's card, or of its processor with the number of threads and the precision of products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads{', bf16' if half else ''}"


def stored_rates() -> dict[str, Rates]:
    """The rates that :func:`store_rates` has stored, by machine; nothing if they are damaged, which is reported."""
    path = _stored()
    if not path.exists():
        return {}
    with suppress(SimpoError), third_party(str(path)):
        found = {name: Rates(**rates) for name, rates in json.loads(path.read_text(encoding="utf-8")).items()}
        if all(0 < rate < math.inf for rates in found.values() for rate in asdict(rates).values()):
            return found
    logger.warning("%s is damaged, and its rates are not used; measure them again: simpo plan --calibrate", path)
    return {}


def store_rates(rates: Mapping[str, Rates]) -> Path:
    """Store rates by the names of machines next to those of others; returns the file."""
    every = {name: asdict(each) for name, each in (stored_rates() | dict(rates)).items()}
    write_text(_stored(), json.dumps(every, indent=2) + "\n")
    return _stored()


def _stored() -> Path:
    return Path(constants.HF_HOME) / "simpo" / "plan.json"


# ---- Calibration: small training steps are timed, and rates are fitted to their operations.

# Hidden size, layers, vocabulary, and pairs of a prompt with two responses of so many tokens each.
_ON_A_CPU = (
    (64, 4, 500, 8, 10),
    (128, 2, 8000, 4, 40),
    (256, 6, 2000, 4, 60),
    (256, 2, 4000, 1, 300),
    (512, 2, 500, 8, 60),
)
_ON_A_GPU = ((1024, 4, 8000, 4, 300), (2048, 2, 32000, 16, 200), (4096, 2, 32000, 16, 300), (4096, 1, 500, 2, 4000))
_REPEATS = 5


def measure_rates(report: Callable[[str], None]) -> dict[str, Rates]:
    """The rates of this machine by its names: of a GPU in half precision, of a CPU also in fp32; takes minutes."""
    cpu = device().type == "cpu"
    return {machine_name(half=half): _measured(report, cpu, half) for half in ((False, True) if cpu else (True,))}


def _measured(report: Callable[[str], None], cpu: bool, half: bool) -> Rates:
    samples = []
    for hidden, layers, vocabulary, pairs, tokens in _ON_A_CPU if cpu else _ON_A_GPU:
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
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu and half):
            choose_path(model, batch)
            samples.append(_timed(model, batch, cpu))
        report(f"{batch.tokens} tokens, hidden size {hidden}, {layers} layers: {samples[-1][1]:.3g} s")
    return fit_rates(samples)


def _timed(model: Any, batch: PackedBatch, cpu: bool) -> tuple[Cost, float]:
    """The cost of forward and backward, and their median seconds."""

    def step() -> None:
        policy_logprobs(model, batch).sum().backward()
        if not cpu:
            torch.accelerator.synchronize()

    step()
    with Tracer(attended(batch)) as tracer:
        step()
    # of one thread, so that other processes of the machine do not count
    clock = time.process_time if cpu and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(_REPEATS):
        start = clock()
        step()
        seconds.append(clock() - start)
    return Cost(**tracer.costs), float(np.median(seconds))


def fit_rates(samples: Sequence[tuple[Cost, float]]) -> Rates:
    """The rates with the smallest relative errors for costs and their seconds, least squares without negative ones."""
    if not all(seconds > 0 for _, seconds in samples):
        raise SimpoError("--calibrate: a step took no measurable time; the clock of this machine is too coarse")
    features = np.array([np.array(astuple(cost)) / seconds for cost, seconds in samples])
    scale = features.max(axis=0)
    if missing := [one.name for one, most in zip(fields(Cost), scale, strict=True) if not most]:
        raise SimpoError(f"--calibrate: the measured steps contain no operations of the kind {', '.join(missing)}")
    solution, _ = nnls(features / scale, np.ones(len(samples)))
    product, attention, moved, overhead = np.maximum(solution / scale, 1e-30)
    return Rates(1 / product, 1 / attention, 1 / moved, overhead)
