"""Plots are valid PNG files with ink where the data is."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from simpo.analysis.plots import plot_lengths, plot_rates, plot_training
from simpo.statistics import Interval


def ink(path) -> float:
    """Return the share of pixels that are not white."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return float((pixels < 0.99).any(axis=-1).mean())


def test_training_curves_are_drawn(tmp_path):
    logs = [{"step": step, "loss": 1 / step, "rewards/margins": step} for step in range(1, 30)]
    plot_training(tmp_path / "empty.png", [], {"loss": "loss", "rewards/margins": "margin"}, "A run")
    logs += [{"step": 29, "eval_loss": 0.1, "eval_rewards/margins": 20}]
    plot_training(tmp_path / "run.png", logs, {"loss": "loss", "rewards/margins": "margin"}, "A run")
    assert ink(tmp_path / "run.png") > ink(tmp_path / "empty.png") > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "run.png"]


@pytest.mark.parametrize("bounds", [(0.4, 0.6), (None, None)])
def test_rates_are_drawn(bounds, tmp_path):
    share = Interval(0.5, *bounds, 10, "Student t 95%")
    plot_rates(tmp_path / "rates.png", {"win rate": {"SFT": share, "SimPO": share}}, "Models", tie_line="win rate")
    pixels = (matplotlib.image.imread(tmp_path / "rates.png")[..., :3] * 255).round().astype(int)
    colors = {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert {(230, 159, 0), (0, 114, 178)} <= colors  # the bars of both models


def test_lengths_are_drawn(tmp_path):
    plot_lengths(tmp_path / "lengths.png", {"SFT": [5, 9, 30], "SimPO": [4, 4, 6]}, "Lengths")
    assert ink(tmp_path / "lengths.png") > 0.05
