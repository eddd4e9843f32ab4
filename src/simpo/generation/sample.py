"""``simpo sample``: responses of a model to prompts, resumable after any kill."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase

from simpo.client import ChatClient, ChatReply, ChatRequest, Endpoint, confirm_cost
from simpo.config import setting
from simpo.data.images import ImageReader, has_images, split_processor
from simpo.data.inspection import AnswerSet, diversity_metrics
from simpo.data.prompts import PlainPrompt, Prompts, columns_identity, prepare_prompts, read_prompts
from simpo.data.rows import DataReport
from simpo.data.settings import RenderSettings
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.generation.chunks import Chunk, ChunkFiles, gather, missing_chunks, sample_chunks
from simpo.generation.engine import Engine, Images, TransformersEngine, stop_ids
from simpo.generation.responses import response_metrics, response_texts, write_responses
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.generation.vllm import VllmEngine
from simpo.models.checkpoint import Checkpoint, model_digest
from simpo.models.devices import device, from_main
from simpo.models.loading import check_model_files, load_processor, load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.attention import causal_lm
from simpo.packing.images import check_image_inputs
from simpo.runs.files import remove_folder, write_lines
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric, fingerprint
from simpo.runs.terminal import Advance, interruptible, progress
from simpo.statistics import proportion_interval

FILE_NAME = "responses.jsonl"

EngineName = Literal["transformers", "vllm"]

# A process that has done its share waits for the slowest one; processes that end are noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class PromptArguments:
    """The source of the prompts, and how they are rendered."""

    prompts: str = field(metadata={"help": "File, folder or hub id of rows with prompts.", "positional": "PROMPTS"})
    split: str = setting("train", "Split of the prompts.")
    chat_template: str | None = setting(
        None, "A chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )
    column_mapping: Mapping[str, str] | None = setting(None, 'Columns to rename, e.g. {"instruction": "prompt"}.')
    image_folder: str | None = setting(
        None, "Folder that relative paths of images start from (default: the working directory)."
    )
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def rows(self) -> Dataset:
        """The rows that contain the prompts."""
        return load_rows(self.prompts, split=self.split, column_mapping=self.column_mapping)


@dataclass(frozen=True)
class Job:
    """Everything that determines the responses, read and checked before the weights are loaded."""

    checkpoint: Checkpoint
    engine: EngineName
    tokenizer: PreTrainedTokenizerBase
    source: PromptArguments
    prompts: Prompts
    settings: SamplingSettings
    stop_ids: list[int]
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    reader: ImageReader | None = None

    @classmethod
    def prepare(
        cls,
        model: ModelArguments,
        source: PromptArguments,
        settings: SamplingSettings,
        engine: EngineName,
        log: Log,
        engine_args: Mapping[str, Any] = MappingProxyType({}),
        *,
        images: bool = False,
    ) -> Job:
        """Read everything but the weights, and log what was found.

        A ``max_model_len`` among vLLM's ``engine_args`` limits the model's context. With ``images``, prompts may have
        some if the engine is transformers; otherwise such prompts are bad rows.
        """
        tokenizer = load_tokenizer(model, chat_template=source.chat_template)
        checkpoint = Checkpoint.read(model)
        if engine == "vllm":
            check_model_files(checkpoint.arguments)
        log(f"model: {model.model_name_or_path} ({checkpoint.arguments.dtype} on {device()}, {engine})")
        limits = (checkpoint.context, engine_args.get("max_model_len"))
        context = min((limit for limit in limits if isinstance(limit, int)), default=None)
        on_device = 32 if device().type == "cpu" else 64
        settings = settings.resolved(context=context, chunk_size=1024 if engine == "vllm" else on_device)
        log("sampling: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()))
        room = None
        if context is not None:
            assert settings.max_new_tokens is not None
            room = context - settings.max_new_tokens
            log(f"the model's context of {context:,} tokens leaves {room:,} to a prompt (max_prompt_length)")
        rows, processing = source.rows(), tokenizer
        if images and engine == "transformers" and has_images(rows):
            processing = load_processor(model, chat_template=source.chat_template)
        prompts = prepare_prompts(
            rows, processing, max_prompt_length=room, rendering=source.rendering, image_folder=source.image_folder
        )
        for line in prompts.report.lines():
            log(line)
        for prompt in prompts:
            if fault := checkpoint.limits.fault(0, prompt.ids):
                raise SimpoError(f"prompt {prompt.id}: {fault}; use the model's own tokenizer")
        stops = stop_ids(tokenizer, checkpoint.generation_config)
        tokenizer, reader = split_processor(processing, source.image_folder)
        return cls(checkpoint, engine, tokenizer, source, prompts, settings, stops, dict(engine_args), reader)

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of every prompt."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def total(self) -> int:
        """The number of responses."""
        return len(self.prompts) * self.settings.n

    def identity(self) -> dict[str, Any]:
        """Everything that the responses depend on; see :meth:`simpo.runs.folder.RunFolder.begin`."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.id.encode() + array("q", [*prompt.ids, -1]).tobytes())
        return {
            "model": model_digest(self.checkpoint.arguments),
            "dtype": self.checkpoint.arguments.dtype,
            "engine": self.engine,
            "prompts": digest.hexdigest(),
            **columns_identity(self.prompts),
            "stop_ids": str(self.stop_ids),
            **dataclasses.asdict(self.settings),
            **{f"engine_args/{key}": value for key, value in self.engine_args.items()},
        }

    def resolved(self) -> dict[str, Any]:
        """All settings, with defaults filled in."""
        found: dict[str, Any] = {"engine": self.engine, "engine_args": self.engine_args}
        for part in (self.checkpoint.arguments, self.source, self.settings):
            found |= dataclasses.asdict(part)
        return found

    def load(self) -> Engine:
        """Load the model into its engine."""
        if self.engine == "vllm":
            return VllmEngine(self.checkpoint.arguments, self.stop_ids, self.engine_args)
        model = self.checkpoint.load()
        shown = next((number for number, prompt in enumerate(self.prompts) if prompt.images), None)
        if self.reader is not None and shown is not None:
            first = self.reader.example(self.prompts.prompts[shown].images[0])
            check_image_inputs(causal_lm(model), self.images_of(shown)[0], first)
        return TransformersEngine(model, self.tokenizer)

    def images_of(self, index: int) -> Images:
        """The images of a prompt."""
        assert self.reader is not None
        prompt = self.prompts.prompts[index]
        return self.reader.tensors(prompt.images, prompt.digests)


