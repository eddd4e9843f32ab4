"""Predict memory, time and cost of a training run before anything is loaded, and find the fastest settings that fit.

examples:
  simpo plan recipes/llama-3-8b-base-simpo.yaml --gpu H100-80GB --gpus 8 --price 2.50
  simpo plan --calibrate
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.table import Table

from simpo.config import parse_settings, setting
from simpo.config.command_line import split_options
from simpo.errors import SimpoError
from simpo.models.settings import ModelArguments
from simpo.planning.lengths import Lengths
from simpo.runs.terminal import duration
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.online_config import OnlineConfig
from simpo.training.settings import REPLACES, DataArguments

if TYPE_CHECKING:
    from simpo.planning.search import Estimate, Planner

_GIB = 2**30
_Sharing = Literal["ddp", "fsdp", "zero2", "zero3"]
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
    sharding: _Sharing | None = setting(
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
    """Print the plan of a recipe, or measure this machine."""
    if "--calibrate" in argv:
        return _calibrate(argv)
    options = reversed(split_options(argv)[1])
    command = next((words[0][1] for name, words in options if name == "command" and words), "train")
    kind = CONFIGS.get(command, PreferenceConfig)
    planned = type("Planned", (kind,), {"_check_optimizer": lambda self: None})  # its package may be elsewhere
    types = (ModelArguments, DataArguments, planned, PlanSettings, Lengths)
    *parts, asked, lengths = parse_settings(argv, types, command="plan", about=__doc__, replaces=REPLACES)
    if asked.command != command:
        raise SimpoError(f"command: give it on the command line, as --command {asked.command}")
    planner, own = make_plan(parts, asked, lengths)
    best = planner.fastest(own.choice)
    if best is None:
        raise SimpoError(planner.remedy())
    found = {"recipe": planner.described(own), "fastest": planner.described(best)}
    print(json.dumps(found, indent=2)) if asked.json else _print(found)
    return 0


def make_plan(parts: Sequence[Any], asked: PlanSettings, lengths: Lengths) -> tuple[Planner, Estimate]:
    """The planner of a parsed recipe (model, data, configuration), and the estimate for its own settings."""
    from simpo.planning.cards import card_at_hand, find_card, stored_rates  # noqa: PLC0415 - slow, and --help is fast
    from simpo.planning.recipe import blueprint_of, kind_of, own_choice, setup_of, work_of  # noqa: PLC0415
    from simpo.planning.search import Machine, Planner  # noqa: PLC0415

    model, data, config = parts
    given = (asked.gpu, asked.gpu_memory_gb, asked.gpu_tflops, asked.gpu_terabytes)
    here = all(value is None for value in given)
    card = card_at_hand() if here else find_card(*given)
    rates = (stored_rates() if here else None) or (None if card is None else card.rates)
    kind, cuda = kind_of(asked.command), card is not None
    work = work_of(kind, model, data, config, asked.gpus, lengths)
    machine = Machine(card, asked.gpus, rates, asked.price)
    planner = Planner(blueprint_of(kind, model, config), setup_of(config, cuda=cuda), work, machine)
    sharding = "none" if asked.gpus == 1 else asked.sharding or "fsdp"
    return planner, planner.estimate(own_choice(config, work, sharding, cuda=cuda))


def check_fit(command: Any, parts: Sequence[Any]) -> None:
    """Print what a run on this machine takes and where it is tightest.

    Raises:
        SimpoError: it does not fit; names the keys with which it would.
    """
    config = parts[2]
    several = config.world_size > 1
    asked = PlanSettings(command, gpus=config.world_size, sharding=sharding_of(config) if several else None)
    planner, own = make_plan(parts[:3], asked, Lengths())
    needs = f"{own.total / _GIB:.1f} of {planner.capacity / _GIB:.1f} GiB, tightest in {own.tightest}"
    if planner.fits(own):
        print(f"plan: needs {needs}")
        return
    best = planner.fastest(own.choice)
    if best is None:
        raise SimpoError(planner.remedy())
    keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in best.choice.keys.items())
    raise SimpoError(f"max_batch_tokens: the run needs {needs}; it fits with {keys} ({best.choice.sharding})")


def sharding_of(config: Any) -> _Sharing:
    """How the processes of a run share the model, by its recipe or by ``accelerate launch``."""
    if config.deepspeed_plugin is not None:
        # Stage 1 shards the optimizer alone, which is not planned; without sharding a run takes more.
        return {2: "zero2", 3: "zero3"}.get(config.deepspeed_plugin.zero_stage, "ddp")  # type: ignore[return-value]
    return "fsdp" if config.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") else "ddp"


def _calibrate(argv: list[str]) -> int:
    from simpo.planning.calibration import measure_rates  # noqa: PLC0415
    from simpo.planning.cards import machine_name, store_rates  # noqa: PLC0415

    if argv != ["--calibrate"]:
        raise SimpoError("--calibrate: measures this machine and plans nothing; give it alone")
    rates = measure_rates(print)
    path = store_rates(rates)
    speeds = {
        "products": (rates.product, "GFLOP/s"),
        "attention": (rates.attention, "GFLOP/s"),
        "memory": (rates.moved, "GB/s"),
    }
    for name, (speed, unit) in speeds.items():
        print(f"{name}: {speed / 1e9:,.4g} {unit}")
    print(f"an operation: {rates.overhead * 1e6:.3g} us\n{machine_name()}, stored: {path}")
    return 0


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
