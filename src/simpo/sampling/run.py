"""The workflow behind ``simpo sample``: a model and prompts in, responses out, however often it was killed between."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simpo.errors import SimpoError
from simpo.progress import Advance, progress
from simpo.results import Metric, write_results
from simpo.runs.folder import RunFolder
from simpo.runs.signals import stoppable
from simpo.sampling.chunk_files import ChunkFiles
from simpo.sampling.chunks import Chunk, gather, missing_chunks, sample_chunks
from simpo.sampling.engine import Engine, Sampled
from simpo.sampling.figures import response_metrics
from simpo.sampling.generate import TransformersEngine
from simpo.sampling.job import EngineName, Job, PromptArguments, Say
from simpo.sampling.processes import Processes, joined_processes
from simpo.sampling.records import response_texts, write_responses
from simpo.sampling.settings import SamplingSettings
from simpo.sampling.vllm import VllmEngine
from simpo.training.model_arguments import ModelArguments

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
    with stoppable("interrupted; the same command continues"):
        ranks = joined_processes()
        if not ranks.main:
            _follow(ranks, folder)
            return None
        if ranks.size > 1 and engine == "vllm":
            raise SimpoError("engine: vllm takes all GPUs from one process; start it without torchrun")
        with RunFolder(folder, command="sample") as run:
            job = Job.prepare(model, prompts, settings, engine, run.say, engine_args)
            ranks.from_main(None if run.finished else job)
            if run.finished:
                run.begin(job.identity())
                run.say(f"{folder} holds this run already, finished")
            else:
                _lead(ranks, job, run, argv)
            ChunkFiles(folder).remove()
        return folder / "results.json"


def _follow(ranks: Processes, folder: Path) -> None:
    """What a process does that is not the main one."""
    logging.getLogger("simpo").setLevel(logging.ERROR)  # what all notice, the main one says
    job = ranks.from_main()
    if job is not None:
        generator = _load(job)
        _generate(generator, job, ranks, folder, ranks.from_main())
        ranks.wait()


def _lead(ranks: Processes, job: Job, run: RunFolder, argv: Sequence[str]) -> None:
    """What the main process does."""
    generator = _load(job)
    run.begin(job.identity(), argv=argv, resolved=job.resolved(), accept_changes=None)
    chunks = ChunkFiles(run.path)
    done = {record["chunk"]: len(record["samples"]) for record in chunks.records()}
    if done:
        run.say(f"continuing: {sum(done.values()):,} of {job.total:,} responses are there")
    missing = ranks.from_main(missing_chunks(job.ids, job.settings, done))
    _generate(generator, job, ranks, run.path, missing, run.say)
    ranks.wait()
    samples = gather(chunks.records(), len(job.prompts))
    if sum(map(len, samples)) < job.total:
        raise SimpoError(f"output_dir: {run.path} lacks what other processes wrote; name a folder that all share")
    metrics = _write_responses(job, samples, run.path, run.say)
    write_results(run.path, command="sample", fingerprint=run.fingerprint, metrics=metrics)
    run.finish()


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
    say: Say | None = None,
) -> None:
    """Make and store this process's share of the ``missing`` chunks; the main one says how far it has come."""
    share = missing[ranks.rank :: ranks.size]
    mine = ChunkFiles(folder).mine(ranks.rank)
    count = sum(len(chunk) for _, chunk in share)
    try:
        with _progress(job, ranks, count, say) as advance:
            for record in sample_chunks(engine, job.ids, job.settings, share):
                mine.append([record])
                advance(len(record["samples"]))
    except torch.OutOfMemoryError as error:
        size = job.settings.chunk_size
        raise SimpoError(
            f"chunk_size: {size} answers at once do not fit the memory; set a smaller chunk_size and a new output_dir"
        ) from error


def _progress(job: Job, ranks: Processes, count: int, say: Say | None) -> AbstractContextManager[Advance]:
    """Of this process's share."""
    if say is None:
        return nullcontext(lambda count: None)
    if ranks.size == 1:
        return progress("responses", job.total, job.total - count, say)
    return progress(f"responses of the first of {ranks.size} processes", count, 0, say)


def _write_responses(job: Job, samples: Sequence[Sequence[Sampled]], folder: Path, say: Say) -> list[Metric]:
    """Write the responses in the order of the prompts; their figures."""
    texts = response_texts(job.tokenizer, job.prompts.prompts, samples)
    write_responses(folder / FILE_NAME, job.prompts.prompts, texts, samples)
    unfinished = sum(not sampled.finished for answers in samples for sampled in answers)
    if unfinished:
        limit = job.settings.max_new_tokens
        say(f"note: {unfinished:,} responses hit max_new_tokens {limit:,} before they ended (finished: false)")
    return [Metric(*figure) for figure in job.prompts.report.metrics()] + response_metrics(texts, samples)
