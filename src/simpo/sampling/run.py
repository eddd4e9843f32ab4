"""The workflow behind ``simpo sample``: a model and prompts in, responses out, however often it was killed between."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from simpo.atomic import staged_files
from simpo.data.prompts import Prompt, Prompts, prepare_prompts
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.progress import Advance, progress
from simpo.results import Metric, write_results
from simpo.runs.folder import RunFolder
from simpo.runs.signals import stoppable
from simpo.sampling.chunk_files import ChunkFiles
from simpo.sampling.chunks import Chunk, gather, missing_chunks, sample_chunks
from simpo.sampling.engine import Engine, Sampled, stop_ids
from simpo.sampling.figures import response_metrics
from simpo.sampling.generate import TransformersEngine
from simpo.sampling.loading import Checkpoint, device
from simpo.sampling.processes import Processes, joined_processes
from simpo.sampling.settings import SamplingSettings
from simpo.sampling.texts import ResponseText
from simpo.sampling.vllm import VllmEngine
from simpo.training.identity import model_digest
from simpo.training.models import ModelArguments, load_tokenizer

FILE_NAME = "responses.jsonl"

EngineName = Literal["transformers", "vllm"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class PromptArguments:
    """Where the prompts come from (file, folder or hub id, and split), and the template that renders them."""

    prompts: str
    split: str = "train"
    chat_template: str | None = None


def sample_responses(
    model: ModelArguments,
    prompts: PromptArguments,
    settings: SamplingSettings,
    folder: Path,
    *,
    engine: EngineName = "transformers",
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
            return _follow(ranks, folder)
        if ranks.size > 1 and engine == "vllm":
            raise SimpoError("engine: vllm takes all GPUs from one process; start it without torchrun")
        with RunFolder(folder, command="sample") as run:
            job = _prepare(model, prompts, settings, engine, run.say)
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


def _lead(ranks: Processes, job: _Job, run: RunFolder, argv: Sequence[str]) -> None:
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


@dataclass(frozen=True)
class _Job:
    """Everything that determines the responses, with nothing left open."""

    checkpoint: Checkpoint
    engine: EngineName
    tokenizer: PreTrainedTokenizerBase
    source: PromptArguments
    prompts: Prompts
    settings: SamplingSettings
    stop_ids: list[int]

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every prompt."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def total(self) -> int:
        """Responses in all."""
        return len(self.prompts) * self.settings.n

    def identity(self) -> dict[str, Any]:
        return {
            "model": model_digest(self.checkpoint.arguments),
            "dtype": self.checkpoint.arguments.dtype,
            "engine": self.engine,
            "prompts": _digest(self.prompts),
            "stop_ids": str(self.stop_ids),
            **dataclasses.asdict(self.settings),
        }

    def resolved(self) -> dict[str, Any]:
        given = [dataclasses.asdict(part) for part in (self.checkpoint.arguments, self.source, self.settings)]
        return {"engine": self.engine} | dict(item for part in given for item in part.items())


def _prepare(
    model: ModelArguments, source: PromptArguments, settings: SamplingSettings, engine: EngineName, say: Say
) -> _Job:
    """Read everything but the weights."""
    tokenizer = load_tokenizer(model.model_name_or_path, model, chat_template=source.chat_template)
    checkpoint = Checkpoint.read(model)
    say(f"model: {model.model_name_or_path} ({checkpoint.arguments.dtype} on {device()}, {engine})")
    settings = settings.resolved(context=checkpoint.context, chunk_size=_chunk_size(engine))
    say("sampling: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()))
    rows = load_rows(source.prompts, split=source.split)
    prompts = prepare_prompts(rows, tokenizer, max_prompt_length=_room(checkpoint.context, settings, say))
    for line in prompts.report.lines():
        say(line)
    stops = stop_ids(tokenizer, checkpoint.generation_config)
    return _Job(checkpoint, engine, tokenizer, source, prompts, settings, stops)


def _room(context: int | None, settings: SamplingSettings, say: Say) -> int | None:
    """Tokens that a prompt may have."""
    assert settings.max_new_tokens is not None
    if context is None:
        return None
    room = context - settings.max_new_tokens
    say(f"the model's context of {context:,} tokens leaves {room:,} to a prompt (max_prompt_length)")
    return room


def _chunk_size(engine: EngineName) -> int:
    if engine == "vllm":  # which makes batches of its own
        return 1024
    return 32 if device().type == "cpu" else 64


def _digest(prompts: Prompts) -> str:
    """Of ids and tokens, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.id.encode() + array("q", [*prompt.ids, -1]).tobytes())
    return digest.hexdigest()


def _load(job: _Job) -> Engine:
    if job.engine == "vllm":
        return VllmEngine(job.checkpoint.arguments, job.stop_ids)
    return TransformersEngine(job.checkpoint.load(), job.tokenizer)


def _generate(
    engine: Engine,
    job: _Job,
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


def _progress(job: _Job, ranks: Processes, count: int, say: Say | None) -> AbstractContextManager[Advance]:
    """Of this process's share."""
    if say is None:
        return nullcontext(lambda count: None)
    if ranks.size == 1:
        return progress("responses", job.total, job.total - count, say)
    return progress(f"responses of the first of {ranks.size} processes", count, 0, say)


def _write_responses(job: _Job, samples: Sequence[Sequence[Sampled]], folder: Path, say: Say) -> list[Metric]:
    """Write the responses in the order of the prompts; their figures."""
    decoder = ResponseText(job.tokenizer)
    texts = [
        [decoder.decode(prompt.ids, sampled.ids) for sampled in answers]
        for prompt, answers in zip(job.prompts, samples, strict=True)
    ]
    rows = (_row(*parts) for parts in zip(job.prompts, texts, samples, strict=True))
    with (
        staged_files(folder) as staged,
        (staged / FILE_NAME).open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished = sum(not sampled.finished for answers in samples for sampled in answers)
    if unfinished:
        limit = job.settings.max_new_tokens
        say(f"note: {unfinished:,} responses hit max_new_tokens {limit:,} before they ended (finished: false)")
    return [Metric(*figure) for figure in job.prompts.report.metrics()] + response_metrics(texts, samples)


def _row(prompt: Prompt, texts: Sequence[str], answers: Sequence[Sampled]) -> Mapping[str, Any]:
    return {
        "id": prompt.id,
        "prompt": prompt.content,
        "responses": list(texts),
        "response_ids": [list(sampled.ids) for sampled in answers],
        "finished": [sampled.finished for sampled in answers],
        "logps": [sampled.logp for sampled in answers],
        "where": prompt.where,
        "extra": prompt.extra,
    }
