"""One objective trained at one learning rate in a process of its own, and how far it moved from where it started."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.memory import peak_mib
from simpo.cli._shared import parse
from simpo.models.loading import load_model, load_tokenizer
from simpo.packing.logprobs import fused_logprobs
from simpo.packing.model import prepare_policy, responses_of
from simpo.packing.scoring import bounded_batches, reference_states, token_outputs
from simpo.runs.lines import JsonLines
from simpo.statistics import proportion_interval
from simpo.training.batches import comparisons_of
from simpo.training.metrics import ACCURACY
from simpo.training.preference import PreferenceConfig, PreferenceTrainer
from simpo.training.run import TrainingJob, run_training
from simpo.training.settings import load_datasets

FILE_NAME = "measured.json"
_TOKENS = 4096  # of a forward when the held-out pairs are scored


@dataclass(frozen=True)
class Measured:
    """The metrics of a run; log-probabilities and KL are in nats per token, on the held-out pairs that are reported.

    Attributes:
        tuning: accuracy on the pairs by which a learning rate is chosen, none of which is reported.
        accuracy: share of pairs whose chosen response has the larger implicit reward.
        low: lower end of its 95% interval.
        high: upper end.
        pairs: held out.
        margin: mean difference of the implicit rewards, on the objective's own scale.
        chosen: change of the chosen responses' average log-probability a token, mean over the pairs.
        rejected: the same of the rejected ones.
        kl: KL(trained || start) of the next token, exact over the vocabulary, mean over all response tokens.
        step_seconds: median of the optimizer steps but the first; on a CPU the processor's time, all threads together.
        peak_mib: most memory of the process until training had ended.
    """

    tuning: float
    accuracy: float
    low: float
    high: float
    pairs: int
    margin: float
    chosen: float
    rejected: float
    kl: float
    step_seconds: float
    peak_mib: float


class _Clock(TrainerCallback):
    """How long optimizer steps took."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._begun = 0.0
        self._now = time.perf_counter if torch.cuda.is_available() else time.process_time  # deaf to other programs

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer, once an optimizer step."""
        self._begun = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer, once an optimizer step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(self._now() - self._begun)


def work(argv: list[str], tuning: int) -> None:
    """Train by the arguments of ``simpo train``, and write :class:`Measured` into the run's folder.

    Args:
        argv: the arguments.
        tuning: number of held-out pairs, from the first on, that choose the learning rate; the others are reported.
    """
    clock = _Clock()
    given = TrainingJob(*parse(argv, PreferenceConfig), argv, callbacks=[clock])
    given.config.disable_tqdm = True
    results = run_training(PreferenceTrainer, given)
    peak = peak_mib(given.config.device.type)
    pairs = list(JsonLines(results.parent / "held_out_after.jsonl"))
    correct = [pair[ACCURACY] for pair in pairs]
    interval = proportion_interval(int(sum(correct[tuning:])), len(pairs) - tuning)
    chosen, rejected, kl = _moved(given, results.parent, tuning)
    found = Measured(
        tuning=statistics.fmean(correct[:tuning]),
        accuracy=interval.value,
        low=interval.low,
        high=interval.high,
        pairs=len(pairs) - tuning,
        margin=statistics.fmean(pair["rewards/margins"] for pair in pairs[tuning:]),
        chosen=chosen,
        rejected=rejected,
        kl=kl,
        step_seconds=statistics.median(clock.steps[1:]),
        peak_mib=peak,
    )
    (results.parent / FILE_NAME).write_text(json.dumps(asdict(found)))


@torch.no_grad()
def _moved(given: TrainingJob, folder: Path, tuning: int) -> tuple[float, float, float]:
    """Changes of the chosen and rejected responses' averages and the KL, see :class:`Measured`."""
    name, device = given.model.model_name_or_path, given.config.device
    tokenizer = load_tokenizer(name, given.model, chat_template=given.data.chat_template)
    _, rows = load_datasets(given.data)
    dataset = PreferenceTrainer.prepare(rows, tokenizer, given.config, "eval").dataset
    comparisons = comparisons_of(dataset, range(tuning, len(dataset)))
    start, trained = (prepare_policy(load_model(where)).eval().to(device) for where in (name, str(folder)))
    changes, divergences = [], []
    for batch, _ in bounded_batches(start, comparisons, max_batch_tokens=_TOKENS, path="auto"):
        states = reference_states(start, batch)
        before = responses_of(batch, fused_logprobs(states.hidden, states.head, batch.targets))
        after = token_outputs(trained, batch, reference=states)
        changes.append(responses_of(batch, after.logps).avg - before.avg)
        divergences.append(after.divergence)
    change = torch.cat(changes)
    return change[0::2].mean().item(), change[1::2].mean().item(), torch.cat(divergences).mean().item()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), int(sys.argv[2]))
