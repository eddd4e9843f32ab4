"""Before the first round: every later stage is tried on two prompts with invented answers, and that is thrown away."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.trainer_callback import PrinterCallback

from simpo.data.prompts import Prompt
from simpo.data.sources import load_rows
from simpo.evaluation.compare import make_judges
from simpo.generation.sample import Job
from simpo.generation.vllm import load_vllm
from simpo.judging.protocol import Answers, Pair
from simpo.judging.registry import JudgeOptions, make_annotator
from simpo.models.devices import free_memory
from simpo.models.loading import load_tokenizer
from simpo.runs.lines import write_lines
from simpo.runs.log import Log
from simpo.training.settings import settings_refused
from simpo.training.tasks import PREFERENCES
from simpo.workflows.loop.settings import LoopRecipe, as_it_is
from simpo.workflows.pair import FILE_NAME as PAIRS
from simpo.workflows.pair import make_pairs

_PROMPTS = 2  # what objectives with mismatched answers need


def rehearse(recipe: LoopRecipe, options: JudgeOptions, log: Log) -> None:
    """Find now what would otherwise end the first round after hours of sampling.

    Both sets of prompts are read and rendered. Annotator and judges score invented answers to the shortest prompts; one
    behind a server is not asked, but its key has to be there. The start model is trained on these answers for one step.
    Nothing is kept.

    Args:
        recipe: of the loop.
        options: what annotator and judges need.
        log: called with a line.

    Raises:
        SimpoError: as the stages.
    """
    log(f"trying all stages on {_PROMPTS} prompts with invented answers")
    start = as_it_is(recipe.model)
    if recipe.settings.engine == "vllm":
        load_vllm(start)
    jobs = [
        Job.prepare(start, source, settings, recipe.settings.engine, _silent)
        for source, settings in ((recipe.asked, recipe.sampling), (recipe.held_out, recipe.held_out_sampling))
    ]
    asked, held_out = (sorted(job.prompts, key=lambda prompt: len(prompt.ids))[:_PROMPTS] for job in jobs)
    _judge(recipe, dataclasses.replace(options, log=_silent), asked, held_out)
    free_memory()
    _train(recipe, asked)
    free_memory()


def _silent(line: str) -> None:
    """Say nothing: the stages will."""


def _judge(recipe: LoopRecipe, options: JudgeOptions, asked: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    if options.client is not None:
        options.client.endpoint.api_key()
    if recipe.settings.annotator != "api":
        rows = [Answers(prompt.id, prompt.content, _invented(2), prompt.context) for prompt in asked]
        make_annotator(recipe.settings.annotator, options).score(rows)  # not held while judges are loaded
    for judge in make_judges([name for name in recipe.judges if name != "api"], options).values():
        a, b = _invented(2)
        judge.compare([Pair(prompt.id, prompt.content, a, b, prompt.context) for prompt in held_out])


def _train(recipe: LoopRecipe, prompts: Sequence[Prompt]) -> None:
    """One step, on rows of the shape that the recipe's pairs have."""
    name, n = recipe.model.model_name_or_path, recipe.sampling.n
    records = [
        {"id": one.id, "prompt": one.content, **one.context.columns, "responses": _invented(n), "scores": [*range(n)]}
        for one in prompts
    ]
    rows, _ = make_pairs(records, dataclasses.replace(recipe.pairs, min_gap=0.0, max_length_ratio=None))
    with TemporaryDirectory() as folder, settings_refused():
        write_lines(Path(folder) / PAIRS, rows)
        trainer = PREFERENCES.trainer(
            PREFERENCES.trainer.load(name, recipe.model),
            args=_one_step(recipe.config, Path(folder)),
            train_dataset=load_rows(str(Path(folder) / PAIRS), split="train"),
            processing_class=load_tokenizer(name, recipe.model, chat_template=recipe.settings.chat_template),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _one_step(config: Any, folder: Path) -> Any:
    """A configuration that trains one step and leaves nothing but in ``folder``."""
    config = copy.deepcopy(config)
    config.max_steps, config.dataloader_drop_last = 1, False
    config.output_dir, config.reference_cache = str(folder), str(folder / "reference")
    config.report_to, config.disable_tqdm, config.load_best_model_at_end = [], True, False
    config.save_strategy, config.eval_strategy = (
        type(key)("no") for key in (config.save_strategy, config.eval_strategy)
    )
    return config


def _invented(count: int) -> tuple[str, ...]:
    """So many different answers."""
    return tuple(f"Answer {number}." for number in range(count))
