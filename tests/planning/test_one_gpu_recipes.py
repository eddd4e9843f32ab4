"""The one-GPU recipes fit their card and state the memory that ``simpo plan`` computes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.sampled import sampled
from transformers import LlamaConfig

from simpo.config import parse_settings
from simpo.models.settings import ModelArguments
from simpo.planning.search import Planner
from simpo.planning.settings import PlanSettings
from simpo.training.configs import PreferenceConfig, RewardConfig, SFTConfig
from simpo.training.settings import DataArguments

_RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*-one-*gb-gpu.yaml"))
_CONFIGS = {"sft": SFTConfig, "reward": RewardConfig}
_STATED = re.compile(r"([\d.]+) of ([\d.]+) GiB, from\n#   simpo plan RECIPE (.+)")


def write_llama(folder: Path) -> None:
    """Write nothing but Llama-3-8B's configuration."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    LlamaConfig(max_position_embeddings=8192, **heads, **sizes).save_pretrained(folder)


def estimated(recipe: Path, model: Path, options: list[str]) -> dict[str, Any]:
    """Return the estimate for a recipe with ``simpo plan``'s options."""
    argv = [str(recipe), "--model_name_or_path", str(model), *options]
    config = next((kind for command, kind in _CONFIGS.items() if command in options), PreferenceConfig)
    planned = type("Planned", (config,), {"_check_optimizer": lambda self: None})  # its package may be missing
    *parts, settings = parse_settings(argv, (ModelArguments, DataArguments, planned, PlanSettings))
    planner = Planner(parts, settings)
    return planner.describe(planner.estimate(planner.recipe_choice))


def test_every_card_size_has_a_recipe() -> None:
    sizes = {re.search(r"one-(\d+)gb", path.name)[1] for path in _RECIPES}  # type: ignore[index]
    assert sizes == {"24", "48", "80", "140"}


@pytest.mark.parametrize("path", sampled(_RECIPES, kept=_RECIPES[::3]), ids=lambda path: path.stem)
def test_a_recipe_takes_the_memory_it_states(path, tmp_path) -> None:
    write_llama(tmp_path)
    total, capacity, options = _STATED.search(path.read_text()).groups()  # type: ignore[union-attr]
    found = estimated(path, tmp_path, shlex.split(options))
    assert found["fits"]
    assert found["total_gib"] == pytest.approx(float(total), abs=0.06)  # stated with one decimal
    assert found["capacity_gib"] == pytest.approx(float(capacity), abs=0.06)
    size = int(re.search(r"one-(\d+)gb", path.name)[1])  # type: ignore[index]
    assert float(capacity) <= size  # the smallest such card