def sample_responses(
    model: ModelArguments,
    prompts: PromptArguments,
    settings: SamplingSettings,
    folder: Path,
    *,
    engine: EngineName = "transformers",
    engine_args: Mapping[str, Any] = MappingProxyType({}),
    images: bool = False,
    argv: Sequence[str] = (),
) -> Path | None:
    """Sample answers to prompts and write ``responses.jsonl`` and ``results.json``.

    The same call continues a run that was interrupted or killed, and ends with the same bytes; it leaves a finished run
    as it is. Under ``torchrun`` the processes share the chunks, and the bytes are the same again. ``images`` is as in
    :meth:`Job.prepare`. Returns the path of ``results.json``; None in all processes but the main one.

    Raises:
        SimpoError: an argument cannot be used, or the disk or the memory is full.
        InterruptedRun: the user stopped the run; complete chunks are kept.
    """
    with interruptible():
        processes = Processes.join()
        if not processes.main:
            logging.getLogger("simpo").setLevel(logging.ERROR)  # the main process logs what all of them notice
            job = processes.from_main()
            if job is not None:
                loaded = job.load()
                _generate(loaded, job, processes, folder, processes.from_main())
                processes.wait()
            return None
        if processes.size > 1 and engine == "vllm":
            raise SimpoError("engine: vllm takes all GPUs from one process; start it without torchrun")
        with RunFolder(folder, command="sample") as run:
            job = Job.prepare(model, prompts, settings, engine, run.log, engine_args, images=images)
            processes.from_main(None if run.finished else job)
            loaded = None if run.finished else job.load()  # before the folder is written
            run.begin(job.identity(), argv=argv, resolved=job.resolved())
            results = run.complete(lambda: _run_main(processes, loaded, job, run))
            ChunkFiles(folder).remove()
        return results


