"""``guard``: detects signs of collapse early, explains them, and stops the run if asked to."""

# ruff: noqa: D102 - TrainerCallback documents the events

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback, TrainerState

from simpo.errors import SimpoError
from simpo.training.batches import row_sizes, scored_tokens
from simpo.training.checkpoints import last_good_checkpoint
from simpo.training.packed import PackedTrainer

logger = logging.getLogger(__name__)

# Our own thresholds; docs/training.md has the measurements behind them.
_MAX_DROP = 1.0  # nats per token the preferred responses may lose
_MAX_KL = 1.0  # nats per token
_MAX_NORM_RATIO = 100.0  # gradient norm relative to the median so far
_NOISE = 0.02  # nats per token; smaller drops are not extrapolated
_PROBE_ROWS = 32  # held-out rows
_EARLY_STEPS = (2, 3, 4, 5, 6, 8)  # always probed, because collapses begin early
_BUDGET = 0.05  # share of the trained tokens that probes may use
_NORM_WINDOW, _MIN_NORMS = 100, 5  # recent gradient norms used for the median, and how many it needs at least

_REMEDIES = {
    "chosen": "the model is unlearning the preferred responses along with the rejected ones; lower learning_rate, or "
    "set sft_weight to preserve them",
    "pace": "the learning rate is much too high for this model; divide learning_rate by 10 and start again",
    "kl": "the model has moved so far from its start that rewards no longer reflect how good its answers are; lower "
    "learning_rate, or raise beta, kl_weight or kl_coef",
    "gradient": "a single step may destroy the weights; lower learning_rate, raise warmup_steps, or set "
    "max_grad_norm: 1",
    "answers": "they are repetitive or no longer end, most likely because the learning rate is too high; look at them, "
    "and start again with a lower learning_rate",
}


def warn_or_stop(mode: str, step: int, sign: str, finding: str, folder: Path) -> None:
    """Warn of a sign of collapse, or stop the run by raising :class:`SimpoError`. Every rank must call this."""
    text = f"step {step}: {finding}: {_REMEDIES[sign]}"
    if mode == "warn":
        logger.warning("%s (guard: stop would end the run here)", text)
    elif mode == "stop":
        last = last_good_checkpoint(folder)
        checkpoint = f"the last good checkpoint is {last}" if last else "no checkpoint was saved (see save_strategy)"
        raise SimpoError(f"{text}. The run was stopped (guard: stop); {checkpoint}")


class Guard(TrainerCallback):
    """Watches a run for signs of collapse in its logs and in the likelihood of preferred responses.

    The preferred responses of a few held-out rows are scored under the initial model, then again at a few early steps
    and at logged steps while all probes together use at most 5% as many tokens as training. Probing changes neither
    weights nor random state. Each kind of sign is reported once, and every rank sees the same signs.

    Args:
        trainer: holds the initial model.
        mode: ``warn`` or ``stop``.
    """

    def __init__(self, trainer: PackedTrainer, mode: str) -> None:
        self._trainer, self._mode = trainer, mode
        self._reported: set[str] = set()
        self._norms: deque[float] = deque(maxlen=_NORM_WINDOW)
        self._rows: Dataset | None = None
        rows = trainer.eval_dataset
        if isinstance(rows, dict):  # of several datasets, use the first
            rows = next(iter(rows.values()), None)
        if rows is not None and trainer.command in ("train", "online") and not trainer.args.torch_compile:
            labels = list(rows["label"]) if "label" in rows.column_names else []
            preferred = np.flatnonzero(labels) if any(labels) else np.arange(len(rows))
            chosen = np.random.default_rng(trainer.args.seed).permutation(preferred)[:_PROBE_ROWS]
            self._rows = _preferred(rows.select(sorted(chosen.tolist())))
            self._lengths = scored_tokens(self._rows)
            self._cost = int(row_sizes(self._rows, "packed").lengths.sum())  # tokens per probe
            self._spent = self._trained = 0  # tokens used by probes so far, and trained before this start
            self._start = self._likelihood()

    def _likelihood(self) -> float:
        """Return the probed responses' mean log-probability per scored token, in nats."""
        self._spent += self._cost
        logps = self._trainer.response_logps(self._rows).cpu().numpy()
        return float((logps / self._lengths).mean())

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._trained = self._trainer.trained_tokens()
        norms = (logs.get("grad_norm") for logs in state.log_history)  # logged before the checkpoint, if there is one
        self._norms.clear()
        self._norms.extend(float(norm) for norm in norms if norm is not None)

    def _affordable(self) -> bool:
        """Return whether the budget since this start allows another probe. Every rank must call this."""
        return self._spent + self._cost <= _BUDGET * (self._trainer.trained_tokens() - self._trained)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step, every = state.global_step, max(1, int(state.logging_steps or 1))
        if self._rows is None or "chosen" in self._reported:
            return
        if step not in _EARLY_STEPS and (step % every or not self._affordable()):
            return
        drop = self._start - self._likelihood()
        warming_up = step <= max(args.get_warmup_steps(state.max_steps), 0.1 * state.max_steps)
        if drop > _MAX_DROP:
            self._report("chosen", step, f"preferred held-out responses have lost {drop:.2f} nats per token so far")
        elif warming_up and drop > _NOISE and drop / step * state.max_steps > _MAX_DROP:
            finding = (
                f"preferred held-out responses are losing {drop / step:.2g} nats per token at every step, which adds "
                f"up to {drop / step * state.max_steps:.1f} by the end"
            )
            self._report("pace", step, finding)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        for sign, finding in self._signs(logs):
            self._report(sign, state.global_step, finding)

    def _signs(self, logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        divergence = logs.get("kl", logs.get("eval_kl"))
        if divergence is None and logs.get("rollout/length"):
            divergence = logs.get("rollout/kl", 0.0) / logs["rollout/length"]
        if divergence is not None and divergence > _MAX_KL:
            yield "kl", f"the KL divergence from the initial model is {divergence:.2f} nats per token"
        norm = logs.get("grad_norm")
        if norm is not None:
            usual = median(self._norms) if len(self._norms) >= _MIN_NORMS else None
            if usual is not None and norm > _MAX_NORM_RATIO * usual:
                yield "gradient", f"the gradient norm is {norm:.3g}, {norm / usual:.0f} times its median of {usual:.3g}"
            self._norms.append(float(norm))

    def _report(self, sign: str, step: int, finding: str) -> None:
        if sign not in self._reported:
            self._reported.add(sign)
            warn_or_stop(self._mode, step, sign, finding, Path(self._trainer.args.output_dir))


def _preferred(rows: Dataset) -> Dataset:
    """Keep only each row's first response, the preferred one, and its mask of scored tokens."""
    names = [name for name in ("response_ids", "scored") if name in rows.column_names]
    return Dataset.from_dict(
        {"prompt_ids": rows["prompt_ids"][:], **{name: [values[:1] for values in rows[name]] for name in names}}
    )
