"""``simpo sample``: a model and prompts in, responses out, resumable after any kill."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.data.prompts import Prompts, prepare_prompts
from simpo.data.settings import RenderSettings
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.generation.chunks import (
    Chunk,
    ChunkFiles,
    Processes,
    gather,
    joined_processes,
    missing_chunks,
    response_texts,
    sample_chunks,
    write_responses,
)
from simpo.generation.engine import Engine, Sampled, TransformersEngine, stop_ids
from simpo.generation.settings import SamplingSettings
from simpo.generation.vllm import VllmEngine
from simpo.models.checkpoint import Checkpoint, model_digest
from simpo.models.devices import device
from simpo.models.loading import check_stored, load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric
from simpo.runs.signals import stoppable
from simpo.runs.terminal import Advance, progress
from simpo.statistics import mean_interval, proportion_interval, share_interval

# ---- Figures of sampled responses.


def response_metrics(texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]) -> list[Metric]:
    """Number, lengths and ends of the responses.

    Answers to one prompt are alike, so the intervals of lengths are those of the prompts' means.

    Args:
        texts: the responses to every prompt; as many to each.
        samples: the same as they were sampled.
    """
    ended = [sampled.finished for answers in samples for sampled in answers]
    tokens = [float(np.mean([len(sampled.ids) for sampled in answers])) for answers in samples]
    characters = [float(np.mean([len(text) for text in answers])) for answers in texts]
    metrics = [
        Metric("sample/prompts", len(samples)),
        Metric("sample/responses", len(ended)),
        Metric.of("sample/tokens", mean_interval(tokens)),
        Metric.of("sample/characters", mean_interval(characters)),
        Metric.of("sample/ended", proportion_interval(sum(ended), len(ended))),
        Metric("sample/hit_max_new_tokens", len(ended) - sum(ended), n=len(ended)),
    ]
    if len(texts[0]) > 1:
        distinct = [len(set(answers)) / len(answers) for answers in texts]
        metrics.append(Metric.of("sample/distinct", share_interval(distinct)))
    return metrics


# ---- What a sampling run is made of: model, prompts and settings, read and checked before the weights are.


EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class PromptArguments:
    """Where the prompts come from, and how they are rendered."""

    prompts: str = field(metadata={"help": "File, folder or hub id of rows with prompts.", "positional": "PROMPTS"})
    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "A chat template, a file with one, or none for raw text (default: the tokenizer's own)."},
    )
    column_mapping: Mapping[str, str] | None = field(
        default=None, metadata={"help": 'Columns to rename, e.g. {"instruction": "prompt"}.'}
    )
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def rows(self) -> Dataset:
        """The rows that hold the prompts."""
        return load_rows(self.prompts, split=self.split, column_mapping=self.column_mapping)


@dataclass(frozen=True)
class Job:
    """Everything that determines the responses, with nothing left open."""

    checkpoint: Checkpoint
    engine: EngineName
    tokenizer: PreTrainedTokenizerBase
    source: PromptArguments
    prompts: Prompts
    settings: SamplingSettings
    stop_ids: list[int]
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        model: ModelArguments,
        source: PromptArguments,
        settings: SamplingSettings,
        engine: EngineName,
        log: Log,
        engine_args: Mapping[str, Any] = MappingProxyType({}),
    ) -> Job:
        """Read everything but the weights, and say what was found.

        ``engine_args`` are vLLM's; a ``max_model_len`` among them limits the model's context.

        Raises:
            SimpoError: model, prompts or settings cannot be used.
        """
        tokenizer = load_tokenizer(model.model_name_or_path, model, chat_template=source.chat_template)
        checkpoint = Checkpoint.read(model)
        if engine == "vllm":
            check_stored(checkpoint.arguments)
        log(f"model: {model.model_name_or_path} ({checkpoint.arguments.dtype} on {device()}, {engine})")
        limits = (checkpoint.context, engine_args.get("max_model_len"))
        context = min((limit for limit in limits if isinstance(limit, int)), default=None)
        settings = settings.resolved(context=context, chunk_size=_chunk_size(engine))
        log("sampling: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()))
        room = _room(context, settings, log)
        prompts = prepare_prompts(source.rows(), tokenizer, max_prompt_length=room, rendering=source.rendering)
        for line in prompts.report.lines():
            log(line)
        for prompt in prompts:
            if fault := checkpoint.limits.fault(0, prompt.ids):
                raise SimpoError(f"prompt {prompt.id}: {fault}; use the model's own tokenizer")
        stops = stop_ids(tokenizer, checkpoint.generation_config)
        return cls(checkpoint, engine, tokenizer, source, prompts, settings, stops, dict(engine_args))

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every prompt."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def total(self) -> int:
        """Responses in all."""
        return len(self.prompts) * self.settings.n

    def identity(self) -> dict[str, Any]:
        """What the responses depend on, as :meth:`simpo.runs.folder.RunFolder.begin` takes it."""
        return {
            "model": model_digest(self.checkpoint.arguments),
            "dtype": self.checkpoint.arguments.dtype,
            "engine": self.engine,
            "prompts": _digest(self.prompts),
            "stop_ids": str(self.stop_ids),
            **dataclasses.asdict(self.settings),
            **{f"engine_args/{key}": value for key, value in self.engine_args.items()},
        }

    def resolved(self) -> dict[str, Any]:
        """All that was given, nothing left open."""
        given = [dataclasses.asdict(part) for part in (self.checkpoint.arguments, self.source, self.settings)]
        return {"engine": self.engine, "engine_args": self.engine_args} | dict(
            item for part in given for item in part.items()
        )


def _room(context: int | None, settings: SamplingSettings, log: Log) -> int | None:
    """Tokens that a prompt may have."""
    assert settings.max_new_tokens is not None
    if context is None:
        return None
    room = context - settings.max_new_tokens
    log(f"the model's context of {context:,} tokens leaves {room:,} to a prompt (max_prompt_length)")
    return room


def _chunk_size(engine: EngineName) -> int:
    if engine == "vllm":  # which makes batches of its own
        return 1024
    return 32 if device().type == "cpu" else 64


def _digest(prompts: Prompts) -> str:
    """Digest of the prompts' ids and tokens, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.id.encode() + array("q", [*prompt.ids, -1]).tobytes())
    return digest.hexdigest()


