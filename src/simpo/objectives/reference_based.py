"""Objectives that compare the policy with a reference, one function a row of the table; conventions as in
:mod:`simpo.objectives.reference_free`. All need ``ref_logp``.
"""

# ruff: noqa: E741 - the papers' w and l

from __future__ import annotations

import torch
from torch import Tensor

from simpo.objectives.hyperparameters import NonNegative, Positive, Smoothing
from simpo.objectives.likelihood import preference_nll
from simpo.objectives.responses import Responses


def dpo(w: Responses, l: Responses, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio))``.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    return preference_nll(beta * (w.ratio - l.ratio), label_smoothing)


def dpo_reward(y: Responses, *, beta: float) -> Tensor:
    """The implicit reward of DPO and its kin, ``[B]``: ``beta * ratio``."""
    return beta * y.ratio


def dpo_norm(w: Responses, l: Responses, *, beta: Positive = 5.0, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Length-normalised DPO, ``[B]``: ``-log sigmoid(beta * (w.avg_ratio - l.avg_ratio))``.

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, whose beta is the default.
    """
    return preference_nll(beta * (w.avg_ratio - l.avg_ratio), label_smoothing)


def dpo_norm_reward(y: Responses, *, beta: float) -> Tensor:
    """Length-normalised DPO's implicit reward, ``[B]``: ``beta * avg_ratio``."""
    return beta * y.avg_ratio


def ipo(w: Responses, l: Responses, *, tau: Positive = 0.1, length_normalized: bool = False) -> Tensor:
    """IPO, ``[B]``: ``(w.ratio - l.ratio - 1 / (2 * tau)) ** 2``.

    Azar et al. 2023, arXiv 2310.12036, equation 17. The paper sums over tokens; ``length_normalized=True`` takes each
    response's average instead, as its authors advise for language models.
    """
    gap = w.avg_ratio - l.avg_ratio if length_normalized else w.ratio - l.ratio
    return (gap - 1 / (2 * tau)).square()


def ipo_reward(y: Responses, *, tau: float, length_normalized: bool) -> Tensor:
    """IPO's implicit reward, ``[B]``: ``tau * ratio``, the average where lengths are normalised."""
    return tau * (y.avg_ratio if length_normalized else y.ratio)


def r_dpo(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.05,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """R-DPO, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio) + alpha * (w.length - l.length))``.

    Park et al. 2024, arXiv 2403.19159. A pair whose chosen response is the longer one counts as partly won before
    training, so that it teaches less; with the opposite sign, which is also in print, it would teach more. The reward
    is DPO's: lengths do not change in training, and with them the accuracy would tell of the data.
    """
    margin = beta * (w.ratio - l.ratio) + alpha * (w.length - l.length)
    return preference_nll(margin, label_smoothing)


def dpop(
    w: Responses,
    l: Responses,
    *,
    beta: Positive = 0.3,
    lam: NonNegative = 50.0,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """DPO-Positive, ``[B]``: ``-log sigmoid(beta * (w.ratio - l.ratio - lam * relu(-w.ratio)))``.

    Pal et al. 2024 (Smaug), arXiv 2402.13228, section 5 for the defaults. The penalty acts while the chosen response
    is less likely than under the reference.
    """
    margin = beta * (w.ratio - l.ratio - lam * torch.relu(-w.ratio))
    return preference_nll(margin, label_smoothing)
