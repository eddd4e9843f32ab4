"""Fixtures: a tiny world to sweep over, and a recipe for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo.world.pairs import write_model, write_pairs


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny chat ``model``, pairs, and a ``recipe.yaml`` for a four-step run."""
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "train.jsonl", 16, seed=0, length_bias=1)
    write_pairs(folder / "test.jsonl", 12, seed=0, held_out=True, length_bias=1)
    write_model(folder / "model", seed=0)
    (folder / "recipe.yaml").write_text(
        f"# a comment\nmodel_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'train.jsonl'}\n"
        f"eval_dataset_name: {folder / 'test.jsonl'}\noutput_dir: {folder / 'out'}\nobjective: simpo\nbeta: 2.5\n"
        "learning_rate: 1e-3\nper_device_train_batch_size: 4\nmax_length: 128\nsave_strategy: 'no'\nreport_to: none\n"
    )
    return folder