FILE_NAME = "responses.jsonl"


def sample_responses(
    model: ModelArguments,
    prompts: PromptArguments,
    settings: SamplingSettings,
    folder: Path,
    *,
    engine: EngineName = "transformers",
    engine_args: Mapping[str, Any] = MappingProxyType({}),
    argv: Sequence[str] = (),
) -> Path | None:
    """Sample answers to prompts and write ``responses.jsonl`` and ``results.json``.

    A run that was interrupted or killed is continued by the same call and ends with the same bytes; one that is
    finished is left as it is. Under ``torchrun`` the processes share the chunks, and the bytes are the same again.

    Args:
        model: whose answers.
        prompts: what is asked.
        settings: how answers are drawn.
        folder: the run's folder.
        engine: what generates; ``"vllm"`` where it is installed.
        engine_args: of vLLM.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``; None in all processes but the main one.

    Raises:
        SimpoError: something that the user gave cannot be used, or the disk or the memory is full.
        InterruptedRun: the user stopped it; whole chunks are kept.
    """
    with stoppable():
        ranks = joined_processes()
        if not ranks.main:
            _follow(ranks, folder)
            return None
        if ranks.size > 1 and engine == "vllm":
            raise SimpoError("engine: vllm takes all GPUs from one process; start it without torchrun")
        with RunFolder(folder, command="sample") as run:
            job = Job.prepare(model, prompts, settings, engine, run.log, engine_args)
            ranks.from_main(None if run.finished else job)
            generator = None if run.finished else _load(job)  # before the folder is written
            run.begin(job.identity(), argv=argv, resolved=job.resolved())
            results = run.complete(lambda: _lead(ranks, generator, job, run))
            ChunkFiles(folder).remove()
        return results


def _follow(ranks: Processes, folder: Path) -> None:
    """What a process does that is not the main one."""
    logging.getLogger("simpo").setLevel(logging.ERROR)  # what all notice, the main one says
    job = ranks.from_main()
    if job is not None:
        generator = _load(job)
        _generate(generator, job, ranks, folder, ranks.from_main())
        ranks.wait()


def _lead(ranks: Processes, generator: Engine | None, job: Job, run: RunFolder) -> list[Metric]:
    """What the main process does."""
    assert generator is not None
    chunks = ChunkFiles(run.path)
    done = {record["chunk"]: len(record["samples"]) for record in chunks.records()}
    if done:
        run.log(f"continuing: {sum(done.values()):,} of {job.total:,} responses are there")
    missing = ranks.from_main(missing_chunks(job.ids, job.settings, done))
    _generate(generator, job, ranks, run.path, missing, run.log)
    ranks.wait()
    samples = gather(chunks.records(), len(job.prompts))
    if sum(map(len, samples)) < job.total:
        raise SimpoError(f"output_dir: {run.path} lacks what other processes wrote; name a folder that all share")
    return _write_responses(job, samples, run.path, run.log)


def _load(job: Job) -> Engine:
    if job.engine == "vllm":
        return VllmEngine(job.checkpoint.arguments, job.stop_ids, job.engine_args)
    return TransformersEngine(job.checkpoint.load(), job.tokenizer)


def _generate(
    engine: Engine,
    job: Job,
    ranks: Processes,
    folder: Path,
    missing: Sequence[tuple[int, Chunk]],
    log: Log | None = None,
) -> None:
    """Make and store this process's share of the ``missing`` chunks; the main one says how far it has come."""
    share = missing[ranks.rank :: ranks.size]
    mine = ChunkFiles(folder).mine(ranks.rank)
    count = sum(len(chunk) for _, chunk in share)
    try:
        with _progress(job, ranks, count, log) as advance:
            for record in sample_chunks(engine, job.ids, job.settings, share):
                mine.append([record])
                advance(len(record["samples"]))
    except torch.OutOfMemoryError as error:
        size = job.settings.chunk_size
        raise SimpoError(
            f"chunk_size: {size} answers at once do not fit the memory; set a smaller chunk_size and a new output_dir"
        ) from error


def _progress(job: Job, ranks: Processes, count: int, log: Log | None) -> AbstractContextManager[Advance]:
    """Progress of this process's share."""
    if log is None:
        return nullcontext(lambda count: None)
    if ranks.size == 1:
        return progress("responses", job.total, job.total - count, log)
    return progress(f"responses of the first of {ranks.size} processes", count, 0, log)


def _write_responses(job: Job, samples: Sequence[Sequence[Sampled]], folder: Path, log: Log) -> list[Metric]:
    """Write the responses in the order of the prompts; their figures."""
    texts = response_texts(job.tokenizer, job.prompts.prompts, samples)
    write_responses(folder / FILE_NAME, job.prompts.prompts, texts, samples)
    unfinished = sum(not sampled.finished for answers in samples for sampled in answers)
    if unfinished:
        limit = job.settings.max_new_tokens
        log(f"note: {unfinished:,} responses hit max_new_tokens {limit:,} before they ended (finished: false)")
    return [Metric(*figure) for figure in job.prompts.report.metrics()] + response_metrics(texts, samples)
