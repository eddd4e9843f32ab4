"""Who is compared: simpo's paths and its peers, each at every micro-batch size it can be tuned to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.setting import Setting

Kind = Literal["simpo", "loop", "trl cpo", "trl dpo", "liger"]


@dataclass(frozen=True)
class Entrant:
    """Who trains, and in which micro-batches.

    Attributes:
        name: in tables.
        kind: what trains: simpo's trainer; simpo's forward in a bare loop, for any K; TRL's CPO or DPO trainer; or
            transformers' ``Trainer`` with Liger's fused SimPO loss.
        per_device: a peer's per-device batch; accumulation makes up the rest of the step.
        path: simpo's ``forward_path``.
        max_batch_tokens: simpo's, None for its default.
        objective: ``"simpo"`` or ``"dpo"``.
        precomputed: DPO's reference log-probabilities come from before the training, else from a copy of the model.
        liger: TRL's trainer with Liger's layers.
        compiled: ``torch_compile``.
        shared: of a loop: whether the responses of a comparison share its prompt.
    """

    name: str
    kind: Kind
    per_device: int | None = None
    path: str | None = None
    max_batch_tokens: int | None = None
    objective: str = "simpo"
    precomputed: bool = False
    liger: bool = False
    compiled: bool = False
    shared: bool = True


FAMILIES = {
    "simpo": "simpo's trainer, at its default budget and at every --max-batch-tokens",
    "compiled": "simpo's trainer with torch_compile",
    "padded": "simpo's fallback for models that cannot share prompts",
    "dpo": "simpo's trainer with the DPO loss, with a cached and with a live reference",
    "sharing": "simpo's forward in a bare loop, and the same with every response packed alone; any K",
    "trl-cpo": "TRL's CPO trainer with the SimPO loss",
    "trl-dpo": "TRL's DPO trainer, plain and with precomputed reference",
    "trl-dpo-liger": "the same with Liger's layers",
    "liger": "transformers' Trainer with Liger's fused SimPO loss",
}


def entrants(family: str, setting: Setting, budgets: list[int], micro_batches: list[int]) -> Iterator[Entrant]:
    """The entrants of one of :data:`FAMILIES`.

    Args:
        family: which family.
        setting: pairs of a step.
        budgets: simpo's ``max_batch_tokens``, in addition to its default.
        micro_batches: the peers' per-device batches; by default all that divide the step.
    """
    step = setting.pairs_per_step
    grid = [size for size in micro_batches or range(step, 0, -1) if step % size == 0]
    if family == "simpo":
        yield Entrant("simpo", "simpo", path="auto")
        yield from (Entrant(f"simpo {n}", "simpo", path="auto", max_batch_tokens=n) for n in budgets)
    elif family == "compiled":
        yield Entrant("simpo compiled", "simpo", path="auto", compiled=True)
    elif family == "padded":
        yield Entrant("simpo padded", "simpo", path="padded")
    elif family == "dpo":
        yield Entrant("simpo DPO cached", "simpo", path="auto", objective="dpo", precomputed=True)
        yield Entrant("simpo DPO live", "simpo", path="auto", objective="dpo")
    elif family == "sharing":
        yield Entrant("loop shared", "loop")
        yield Entrant("loop alone", "loop", shared=False)
    elif family == "trl-cpo":
        yield from (Entrant(f"TRL CPO {size}x{step // size}", "trl cpo", size) for size in grid)
    elif family == "liger":
        yield from (Entrant(f"Liger SimPO {size}x{step // size}", "liger", size, liger=True) for size in grid)
    else:
        liger = family == "trl-dpo-liger"
        for precomputed in (True, False):
            name = "TRL DPO" + " Liger" * liger + " precomputed" * precomputed
            for size in grid:
                yield Entrant(
                    f"{name} {size}x{step // size}",
                    "trl dpo",
                    size,
                    objective="dpo",
                    precomputed=precomputed,
                    liger=liger,
                )


def missing(family: str, setting: Setting, responses: int) -> str | None:
    """Why a family cannot be run here, or None."""
    for package in {"trl-cpo": ["trl"], "trl-dpo": ["trl"], "trl-dpo-liger": ["trl", "liger_kernel"]}.get(
        family, ["liger_kernel"] if family == "liger" else []
    ):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if family == "trl-dpo-liger" and setting.device != "cuda":
        return "Liger's layers need CUDA"
    if family != "sharing" and responses != 2:
        return f"it takes pairs, not {responses} responses"
    return None
