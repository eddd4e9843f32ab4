"""``guard``: signs that training destroys the model are noticed early, explained, and stop it where that is wanted."""

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

# Our own bounds; docs/training.md has the measurements behind them.
_FALL = 1.0  # nats per token that preferred responses may lose
_KL = 1.0  # nats per token
_GRADIENT = 100.0  # times the median so far
_NOISE = 0.02  # nats per token: a smaller fall is not extrapolated
_PROBED = 32  # held-out rows
_EARLY = (2, 3, 4, 5, 6, 8)  # steps that are always probed: collapses begin early
_SHARE = 0.05  # of the trained tokens that all probes may take; later probes wait until there is room for them
_REMEMBERED, _NEEDED = 100, 5  # gradient norms that the median is of, and how many it needs

_REMEDIES = {
    "chosen": "the model unlearns the preferred responses along with the others; lower learning_rate, or add an "
    "sft_weight that holds on to them",
    "pace": "the learning rate is much too high for this model; divide learning_rate by 10 and start again",
    "kl": "the model has moved so far from its start that rewards no longer tell how good its answers are; lower "
    "learning_rate, or raise beta, kl_weight or kl_coef",
    "gradient": "single steps may destroy the weights; lower learning_rate, raise warmup_steps, set max_grad_norm: 1",
    "answers": "they repeat themselves or no longer end, most likely because the learning rate is too high; look at "
    "them, and start again with a lower learning_rate",
}


def alarm(mode: str, step: int, sign: str, what: str, folder: Path) -> None:
    """Warn of a sign of collapse, or stop the run; all ranks call."""
    text = f"step {step}: {what}: {_REMEDIES[sign]}"
    if mode == "warn":
        logger.warning("%s (guard: stop would end the run here)", text)
    elif mode == "stop":
        kept = last_good_checkpoint(folder)
        good = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved (save_strategy)"
        raise SimpoError(f"{text}. The run was stopped (guard: stop); {good}")


class Guard(TrainerCallback):
    """Watches a training for signs of collapse: what is logged, and how likely it still finds preferred responses.

    The preferred responses of a few held-out rows are scored under the start model, and again at a few early steps and
    at those that are logged, as far as all probes' tokens stay within 5% of the trained ones. It changes neither
    weights nor random state. A sign is reported once; every rank sees the same signs.

    Args:
        trainer: with the start model.
        mode: ``warn`` or ``stop``.
    """

    def __init__(self, trainer: PackedTrainer, mode: str) -> None:
        self._trainer, self._mode = trainer, mode
        self._reported: set[str] = set()
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._rows: Dataset | None = None
        rows = trainer.eval_dataset
        if isinstance(rows, dict):  # several data sets: the first
            rows = next(iter(rows.values()), None)
        if rows is not None and trainer.command in ("train", "online") and not trainer.args.torch_compile:
            labels = list(rows["label"]) if "label" in rows.column_names else []
            preferred = np.flatnonzero(labels) if any(labels) else np.arange(len(rows))
            chosen = np.random.default_rng(trainer.args.seed).permutation(preferred)[:_PROBED]
            self._rows = _preferred(rows.select(sorted(chosen.tolist())))
            self._lengths = scored_tokens(self._rows)
            self._cost = int(row_sizes(self._rows, "packed").lengths.sum())  # tokens of a probe
            self._spent = self._trained = 0  # tokens of all probes, and of the training before this start
            self._start = self._likelihood()

    def _likelihood(self) -> float:
        """Mean log-probability per scored token of the probed rows' responses, in nats."""
        self._spent += self._cost
        logps = self._trainer.response_logps(self._rows).cpu().numpy()
        return float((logps / self._lengths).mean())

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._trained = self._trainer.trained_tokens()

    def _affordable(self) -> bool:
        """Whether another probe keeps within its share of what has been trained since this start; all ranks call."""
        return self._spent + self._cost <= _SHARE * (self._trainer.trained_tokens() - self._trained)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step, every = state.global_step, max(1, int(state.logging_steps or 1))
        if self._rows is None or "chosen" in self._reported:
            return
        if step not in _EARLY and (step % every or not self._affordable()):
            return
        fall = self._start - self._likelihood()
        warming_up = step <= max(args.get_warmup_steps(state.max_steps), 0.1 * state.max_steps)
        if fall > _FALL:
            what = f"preferred held-out responses have lost {fall:.2f} nats per token since the start"
            self._report("chosen", step, what)
        elif warming_up and fall > _NOISE and fall / step * state.max_steps > _FALL:
            what = (
                f"preferred held-out responses lose {fall / step:.2g} nats per token at every step, which would be "
                f"{fall / step * state.max_steps:.1f} at the end"
            )
            self._report("pace", step, what)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        for sign, what in self._signs(logs):
            self._report(sign, state.global_step, what)

    def _signs(self, logs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        divergence = logs.get("kl", logs.get("eval_kl"))
        if divergence is None and logs.get("rollout/length"):
            divergence = logs.get("rollout/kl", 0.0) / logs["rollout/length"]
        if divergence is not None and divergence > _KL:
            yield "kl", f"the KL divergence from the start model is {divergence:.2f} nats per token"
        norm = logs.get("grad_norm")
        if norm is not None:
            usual = median(self._norms) if len(self._norms) >= _NEEDED else None
            if usual is not None and norm > _GRADIENT * usual:
                yield "gradient", f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}"
            self._norms.append(float(norm))

    def _report(self, sign: str, step: int, what: str) -> None:
        if sign not in self._reported:
            self._reported.add(sign)
            alarm(self._mode, step, sign, what, Path(self._trainer.args.output_dir))


def _preferred(rows: Dataset) -> Dataset:
    """The first response of every row, which is its preferred one, with its mask of scored tokens."""
    several = [name for name in ("response_ids", "scored") if name in rows.column_names]
    return Dataset.from_dict(
        {"prompt_ids": rows["prompt_ids"][:], **{name: [one[:1] for one in rows[name]] for name in several}}
    )