def _run_main(processes: Processes, engine: Engine | None, job: Job, run: RunFolder) -> list[Metric]:
    """Generate with all processes, and write the responses in the order of the prompts."""
    assert engine is not None
    chunks = ChunkFiles(run.path)
    done = {record["chunk"]: len(record["samples"]) for record in chunks.records()}
    if done:
        run.log(f"continuing: {sum(done.values()):,} of {job.total:,} responses exist")
    missing = processes.from_main(missing_chunks(job.ids, job.settings, done))
    _generate(engine, job, processes, run.path, missing, run.log)
    processes.wait()
    samples = gather(chunks.records(), len(job.prompts))
    if sum(map(len, samples)) < job.total:
        raise SimpoError(f"output_dir: {run.path} lacks what other processes wrote; name a folder that all share")
    texts = response_texts(job.tokenizer, job.prompts.prompts, samples)
    write_responses(run.path / FILE_NAME, job.prompts.prompts, texts, samples)
    if unfinished := sum(not sampled.finished for answers in samples for sampled in answers):
        limit = job.settings.max_new_tokens
        run.log(f"note: {unfinished:,} responses hit max_new_tokens {limit:,} before they ended (finished: false)")
    return [Metric(*one) for one in job.prompts.report.metrics()] + response_metrics(texts, samples)


def _generate(
    engine: Engine,
    job: Job,
    processes: Processes,
    folder: Path,
    missing: Sequence[tuple[int, Chunk]],
    log: Log | None = None,
) -> None:
    """Generate and store this process's share of the ``missing`` chunks; only the main process has a ``log``."""
    share = missing[processes.rank :: processes.size]
    file = ChunkFiles(folder).open(processes.rank)
    count = sum(len(chunk) for _, chunk in share)
    reporting: AbstractContextManager[Advance] = nullcontext(lambda count: None)
    if log is not None and processes.size == 1:
        reporting = progress("responses", job.total, job.total - count, log)
    elif log is not None:
        reporting = progress(f"responses of the first of {processes.size} processes", count, 0, log)
    try:
        with reporting as advance:
            images = None if job.reader is None else job.images_of
            for record in sample_chunks(engine, job.ids, job.settings, share, images):
                file.append([record])
                advance(len(record["samples"]))
    except torch.OutOfMemoryError as error:
        size = job.settings.chunk_size
        raise SimpoError(
            f"chunk_size: {size} answers at once do not fit into memory; set a smaller chunk_size and a new output_dir"
        ) from error


# ---- The processes that ``torchrun`` starts for one sampling run.


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run without training together."""

    # Its number; process 0 is the main one, which alone reads, logs and writes what concerns the whole run.
    rank: int = 0
    size: int = 1  # the number of processes
    group: dist.ProcessGroup | None = None  # the group in which they exchange objects, if there are several

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that were started together; each takes an accelerator of its own if there are any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.accelerator.is_available():
            if number >= (count := torch.accelerator.device_count()):
                raise SimpoError(
                    f"nproc_per_node: process {number} has no accelerator, there are {count}; start {count}"
                )
            torch.accelerator.set_device_index(number)
        if not dist.is_initialized():
            dist.init_process_group()
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # only small objects are exchanged
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The main process's ``value`` in every process; all have to call it."""
        with _peer_errors():
            return from_main(value, self.group)

    def wait(self) -> None:
        """Return when every process has called it."""
        if self.size > 1:
            with _peer_errors():
                dist.barrier(group=self.group)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the error of a group whose other process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        raise SimpoError("another process has ended and reported the reason; the same command continues") from error


# ---- Responses of a model behind an OpenAI-compatible server: texts only, each requested once.

_SEEDS = 1 << 31  # all servers accept seeds below this


