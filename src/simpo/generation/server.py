"""Responses of a model behind an OpenAI-compatible server: texts only, each requested once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo.client import ChatClient, ChatReply, ChatRequest, Endpoint, confirm_cost
from simpo.data.inspection import AnswerSet, diversity_metrics
from simpo.data.prompts import PlainPrompt, columns_identity, read_prompts
from simpo.data.rows import DataReport
from simpo.data.settings import RenderSettings
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME, PromptArguments
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.runs.atomic import remove_folder
from simpo.runs.folder import RunFolder
from simpo.runs.lines import write_lines
from simpo.runs.log import Log
from simpo.runs.results import Metric, fingerprint
from simpo.runs.signals import interruptible
from simpo.statistics import proportion_interval

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
            **{"model": endpoint.model, "engine": "server", "prompts": fingerprint([prompt.id for prompt in prompts])},
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
