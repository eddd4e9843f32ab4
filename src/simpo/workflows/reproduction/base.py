"""The common basis of all trials: the start model, and pairs and prompts of the tiny world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from simpo.data.sources import load_rows
from simpo.generation.sample import FILE_NAME, PromptArguments, sample_responses
from simpo.models.loading import load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import staged_folder
from simpo.runs.log import Log
from simpo.training.configs import SFTConfig
from simpo.training.sft import SFTTrainer
from simpo.workflows.pair import PairSettings, pair_responses
from simpo.workflows.reproduction.trial import HELD_OUT, HELD_OUT_PAIRS, SAMPLING, START, TUNING
from simpo.world.judge import judge
from simpo.world.pairs import write_model, write_pairs, write_prompts, write_sft

DEMONSTRATIONS, PROMPTS, JUDGED, PAIRS = 24_000, 640, 240, 640
ON_POLICY, OFF_POLICY, LENGTH_BIASED = "on-policy", "off-policy", "length-biased"  # files of pairs
LENGTH_BIAS = 0.5
_SEED = 0  # of the world, the start model and the pairs; seeds of trials vary the training and the answers
_ANSWERS = 6  # to a prompt, of which the best and the worst are paired


def prepare_base(folder: Path, log: Log) -> None:
    """Make the start model by supervised fine-tuning, pair its own answers, and draw other pairs; once.

    Every part is whole or absent, and a part that exists is left as it is.
    """
    if not (folder / "random").exists():
        write_model(folder / "random", _SEED)
    write_sft(folder / "demonstrations.jsonl", DEMONSTRATIONS, _SEED)  # writing them again changes nothing
    write_prompts(folder / "prompts.jsonl", PROMPTS, _SEED)
    write_prompts(folder / f"{TUNING}.jsonl", JUDGED, _SEED + 1)
    write_prompts(folder / f"{HELD_OUT}.jsonl", JUDGED, _SEED, held_out=True)
    write_pairs(folder / f"{OFF_POLICY}.jsonl", PAIRS, _SEED)
    write_pairs(folder / f"{LENGTH_BIASED}.jsonl", PAIRS, _SEED, length_bias=LENGTH_BIAS)
    if not (folder / START).exists():
        log(f"start model: supervised fine-tuning on {DEMONSTRATIONS:,} demonstrations (about two minutes)")
        _fine_tune(folder)
    for name, prompts in ((ON_POLICY, "prompts"), (HELD_OUT_PAIRS.removesuffix(".jsonl"), HELD_OUT)):
        if not (folder / f"{name}.jsonl").exists():
            log(f"pairs: {_ANSWERS} answers of the start model to every one of {prompts}.jsonl")
            _pair(folder, name, prompts)


def _fine_tune(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "random", dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder / "random"))
    with TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            num_train_epochs=1,
            max_length=128,
            seed=_SEED,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = load_rows(str(folder / "demonstrations.jsonl"), split="train")
        SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    with staged_folder(folder / START) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _pair(folder: Path, name: str, prompts: str) -> None:
    settings = replace(SAMPLING, n=_ANSWERS, seed=_SEED)
    answers = folder / f"{name}-answers"
    source = PromptArguments(str(folder / f"{prompts}.jsonl"))
    sample_responses(ModelArguments(str(folder / START), dtype="float32"), source, settings, answers)
    # The exact judge scores answers that were cut off correctly.
    keep_cut = PairSettings(keep_unfinished=True)
    pair_responses(answers / FILE_NAME, judge, folder / f"{name}.jsonl", keep_cut)