def sample_from_server(
    endpoint: Endpoint,
    source: PromptArguments,
    settings: SamplingSettings,
    folder: Path,
    *,
    yes: bool = False,
    argv: Sequence[str] = (),
) -> Path:
    """Request answers to prompts and write ``responses.jsonl`` and ``results.json``.

    Every reply is stored when it is received, so the same call, after a failure or a kill, requests only what is
    missing. Rows have neither token ids nor log-probabilities; the server applies its own chat template. The seed of
    each answer is derived from ``settings``, the prompt and its number. With ``yes`` the user has agreed to the cost in
    advance. Returns the path of ``results.json``.

    Raises:
        SimpoError: an argument cannot be used, the user does not agree, or the server refuses.
        InterruptedRun: the user stopped the run; replies so far are kept.
    """
    settings = settings.resolved(context=None, chunk_size=1)
    with interruptible(), RunFolder(folder, command="sample") as run:
        endpoint.api_key()
        prompts, report = _read_sendable(source, settings)
        for line in [f"model: {endpoint.model} at {endpoint.base_url}", *report.lines()]:
            run.log(line)
        identity = {
            "model": endpoint.model,
            "engine": "server",
            "prompts": fingerprint([prompt.id for prompt in prompts]),
            **columns_identity(prompts),
            **dataclasses.asdict(settings),
        }
        requests = [_request(prompt, number, settings) for prompt in prompts for number in range(settings.n)]
        cache = folder / ".replies"
        if not run.finished:  # nothing is written before the user has agreed, not even an empty cache
            known = ChatClient(endpoint, cache if cache.exists() else None)
            confirm_cost(known.estimate(requests), yes=yes, log=run.log)
        run.begin(identity, argv=argv)

        def ask() -> list[Metric]:
            client = ChatClient(endpoint, cache, exact_temperature=True)
            replies = client.complete(requests, log=run.log)
            run.log(client.usage.line())
            return [Metric(*one) for one in report.metrics()] + _write(folder / FILE_NAME, prompts, replies, run.log)

        results = run.complete(ask)
        if cache.exists():
            remove_folder(cache)
    return results


def _read_sendable(source: PromptArguments, settings: SamplingSettings) -> tuple[list[PlainPrompt], DataReport]:
    """The prompts and their report; raises :class:`SimpoError` for anything that a server does not take."""
    if source.chat_template is not None:
        raise SimpoError("chat_template: a server applies its own; leave it out")
    if source.rendering != RenderSettings():
        raise SimpoError("chat_template_kwargs, system_message: a server renders prompts itself; leave them out")
    if settings.top_k:
        raise SimpoError("top_k: OpenAI-compatible servers have none; leave it out or use another engine")
    prompts, report = read_prompts(source.rows())
    if unsent := next((prompt for prompt in prompts if prompt.context.columns), None):
        name = next(iter(unsent.context.columns))
        raise SimpoError(f"{unsent.where}: engine server does not send {name}; use another engine, or leave it out")
    return prompts, report


def _request(prompt: PlainPrompt, number: int, settings: SamplingSettings) -> ChatRequest:
    content = prompt.content
    assert settings.max_new_tokens is not None
    return ChatRequest(
        [{"role": "user", "content": content}] if isinstance(content, str) else content,
        settings.max_new_tokens,
        settings.temperature,
        seed=None if settings.greedy else derived_seed(settings.seed, int(prompt.id, 16), number) % _SEEDS,
        top_p=None if settings.top_p == 1 or settings.greedy else settings.top_p,
    )


def _write(path: Path, prompts: Sequence[PlainPrompt], replies: Sequence[ChatReply], log: Log) -> list[Metric]:
    """Write one row per prompt, which all have equally many replies, and return the metrics of the replies."""
    if empty := sum(not reply.text.strip() for reply in replies):
        log(f"note: {empty:,} answers are empty: the server refused or filtered them, or gave only reasoning")
    n = len(replies) // len(prompts)
    groups = [replies[start : start + n] for start in range(0, len(replies), n)]
    rows: list[dict[str, Any]] = [
        {
            "id": prompt.id,
            "prompt": prompt.content,
            "responses": [reply.text for reply in group],
            "finished": [not reply.cut_off for reply in group],
            "where": prompt.where,
            "extra": prompt.extra,
        }
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    write_lines(path, rows)
    ended = sum(not reply.cut_off for reply in replies)
    return [
        *diversity_metrics("sample", [AnswerSet(row["responses"]) for row in rows]),
        Metric.of("sample/ended", proportion_interval(ended, len(replies))),
    ]
