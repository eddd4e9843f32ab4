"""What a sweep prints about its outcome: how certain the choice is, and where to look further."""

from __future__ import annotations

import optuna
import pytest
from rich.console import Console

from simpo.runs.results import Metric, write_results
from simpo.workflows.sweep import print_table
from simpo.workflows.sweep_study import Axis

ACCURACY = "eval_rewards/accuracies"


def printed(folder, results: dict[str, tuple[float, float, float]]) -> str:
    """Return the text printed for trials with these learning rates and results."""
    distribution = optuna.distributions.CategoricalDistribution(tuple(results))
    tried = [
        optuna.create_trial(
            value=result[0], params={"learning_rate": rate}, distributions={"learning_rate": distribution}
        )
        for rate, result in results.items()
    ]
    for number, trial in enumerate(tried):
        trial.number = number
    metrics = [
        Metric(f"trials/{number:03d}/{ACCURACY}", value, None, 100, low, high, "Wilson 95%")
        for number, (value, low, high) in sorted(enumerate(results.values()), key=lambda item: -item[1][0])
    ]
    write_results(folder, command="sweep", fingerprint="f", metrics=metrics)
    console = Console(record=True, width=200)
    print_table(folder, tried, (Axis("learning_rate", tuple(results)),), ACCURACY, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("others", "is_suggested"),
    [
        ((0.5, 0.4, 0.6), True),
        ((0.65, 0.55, 0.75), False),  # within the best trial's interval, so which one is best may be chance
    ],
)
def test_a_best_value_at_the_edge_suggests_looking_further(others, is_suggested, tmp_path, capsys):
    text = printed(tmp_path, {"1e-6": (0.7, 0.6, 0.8), "3e-6": others, "1e-5": others})
    assert ("learning_rate: the best value, 1e-6, is the smallest tried; try smaller ones, too" in text) == is_suggested
    assert ("2 of the other 2 finished trials lie within the best one's interval" in text) == (not is_suggested)
