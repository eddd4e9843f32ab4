"""An update on K answers to a long prompt: packed, the prompt computed once, against one row per answer.

    python -m benchmarks.online_update

A trainer of ``simpo online`` samples answers to random prompts and trains on them twice; the second update (forward
and backward of all micro-batches, no optimizer) is measured by processor time. The ratio of the two paths is compared
with the one that counted arithmetic allows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging as hf_logging

from benchmarks.arithmetic import Shape, packed_forward, padded_forward
from benchmarks.rows import word_tokenizer
from benchmarks.setting import Setting, model_config
from simpo.packing.layout import TokenizedComparison
from simpo.training.online import OnlineTrainer
from simpo.training.online_config import OnlineConfig

PATHS = ("packed", "padded")


class _Clock(TrainerCallback):
    """Processor time of every update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def measure(path: str, given: argparse.Namespace) -> tuple[float, list[TokenizedComparison]]:
    """Seconds of an update on a path, and the comparisons that it was made on."""
    setting = Setting(folder="", model=given.model, max_length=given.prompt + given.answer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(setting), dtype=torch.float32)
    rng = random.Random(0)  # noqa: S311 - sampling, not secrets
    words = setting.vocabulary - 1
    rows = [{"prompt": " ".join(f"w{rng.randrange(words)}" for _ in range(given.prompt))} for _ in range(given.prompts)]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = OnlineConfig(
            folder,
            objective="rloo",
            forward_path=path,
            num_generations=given.answers,
            max_new_tokens=given.answer,
            max_length=setting.max_length,
            per_device_train_batch_size=given.prompts,
            **{"max_steps": 2, "sync_every": 2, "rollout_epochs": 2},
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0},
        )
        trainer = OnlineTrainer(
            model,
            args,
            rows,
            processing_class=word_tokenizer(words),
            annotator=lambda answered: [[float(sum(one.ids) % 17) for one in each.samples] for each in answered],
            callbacks=[clock],
        )
        trainer.train()
        trained_on = [TokenizedComparison(row["prompt_ids"], row["response_ids"]) for row in trainer.step_rows]
    return clock.seconds[-1], trained_on


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both paths and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wide", help="size of the Llama model, of benchmarks.setting")
    parser.add_argument("--prompts", type=int, default=2, help="of an update (default 2)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--answers", type=int, default=8, help="to a prompt, K (default 8)")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer (default 64)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    seconds, flops = {}, {}
    shape = Shape.of(model_config(Setting(folder="", model=given.model)))
    for path in PATHS:
        seconds[path], rows = measure(path, given)
        counted = packed_forward(rows) if path == "packed" else padded_forward(rows, all_logits=False)
        flops[path] = counted.flops(shape)
        print(f"{path}: {seconds[path]:.2f} s, {flops[path] / 1e9:.0f} GFLOP", flush=True)
    ratio, bound = (of["padded"] / of["packed"] for of in (seconds, flops))
    print(f"packed is faster by {ratio:.2f}; counted {bound:.2f}; share {ratio / bound:.0%}")


if __name__ == "__main__":
    main()
