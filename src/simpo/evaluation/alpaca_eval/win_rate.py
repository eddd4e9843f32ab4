"""Win rates from a judge's preferences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WinRate:
    """Figures of a model against the baseline, in percent and numbers of instructions.

    Attributes:
        win_rate: mean of the preferences, 100 times.
        standard_error: of that mean; NaN of a single preference.
        discrete_win_rate: share of wins, draws half.
        wins: instructions on which the model is preferred.
        losses: instructions on which the baseline is.
        draws: preferences of exactly 1.5.
        n: instructions with a preference.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    wins: int
    losses: int
    draws: int
    n: int


def win_rate(preferences: np.ndarray) -> WinRate:
    """Raw and discrete win rate.

    Args:
        preferences: ``[N]`` in [1, 2], 2 where the model is preferred; NaN where there is none, which is left out.

    Raises:
        ValueError: there is no preference at all.
    """
    shares = preferences[~np.isnan(preferences)] - 1
    if not len(shares):
        raise ValueError("no preference to take a win rate from")
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    draws = len(shares) - wins - losses
    return WinRate(
        win_rate=100 * float(shares.mean()),
        standard_error=100 * standard_error(shares),
        discrete_win_rate=100 * (wins + draws / 2) / len(shares),
        wins=wins,
        losses=losses,
        draws=draws,
        n=len(shares),
    )


def standard_error(values: np.ndarray) -> float:
    """Of the mean of ``values`` ``[N]``; NaN of a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
