"""Predict memory, time and cost of a training run before anything is loaded, and find the fastest settings that fit.

examples:
  simpo plan recipes/llama-3-8b-base-simpo.yaml --gpu H100-80GB --gpus 8 --price 2.50
  simpo plan recipe.yaml --gpu_memory_gb 30 --gpu_tflops 200 --prompt_tokens 300 --response_tokens 250 --rows 60000
  simpo plan --calibrate true
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from simpo.cli._shared import REPLACES
from simpo.config import parse_settings, setting
from simpo.errors import SimpoError
from simpo.models.settings import ModelArguments
from simpo.planning.recipe import Lengths
from simpo.runs.terminal import duration
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.online_config import OnlineConfig
from simpo.training.settings import DataArguments

_GIB = 2**30
CONFIGS = {"train": PreferenceConfig, "sft": SFTConfig, "reward": RewardConfig, "online": OnlineConfig}


@dataclass
class PlanSettings:
    """What is planned, and for which machine."""

    command: Literal["train", "sft", "reward", "online"] = setting("train", "The command that the recipe is for.")
    gpu: str | None = setting(None, "Card, such as H100-80GB (default: this machine's, or else its CPU).")
    gpus: int = setting(1, "Number of GPUs.")
    gpu_memory_gb: float | None = setting(None, "Memory of each, in GiB (default: the card's).")
    gpu_tflops: float | None = setting(None, "TFLOP/s of its dense half-precision products (default: the card's).")
    gpu_terabytes: float | None = setting(None, "Terabytes per second of its memory (default: the card's).")
    price: float | None = setting(None, "Price of an hour of one GPU, in any currency.")
    sharding: Literal["ddp", "fsdp", "zero2", "zero3"] | None = setting(
        None, "How several processes share a model (default: fsdp, as in recipes/launch)."
    )
    json: bool = setting(False, "Print JSON.")

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise SimpoError(f"gpus: must be at least 1, not {self.gpus}")
        if self.price is not None and self.price < 0:
            raise SimpoError(f"price: must be at least 0, not {self.price:g}")
        if self.sharding is not None and self.gpus == 1:
            raise SimpoError(f"sharding: {self.sharding} is for several GPUs; give gpus")


def main(argv: list[str]) -> int:
    """Print the plan of a recipe."""
    command = next((value for key, value in pairwise(argv) if key == "--command"), "train")
    types = (ModelArguments, DataArguments, CONFIGS.get(command, PreferenceConfig), PlanSettings, Lengths)
    model, data, config, asked, lengths = parse_settings(argv, types, command="plan", about=__doc__, replaces=REPLACES)
    found = plan(model, data, config, asked, lengths)
    print(json.dumps(found, indent=2)) if asked.json else _print(found)
    return 0


def plan(model: ModelArguments, data: DataArguments, config: Any, asked: PlanSettings, lengths: Lengths) -> dict:
    """The recipe's own settings and the fastest that fit, as plain values."""
    from simpo.planning.cards import find_card, stored_rates  # noqa: PLC0415 - slow, and --help does not need them
    from simpo.planning.recipe import blueprint_of, kind_of, own_choice, setup_of, work_of  # noqa: PLC0415
    from simpo.planning.search import Machine, Planner  # noqa: PLC0415

    given = (asked.gpu, asked.gpu_memory_gb, asked.gpu_tflops, asked.gpu_terabytes)
    card = find_card(*given) if any(given) else None
    machine = Machine(card, asked.gpus, stored_rates() if card is None else card.rates, asked.price)
    kind = kind_of(asked.command)
    work = work_of(kind, model, data, config, asked.gpus, lengths)
    planner = Planner(blueprint_of(kind, model, config), setup_of(config, cuda=card is not None), work, machine)
    sharding = "none" if asked.gpus == 1 else asked.sharding or "fsdp"
    own = planner.estimate(own_choice(config, work, sharding, cuda=card is not None))
    best = planner.fastest()
    if best is None:
        raise SimpoError(planner.remedy())
    return {"recipe": planner.described(own), "fastest": planner.described(best)}


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("", *found, box=None, header_style="bold")
    rows = {name: [_shown(name, part[name]) for part in found.values()] for name in found["recipe"]}
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_shown(name, one)}" for key, one in value.items())
    if name.endswith("seconds"):
        return duration(value) if value >= 60 else f"{value:.3g} s"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
