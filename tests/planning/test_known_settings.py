"""Settings publicly known to fit or not to fit; docs/plan.md has the sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from simpo.config import parse_settings
from simpo.judging.settings import GenerationArguments
from simpo.models.settings import ModelArguments
from simpo.planning.search import Estimate, Planner
from simpo.planning.settings import PlanSettings
from simpo.training.configs import PreferenceConfig, SFTConfig
from simpo.training.settings import DataArguments

RECIPES = Path(__file__).parents[2] / "recipes"
_EIGHT_BILLION = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_EIGHT_BILLION |= {"num_attention_heads": 32, "num_key_value_heads": 8}
_GEMMA = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "head_dim": 256}
SHAPES = {
    "llama-3-8b": LlamaConfig(vocab_size=128256, max_position_embeddings=8192, **_EIGHT_BILLION),
    "mistral-7b": MistralConfig(vocab_size=32000, **_EIGHT_BILLION),
    "gemma-2-9b": Gemma2Config(vocab_size=256000, num_attention_heads=16, num_key_value_heads=8, **_GEMMA),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders with nothing but a configuration."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, config in SHAPES.items():
        config.save_pretrained(folder / name)
    return {name: str(folder / name) for name in SHAPES}


def planned(argv: list[str], settings: PlanSettings, config: type = PreferenceConfig) -> tuple[Planner, Estimate]:
    """Return the plan for a recipe, or for keys of one."""
    types = (ModelArguments, DataArguments, config, GenerationArguments)
    planner = Planner(parse_settings(argv, types)[:3], settings)
    return planner, planner.estimate(planner.recipe_choice)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ("llama-3-8b-base-simpo", "llama-3-8b"),
        ("mistral-7b-base-dpo", "mistral-7b"),
        ("gemma-2-9b-it-simpo", "gemma-2-9b"),
    ],
)
def test_the_papers_recipes_fit_on_four_h100s(recipe, shape, folders) -> None:
    settings = PlanSettings(gpu="H100-80GB", gpus=4, sharding="zero3", prompt_tokens=600, response_tokens=400)
    argv = [str(RECIPES / f"{recipe}.yaml"), "--model_name_or_path", folders[shape]]
    planner, own = planned(argv, settings)
    assert planner.fits(own), own.memory


@pytest.mark.parametrize(("gpus", "fits"), [(1, False), (2, True)])
def test_mistral_7b_needs_two_80_gb_cards(gpus, fits, folders) -> None:
    sharding = None if gpus == 1 else "zero3"
    settings = PlanSettings(gpu="A100-80GB", gpus=gpus, sharding=sharding, prompt_tokens=512, response_tokens=512)  # type: ignore[arg-type]
    argv = [str(RECIPES / "mistral-7b-base-simpo.yaml"), "--model_name_or_path", folders["mistral-7b"]]
    planner, own = planned([*argv, "--max_batch_tokens", "2048"], settings)
    assert planner.fits(own) == fits, own.memory


def test_llama_3_8b_fits_on_eight_h100s_with_fsdp(folders) -> None:
    settings = PlanSettings("sft", gpu="H100-80GB", gpus=8, prompt_tokens=2048, response_tokens=2048)
    argv = [folders["llama-3-8b"], "--dataset_name", "none", "--bf16", "true"]
    planner, own = planned([*argv, "--max_length", "4096", "--activation_checkpointing", "true"], settings, SFTConfig)
    assert planner.fits(own), own.memory
    kept = own.memory["weights"] + own.memory["gradients"] + own.memory["optimizer"]
    assert kept == pytest.approx(16 * own.parameters / 8)


@pytest.mark.parametrize(
    ("keys", "reported"),
    [
        (["--dtype", "bfloat16", "--activation_checkpointing", "true"], 16.2),
        (["--dtype", "bfloat16"], 30.3),
        (["--load_in_4bit", "true", "--activation_checkpointing", "true"], 7.4),
    ],
    ids=["LoRA, checkpointing", "LoRA", "QLoRA, checkpointing"],
)
def test_lora_fits_on_24_gb(keys, reported, folders) -> None:
    """Llama-3-8B with two sequences of 2,048 tokens, and the peaks in GiB reported by torchtune."""
    settings = PlanSettings("sft", gpu="RTX-4090-24GB", prompt_tokens=1024, response_tokens=1024)
    argv = [folders["llama-3-8b"], "--dataset_name", "none", "--bf16", "true", "--max_batch_tokens", "4096"]
    argv += ["--use_peft", "true", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "o_proj"]
    planner, own = planned([*argv, "--per_device_train_batch_size", "2", *keys], settings, SFTConfig)
    assert planner.fits(own) == (reported < 24), own.memory
