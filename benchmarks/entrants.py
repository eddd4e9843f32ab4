"""The entrants in a comparison: simpo's paths and its peers, each at every micro-batch size it can be tuned to."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.profiles import PROFILES
from benchmarks.setting import MODELS, Setting

Kind = Literal["simpo", "loop", "trl cpo", "trl dpo", "liger"]


@dataclass(frozen=True)
class Entrant:
    """A trainer together with its batching.

    Attributes:
        name: name in tables.
        kind: simpo's trainer; simpo's forward in a bare loop, for any K; TRL's CPO or DPO trainer; or transformers'
            ``Trainer`` with Liger's fused SimPO loss.
        per_device: a peer's per-device batch size; gradient accumulation fills the step.
        path: simpo's ``forward_path``.
        max_batch_tokens: simpo's ``max_batch_tokens``, or None for the default.
        objective: ``"simpo"`` or ``"dpo"``.
        precomputed: whether DPO's reference log-probabilities are precomputed rather than from a copy of the model.
        liger: whether Liger's layers are used.
        compiled: whether ``torch_compile`` is on.
        checkpointed: simpo only: share of the layers whose activations are recomputed in backward.
        shared: loop only: whether the responses in a comparison share the prompt.
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
    checkpointed: float = 0.0
    shared: bool = True


FAMILIES = {
    "simpo": "simpo's trainer with its defaults, or with each of --variants",
    "padded": "simpo's fallback for models without prompt sharing",
    "dpo": "simpo's trainer with the DPO loss, with a cached and a live reference",
    "sharing": "simpo's forward in a bare loop, with shared prompts and with each response packed alone; any K",
    "trl-cpo": "TRL's CPO trainer with the SimPO loss",
    "trl-dpo": "TRL's DPO trainer, with a live and a precomputed reference",
    "trl-dpo-liger": "TRL's DPO trainer with Liger's layers",
    "liger": "transformers' Trainer with Liger's fused SimPO loss",
}


def parse_variant(text: str) -> Entrant:
    """Parse comma-separated settings for simpo's trainer.

    A setting is a number (``max_batch_tokens``), ``compiled``, ``liger``, ``checkpointed`` or ``checkpointed=SHARE``.

    Raises:
        ValueError: for anything else.
    """
    found: dict[str, Any] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        if key.isdigit() and not value:
            found["max_batch_tokens"] = int(key)
        elif key == "checkpointed":
            found["checkpointed"] = float(value or 1)
        elif key in ("compiled", "liger") and not value:
            found[key] = True
        elif word != "default":
            raise ValueError(f"{word!r} is none of: default, a number of tokens, compiled, liger, checkpointed[=SHARE]")
    return Entrant("simpo" if text == "default" else f"simpo {text}", "simpo", path="auto", **found)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for simpo's settings, the data, the model and the training."""
    parser.add_argument(
        "--variants",
        nargs="+",
        type=parse_variant,
        default=[parse_variant("default")],
        metavar="SETTINGS",
        help="simpo's settings, such as default, 4096, 16384,checkpointed or 8192,compiled,checkpointed=0.5; with "
        "several in one process, put compiled ones last, because layers stay compiled",
    )
    parser.add_argument("--profile", choices=PROFILES, default="hh", help="lengths of the synthetic comparisons")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="comparisons per optimizer step")
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the Llama model")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype; bf16 uses autocast")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights")
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="optim, as in TrainingArguments")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch CPU threads")


def entrants(family: str, setting: Setting, variants: list[Entrant], micro_batches: list[int]) -> Iterator[Entrant]:
    """Yield the entrants in one of :data:`FAMILIES`.

    Args:
        family: name of the family.
        setting: the setting of the comparison.
        variants: simpo's trainer with different settings.
        micro_batches: the peers' per-device batch sizes; if empty, all that divide the step.
    """
    step, checkpointed = setting.pairs_per_step, float(setting.checkpointing)
    grid = [size for size in micro_batches or range(step, 0, -1) if step % size == 0]
    if family == "simpo":
        yield from variants
    elif family == "padded":
        yield Entrant("simpo padded", "simpo", path="padded", checkpointed=checkpointed)
    elif family == "dpo":
        for name, precomputed in (("cached", True), ("live", False)):
            yield Entrant(
                f"simpo DPO {name}",
                "simpo",
                path="auto",
                objective="dpo",
                precomputed=precomputed,
                checkpointed=checkpointed,
            )
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


def unavailable_reason(family: str, setting: Setting, responses: int) -> str | None:
    """Return why a family cannot run here, or None if it can."""
    for package in {"trl-cpo": ["trl"], "trl-dpo": ["trl"], "trl-dpo-liger": ["trl", "liger_kernel"]}.get(
        family, ["liger_kernel"] if family == "liger" else []
    ):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if family == "trl-dpo-liger" and setting.device != "cuda":
        return "Liger's layers need CUDA"
    if family != "sharing" and responses != 2:
        return f"it needs pairs, not {responses} responses"
    return None
