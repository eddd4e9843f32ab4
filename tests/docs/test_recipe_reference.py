"""The page of recipe keys matches the code."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import transformers
from transformers import TrainingArguments

from simpo.models.settings import ModelArguments
from simpo.training.preference import PreferenceConfig
from simpo.training.reward import RewardConfig
from simpo.training.settings import DataArguments
from simpo.training.sft import SFTConfig

_ROOT = Path(__file__).parents[2]
_SCRIPT = _ROOT / "docs/recipe_reference.py"
_TESTED = f"transformers=={transformers.__version__}" in (_ROOT / "constraints.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("recipe_reference", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not _TESTED, reason="the page lists the keys of the tested version of transformers")
def test_the_page_is_up_to_date(reference):
    current = reference.PAGE.read_text(encoding="utf-8") == reference.page()
    assert current, "docs/recipe-reference.md is not what the code declares; run: python docs/recipe_reference.py"


def test_every_own_key_and_changed_default_is_on_the_page(reference):
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {
        field.name
        for cls in (ModelArguments, DataArguments, PreferenceConfig, SFTConfig, RewardConfig)
        for field in dataclasses.fields(cls)
        if field.init and (field.name not in theirs or field.default != theirs[field.name])
    }
    assert len(ours) > 30
    page = reference.page()
    assert not [name for name in sorted(ours) if f"\n| `{name}` |" not in page]


def test_a_bar_in_a_cell_is_escaped(reference):
    assert reference._markdown(("a", "b"), [("x | y", "z")])[-1] == "| x \\| y | z |"
