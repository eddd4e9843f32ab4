"""``simpo sample``: samples a model's responses to prompts; can be killed and resumed at any time."""

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

# How long a finished process waits for the slowest one. A process that dies is noticed at once.
_BARRIER_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class PromptArguments:
    """Where the prompts come from and how they are rendered."""

    prompts: str = field(metadata={"help": "Prompts: a file, folder or hub dataset id.", "positional": "PROMPTS"})
    split: str = setting("train", "Dataset split to read prompts from.")
    chat_template: str | None = setting(
        None, "Chat template, a file with one, or none for raw text (default: the tokenizer's own)."
    )
    column_mapping: Mapping[str, str] | None = setting(None, 'Columns to rename, e.g. {"instruction": "prompt"}.')
    image_folder: str | None = setting(
        None, "Folder that relative image paths start from (default: the working directory)."
    )
    rendering: RenderSettings = field(default_factory=RenderSettings)

    def rows(self) -> Dataset:
        """Load the rows that contain the prompts."""
        return load_rows(self.prompts, split=self.split, column_mapping=self.column_mapping)


@dataclass(frozen=True)
class Job:
    """Everything that determines the responses, read and validated before the weights are loaded."""

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
        """Read and validate everything but the weights, and log a summary.

        ``max_model_len`` in vLLM's ``engine_args`` limits the context. Prompts with images are bad rows unless
        ``images`` is true and the engine is transformers.
        """
        tokenizer = load_tokenizer(model, chat_template=source.chat_template)
        checkpoint = Checkpoint.read(model)
        if engine == "vllm":
            check_model_files(checkpoint.arguments)
        log(f"model: {model.model_name_or_path} ({checkpoint.arguments.dtype} on {device()}, {engine})")
        limits = (checkpoint.context, engine_args.get("max_model_len"))
        context = min((limit for limit in limits if isinstance(limit, int)), default=None)
        in_memory = 32 if device().type == "cpu" else 64
        settings = settings.resolved(context=context, chunk_size=1024 if engine == "vllm" else in_memory)
        log("sampling: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()))
        longest = None
        if context is not None:
            assert settings.max_new_tokens is not None
            longest = context - settings.max_new_tokens
            log(f"the model's context of {context:,} tokens leaves {longest:,} for the prompt (max_prompt_length)")
        rows, processing = source.rows(), tokenizer
        if images and engine == "transformers" and has_images(rows):
            processing = load_processor(model, chat_template=source.chat_template)
        prompts = prepare_prompts(
            rows, processing, max_prompt_length=longest, rendering=source.rendering, image_folder=source.image_folder
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
        """Token ids of the prompts."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def total(self) -> int:
        """Total number of responses."""
        return len(self.prompts) * self.settings.n

    def identity(self) -> dict[str, Any]:
        """Return everything the responses depend on; see :meth:`simpo.runs.folder.RunFolder.begin`."""
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
        """Return all settings with defaults filled in."""
        resolved: dict[str, Any] = {"engine": self.engine, "engine_args": self.engine_args}
        for part in (self.checkpoint.arguments, self.source, self.settings):
            resolved |= dataclasses.asdict(part)
        return resolved

    def load(self) -> Engine:
        """Load the model and return its engine."""
        if self.engine == "vllm":
            return VllmEngine(self.checkpoint.arguments, self.stop_ids, self.engine_args)
        model = self.checkpoint.load()
        first = next((index for index, prompt in enumerate(self.prompts) if prompt.images), None)
        if self.reader is not None and first is not None:
            example = self.reader.example(self.prompts.prompts[first].images[0])
            check_image_inputs(causal_lm(model), self.images_of(first)[0], example)
        return TransformersEngine(model, self.tokenizer)

    def images_of(self, index: int) -> Images:
        """Return the images of the prompt at ``index``."""
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
    """Sample responses to prompts and write ``responses.jsonl`` and ``results.json``.

    Repeating the call resumes an interrupted or killed run and produces the same bytes; a finished run is left alone.
    Under ``torchrun`` the processes split the chunks between them, again with the same bytes. For ``images``, see
    :meth:`Job.prepare`. Returns the path of ``results.json``, or None in processes other than the main one.

    Raises:
        SimpoError: an argument is invalid, or the disk or memory is full.
        InterruptedRun: the user stopped the run; complete chunks are kept.
    """
    with interruptible():
        processes = Processes.join()
        if not processes.main:
            logging.getLogger("simpo").setLevel(logging.ERROR)  # the main process logs on behalf of all
            job = processes.from_main()
            if job is not None:
                loaded = job.load()
                _generate(loaded, job, processes, folder, processes.from_main())
                processes.wait()
            return None
        if processes.size > 1 and engine == "vllm":
            raise SimpoError("engine: vllm uses all GPUs from one process; start it without torchrun")
        with RunFolder(folder, command="sample") as run:
            job = Job.prepare(model, prompts, settings, engine, run.log, engine_args, images=images)
            processes.from_main(None if run.finished else job)
            loaded = None if run.finished else job.load()  # before the folder is written
            run.begin(job.identity(), argv=argv, resolved=job.resolved())
            results = run.complete(lambda: _run_main(processes, loaded, job, run))
            ChunkFiles(folder).remove()
        return results


def _run_main(processes: Processes, engine: Engine | None, job: Job, run: RunFolder) -> list[Metric]:
    """Generate on all processes, and write the responses in prompt order."""
    assert engine is not None
    chunks = ChunkFiles(run.path)
    done = {record["chunk"]: len(record["samples"]) for record in chunks.records()}
    if done:
        run.log(f"continuing: {sum(done.values()):,} of {job.total:,} responses are done")
    missing = processes.from_main(missing_chunks(job.ids, job.settings, done))
    _generate(engine, job, processes, run.path, missing, run.log)
    processes.wait()
    samples = gather(chunks.records(), len(job.prompts))
    if sum(map(len, samples)) < job.total:
        raise SimpoError(f"output_dir: {run.path} is missing other processes' chunks; use a shared folder")
    texts = response_texts(job.tokenizer, job.prompts.prompts, samples)
    write_responses(run.path / FILE_NAME, job.prompts.prompts, texts, samples)
    if unfinished := sum(not sampled.finished for answers in samples for sampled in answers):
        limit = job.settings.max_new_tokens
        run.log(f"note: {unfinished:,} responses reached max_new_tokens {limit:,} before they ended (finished: false)")
    return [Metric(*metric) for metric in job.prompts.report.metrics()] + response_metrics(texts, samples)


def _generate(
    engine: Engine,
    job: Job,
    processes: Processes,
    folder: Path,
    missing: Sequence[tuple[int, Chunk]],
    log: Log | None = None,
) -> None:
    """Generate and store this process's share of the ``missing`` chunks; only the main process passes a ``log``."""
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
            f"chunk_size: {size} answers at a time do not fit into memory; set a lower chunk_size and a new output_dir"
        ) from error


# ---- Processes started by ``torchrun`` for one sampling run.


@dataclass(frozen=True)
class Processes:
    """The processes that share a sampling run, as seen from this one."""

    rank: int = 0  # process 0 is the main one; only it reads, logs and writes for the run as a whole
    size: int = 1
    group: dist.ProcessGroup | None = None  # for exchanging objects; None if there is only one process

    @classmethod
    def join(cls) -> Processes:
        """Join the processes of a ``torchrun`` launch; each takes its own accelerator if there are any."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.accelerator.is_available():
            if local_rank >= (count := torch.accelerator.device_count()):
                raise SimpoError(
                    f"nproc_per_node: no accelerator for process {local_rank}; this machine has {count}, so use {count}"
                )
            torch.accelerator.set_device_index(local_rank)
        if not dist.is_initialized():
            dist.init_process_group()
        group = dist.new_group(backend="gloo", timeout=_BARRIER_TIMEOUT)  # for small objects only
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """Return the main process's ``value`` on every process. Every process must call this."""
        with _peer_errors():
            return from_main(value, self.group)

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            with _peer_errors():
                dist.barrier(group=self.group)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the communication error caused by another process's exit into one clear line."""
    try:
        yield
    except RuntimeError as error:
        raise SimpoError("another process failed and reported the reason; run the same command to continue") from error


# ---- Sampling from an OpenAI-compatible server: texts only, with one request per response.

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
    """Request responses to prompts and write ``responses.jsonl`` and ``results.json``.

    Every reply is stored as soon as it arrives, so after a failure or a kill the same call requests only what is
    missing. Rows have neither token ids nor log-probabilities, and the server applies its own chat template. Each
    response's seed is derived from the seed in ``settings``, the prompt and the response's number. ``yes`` skips the
    question about the cost. Returns the path of ``results.json``.

    Raises:
        SimpoError: an argument is invalid, the user declines the cost, or the server refuses.
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
        if not run.finished:  # write nothing before the user has agreed, not even an empty cache
            estimating = ChatClient(endpoint, cache if cache.exists() else None)
            confirm_cost(estimating.estimate(requests), yes=yes, log=run.log)
        run.begin(identity, argv=argv)

        def request_all() -> list[Metric]:
            client = ChatClient(endpoint, cache, exact_temperature=True)
            replies = client.complete(requests, log=run.log)
            run.log(client.usage.line())
            metrics = _write_replies(folder / FILE_NAME, prompts, replies, run.log)
            return [Metric(*metric) for metric in report.metrics()] + metrics

        results = run.complete(request_all)
        if cache.exists():
            remove_folder(cache)
    return results


def _read_sendable(source: PromptArguments, settings: SamplingSettings) -> tuple[list[PlainPrompt], DataReport]:
    """Read the prompts and their report; raises :class:`SimpoError` for anything a server cannot handle."""
    if source.chat_template is not None:
        raise SimpoError("chat_template: the server applies its own; remove it")
    if source.rendering != RenderSettings():
        raise SimpoError("chat_template_kwargs, system_message: the server renders prompts itself; remove them")
    if settings.top_k:
        raise SimpoError("top_k: is not supported by OpenAI-compatible servers; remove it or use another engine")
    prompts, report = read_prompts(source.rows())
    if unsent := next((prompt for prompt in prompts if prompt.context.columns), None):
        name = next(iter(unsent.context.columns))
        raise SimpoError(f"{unsent.where}: {name}: is not supported by engine server; remove it or use another engine")
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


def _write_replies(path: Path, prompts: Sequence[PlainPrompt], replies: Sequence[ChatReply], log: Log) -> list[Metric]:
    """Write one row per prompt, each with the same number of replies, and return the metrics."""
    if empty := sum(not reply.text.strip() for reply in replies):
        log(f"note: {empty:,} answers are empty: the server refused or filtered them, or returned only reasoning")
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
