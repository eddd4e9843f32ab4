"""The plot of a sweep's knobs: a panel for each, the best of every value joined."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from simpo.analysis import plots
from simpo.analysis.plots import plot_effects
from simpo.statistics import Interval


def trials(*found: tuple[str, float]) -> list[tuple[str, Interval]]:
    return [(value, Interval(result, result - 0.05, result + 0.1, 100, "Wilson 95%")) for value, result in found]


TRIALS = {
    "learning_rate": trials(("1e-6", 0.6), ("3e-7", 0.5), ("1e-6", 0.7), ("3e-7", 0.55)),
    "objective": trials(("simpo", 0.6), ("simpo", 0.5), ("dpo", 0.7), ("dpo", 0.55)),
    "gamma": [(str(step / 10), Interval(step / 20, None, None, 1, "none")) for step in range(12)],
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_every_knob_has_its_panel(tmp_path, drawn):
    plot_effects(tmp_path / "effects.png", TRIALS, "accuracy")
    pixels = (matplotlib.image.imread(tmp_path / "effects.png")[..., :3] * 255).round().astype(int)
    assert (230, 159, 0) in {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0)}  # the line
    rate, objective, gamma = drawn[0].axes
    assert [axes.get_xlabel() for axes in (rate, objective, gamma)] == list(TRIALS)
    assert [tick.get_text() for tick in rate.get_xticklabels()] == ["3e-7", "1e-6"]  # by size, as written
    points, best = (np.array(line.get_data()).T.tolist() for line in rate.lines)
    assert points == [[1, 0.6], [0, 0.5], [1, 0.7], [0, 0.55]]
    assert best == [[0, 0.55], [1, 0.7]]
    bars = [segment.tolist() for bar in rate.collections for segment in bar.get_segments()]
    assert bars == pytest.approx(np.array([[[x, y - 0.05], [x, y + 0.1]] for x, y in points]))
    assert not gamma.collections
    assert [tick.get_text() for tick in objective.get_xticklabels()] == ["simpo", "dpo"]
    assert gamma.lines[0].get_xdata().tolist() == [step / 10 for step in range(12)]  # many numbers are to scale


def test_the_best_may_be_the_smallest(tmp_path, drawn):
    plot_effects(tmp_path / "effects.png", {"learning_rate": TRIALS["learning_rate"]}, "loss", smaller_is_better=True)
    assert drawn[0].axes[0].lines[1].get_ydata().tolist() == [0.5, 0.6]
