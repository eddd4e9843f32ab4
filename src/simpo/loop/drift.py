"""How far a model has moved from another, measured on its own answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from simpo.data.prompts import prepare_prompts
from simpo.data.sources import load_rows
from simpo.packing.comparison import TokenizedComparison
from simpo.packing.scoring import score_responses
from simpo.runs.lines import read_lines
from simpo.sampling.loading import Checkpoint
from simpo.sampling.run import PromptArguments
from simpo.statistics import Interval, mean_interval
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import load_tokenizer

_BATCH_TOKENS = 16384


def drift(answers: Path, start: ModelArguments, asked: PromptArguments) -> Interval:
    """Mean of ``log pi(y | x) - log pi_start(y | x)`` over answers ``y`` of ``pi``, in nats; interval over prompts.

    An unbiased estimate of KL(pi || pi_start) where the answers are drawn at temperature 1 from the whole distribution;
    with other settings a measure of the same kind for what is sampled then.

    Args:
        answers: ``responses.jsonl`` of the model that has moved, with token ids and log-probabilities.
        start: the model that it is measured from.
        asked: what the answers answer.

    Raises:
        SimpoError: the file, the prompts or the model cannot be read.
    """
    records = read_lines(answers)
    tokenizer = load_tokenizer(start.model_name_or_path, start, chat_template=asked.chat_template)
    rows = load_rows(asked.prompts, split=asked.split)
    prompts = {prompt.id: prompt.ids for prompt in prepare_prompts(rows, tokenizer, rendering=asked.rendering)}
    comparisons = [TokenizedComparison(prompts[record["id"]], record["response_ids"]) for record in records]
    longest = max(max(one.packed_length, one.padded_length) for one in comparisons)
    model = Checkpoint.read(start).load().eval()
    with torch.no_grad():
        logps = score_responses(model, comparisons, max_batch_tokens=max(_BATCH_TOKENS, longest)).logp.tolist()
    there = iter(logps)
    ratios = [np.mean([here - next(there) for here in record["logps"]]) for record in records]
    return mean_interval(np.array(ratios))
