"""``simpo plan``: predict the memory, time and cost of a training run before starting it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.table import Table

from simpo.config import parse_settings
from simpo.config.parse import split_options
from simpo.errors import SimpoError
from simpo.judging.settings import AnnotatorArguments, GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.planning.settings import PlanSettings, Sharing
from simpo.runs.terminal import duration
from simpo.training.configs import OnlineConfig, PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import REPLACES, DataArguments

_GIB = 2**30
# The settings types of each training command, in addition to model and data.
_RECIPES: dict[str, tuple[type, ...]] = {
    "train": (PreferenceConfig, GenerationArguments),
    "sft": (SFTConfig, GenerationArguments),
    "reward": (RewardConfig,),
    "online": (OnlineConfig, GenerationArguments, AnnotatorArguments),
}


def plan(argv: list[str]) -> None:
    """Predict memory, time and cost of a training run without loading weights, and find the fastest settings that fit.

    examples:
      simpo plan recipes/llama-3-8b-base-simpo.yaml --gpu H100-80GB --gpus 8 --price 2.50
      simpo plan --calibrate
    """
    if "--calibrate" in argv:
        _calibrate(argv)
        return
    options = reversed(split_options(argv)[1])
    command = next((values[0] for name, values in options if name == "command" and values), "train")
    config, *others = _RECIPES.get(command, _RECIPES["train"])
    # The optimizer's package need not be installed here.
    planned = type("Planned", (config,), {"_check_optimizer": lambda self: None})
    types = (ModelArguments, DataArguments, planned, PlanSettings, *others)
    *parts, settings = parse_settings(argv, types, command="plan", about=plan.__doc__, replaces=REPLACES)[:4]
    if settings.command != command:
        raise SimpoError(f"command: must be given on the command line, as --command {settings.command}")
    from simpo.planning.search import Planner  # noqa: PLC0415 - slow, and --help does not need it

    planner = Planner(parts, settings)
    as_written = planner.estimate(planner.recipe_choice)
    shardings = () if settings.sharding is None else (settings.sharding,)
    best = planner.fastest(shardings)
    if best is None:
        raise SimpoError(planner.remedy(shardings))
    estimates = {"recipe": planner.describe(as_written), "fastest": planner.describe(best)}
    print(json.dumps(estimates, indent=2)) if settings.json else _print_table(estimates)


def check_fit(command: Any, parts: Sequence[Any]) -> None:
    """Print the memory a run needs on this machine; if it does not fit, raise :class:`SimpoError` with keys that do."""
    from simpo.planning.search import Planner  # noqa: PLC0415

    config = parts[2]
    sharding = sharding_of(config) if config.world_size > 1 else None
    planner = Planner(parts[:3], PlanSettings(command, gpus=config.world_size, sharding=sharding))
    estimate = planner.estimate(planner.recipe_choice)
    needs = f"{estimate.total / _GIB:.1f} of {planner.capacity / _GIB:.1f} GiB, peak in {estimate.peak_phase}"
    if planner.fits(estimate):
        print(f"plan: needs {needs}")
        return
    best = planner.fastest((estimate.choice.sharding,)) or planner.fastest()
    if best is None:
        raise SimpoError(planner.remedy())
    keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in best.choice.keys.items())
    raise SimpoError(f"max_batch_tokens: the run needs {needs}; it fits with {keys} ({best.choice.sharding})")


def sharding_of(config: Any) -> Sharing:
    """Return how a run shards the model across its processes, as set by the recipe or by ``accelerate launch``."""
    if config.deepspeed_plugin is not None:
        # ZeRO stage 1 only shards the optimizer, which is not modeled; "ddp" overestimates it.
        return {2: "zero2", 3: "zero3"}.get(config.deepspeed_plugin.zero_stage, "ddp")  # type: ignore[return-value]
    return "fsdp" if config.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") else "ddp"


def _calibrate(argv: list[str]) -> None:
    from simpo.planning.cards import measure_rates, store_rates  # noqa: PLC0415

    if argv != ["--calibrate"]:
        raise SimpoError("--calibrate: only measures this machine; give it without other arguments")
    measured = measure_rates(print)
    for name, rates in measured.items():
        print(
            f"{name}: matmul {rates.product / 1e9:,.4g} GFLOP/s, attention {rates.attention / 1e9:,.4g} GFLOP/s, "
            f"memory {rates.moved / 1e9:,.4g} GB/s, overhead {rates.overhead * 1e6:.3g} us per operation"
        )
    print(f"stored: {store_rates(measured)}")


def _print_table(estimates: dict[str, Any]) -> None:
    table = Table("", *estimates, box=None, header_style="bold")
    for name in estimates["recipe"]:
        table.add_row(name, *(_format(name, estimate[name]) for estimate in estimates.values()))
    Console(highlight=False, markup=False, soft_wrap=True).print(table)


def _format(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_format(name, one)}" for key, one in value.items())
    if name.endswith("seconds"):
        return duration(value) if value >= 60 else f"{value:.3g} s"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
