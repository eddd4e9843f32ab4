"""Train an objective at one learning rate with one seed, and measure how far it moved from the initial model."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError
from simpo.models.loading import load_model, load_tokenizer
from simpo.objectives import Objective, Responses
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.logprobs import fused_logprobs
from simpo.packing.model import prepare_policy, responses_of
from simpo.packing.scoring import (
    ReferenceStates,
    bounded_batches,
    mean_by_comparison,
    reference_states,
    token_outputs,
)
from simpo.runs.files import write_text
from simpo.training.batches import comparisons_of
from simpo.training.preference import PreferenceConfig, PreferenceTrainer

_SCORING_TOKENS = 4096  # tokens per forward when scoring held-out pairs
_TRAINER_FOLDER = "trainer"  # nothing is saved there
Keys = dict[str, Any]  # recipe keys


@dataclass(frozen=True)
class Measured:
    """The metrics of a run. Lists have one entry per held-out pair; the tuning pairs come first.

    Attributes:
        correct: 1 if the chosen response has the larger implicit reward, as the objective defines it, otherwise 0.
        apart: 1 if the chosen response's average log-probability rose more (or fell less) than the rejected one's,
            otherwise 0. This definition is the same for all objectives.
        chosen: change of the chosen response's average log-probability, in nats per token.
        rejected: change of the rejected response's average log-probability, in nats per token.
        kl: KL(trained || initial) of the next token in nats, exact over the vocabulary, mean over the pair's tokens.
        step_seconds: median time of the optimizer steps after the first; on a CPU, CPU time summed over threads.
    """

    correct: list[float]
    apart: list[float]
    chosen: list[float]
    rejected: list[float]
    kl: list[float]
    step_seconds: float


class HeldOut:
    """Held-out pairs, with the initial model's hidden states computed once for all runs."""

    def __init__(self, start: PreTrainedModel, pairs: Sequence[TokenizedComparison]) -> None:
        start = prepare_policy(start).eval()
        self._batches: list[tuple[PackedBatch, ReferenceStates, Responses]] = []
        with torch.no_grad():
            for batch, _ in bounded_batches(start, pairs, max_batch_tokens=_SCORING_TOKENS, path="auto"):
                on_device = batch.to(start.device)
                states = reference_states(start, on_device)
                logps = fused_logprobs(states.hidden, states.head, on_device.targets)
                self._batches.append((on_device, states, responses_of(on_device, logps)))

    def start_preferences(self) -> np.ndarray:
        """Return ``[pairs, 3]``: whether the chosen response has the higher average and total log-probability under
        the initial model, and whether it has more tokens.
        """
        found = [(before.avg, before.logp, before.length) for *_, before in self._batches]
        return torch.cat([torch.stack([one[0::2] > one[1::2] for one in each], dim=1) for each in found]).numpy(
            force=True
        )

    @torch.no_grad()
    def measure(self, trained: PreTrainedModel, objective: Objective, step_seconds: float) -> Measured:
        """Compare a trained model with the initial model, using the rewards of ``objective``."""
        trained = prepare_policy(trained).eval()
        columns: list[Tensor] = []
        for batch, states, before in self._batches:
            found = token_outputs(trained, batch, reference=states)
            assert found.divergence is not None
            after = replace(responses_of(batch, found.logps), ref_logp=before.logp)
            reward, change = objective.reward(after), after.avg - before.avg
            correct, apart = (values[0::2] > values[1::2] for values in (reward, change))
            kl = mean_by_comparison(batch, found.divergence)
            columns.append(torch.stack([correct.to(kl), apart.to(kl), change[0::2], change[1::2], kl]))
        return Measured(*torch.cat(columns, dim=1).tolist(), step_seconds)


class _Clock(TrainerCallback):
    """Records the duration of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._begun = 0.0
        self._now = time.perf_counter if torch.cuda.is_available() else time.process_time  # immune to other load

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start timing an optimizer step."""
        self._begun = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the duration of the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(self._now() - self._begun)


def train(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, keys: Mapping[str, Any], folder: Path
) -> tuple[PreferenceTrainer, float]:
    """Train ``start`` in place on ``rows`` with the given recipe keys.

    Returns:
        The trainer, which holds the trained ``model``, and the median seconds per step (see :class:`Measured`).

    Raises:
        SimpoError: if a key is wrong or training fails.
    """
    clock = _Clock()
    config = PreferenceConfig(str(folder), **keys)
    trainer = PreferenceTrainer(start, config, rows, processing_class=tokenizer, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)  # it would print to stdout, where the table goes
    trainer.train()
    return trainer, statistics.median(clock.steps[1:])


class Bench:
    """Runs and measures objectives on the same model and data.

    Args:
        model: folder of the initial model.
        folder: folder for the measurements.
        texts: JSON lines of the ``train``, ``tuning`` and ``test`` pairs.
        shared: recipe keys common to all runs.
    """

    def __init__(self, model: str, folder: Path, texts: Mapping[str, Sequence[str]], shared: Keys) -> None:
        self._model, self._folder, self._shared = model, folder, shared
        self._tokenizer = load_tokenizer(model)
        files = {"train": texts["train"], "held_out": [*texts["tuning"], *texts["test"]]}
        for name, lines in files.items():
            write_text(folder / f"{name}.jsonl", "".join(lines))
        self._rows = load_rows(str(folder / "train.jsonl"), split="train")
        settings = TokenizeSettings(max_length=shared["max_length"])
        held_out = load_rows(str(folder / "held_out.jsonl"), split="train")
        tokenized = prepare(held_out, self._tokenizer, settings, label="held out").dataset
        pairs = comparisons_of(tokenized, range(len(tokenized)))
        prompts = [tuple(pair.prompt_ids) for pair in pairs[len(texts["tuning"]) :]]
        # Pairs with the same prompt are not independent, so the bootstrap resamples them together.
        self.clusters = np.unique([str(prompt) for prompt in prompts], return_inverse=True)[1]
        self.held_out = HeldOut(load_model(model).to(PreferenceConfig(str(folder / _TRAINER_FOLDER)).device), pairs)

    def preference(self, measured: Measured) -> tuple[float, float]:
        """Return a sort key for learning rates: higher accuracy on the tuning pairs, then smaller KL."""
        tuning = len(measured.correct) - len(self.clusters)
        return statistics.fmean(measured.correct[:tuning]), -statistics.fmean(measured.kl[:tuning])

    def run(self, label: str, keys: Keys, rate: str, seed: int) -> Measured | str:
        """Return the stored or newly made measurement, or the error message if training failed."""
        path = self._folder / f"{re.sub('[^a-z0-9_.]+', '-', label)}-{rate}-{seed}.json"
        if not path.exists():
            print(f"{label} at {rate}, seed {seed}", file=sys.stderr, flush=True)
            given = keys | self._shared | {"learning_rate": float(rate), "seed": seed}
            given |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
            try:
                start, trained_in = load_model(self._model), self._folder / _TRAINER_FOLDER
                trainer, seconds = train(start, self._tokenizer, self._rows, given, trained_in)
            except SimpoError as error:
                return str(error)
            measured = self.held_out.measure(trainer.model, trainer.objective, seconds)
            write_text(path, json.dumps(asdict(measured)))
        return Measured(**json.loads(path.read_text()))
