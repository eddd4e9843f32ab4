"""Responses in chunks: each is generated from a seed of its own, stored whole, or made again.

What a chunk holds does not depend on the chunks before it, on when the run was killed, or on which process generates
it, so a run that was continued, by whatever number of processes, has the same responses as one that never stopped.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from simpo.sampling.engine import Engine, Sampled
from simpo.sampling.settings import SamplingSettings, derived_seed

Chunk = tuple[int, ...]
Record = dict[str, Any]


def plan_chunks(lengths: Sequence[int], n: int, chunk_size: int) -> list[Chunk]:
    """Prompt numbers of every chunk, each prompt ``n`` times in all.

    Prompts of like length stand together, the longest first, so that little is padded and a chunk that does not fit
    the memory is met at once. All answers to a prompt are in one chunk if ``chunk_size`` is not below ``n``.

    Args:
        lengths: tokens of every prompt.
        n: answers to each.
        chunk_size: the most answers of a chunk.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    if n > chunk_size:
        sizes = [min(chunk_size, n - start) for start in range(0, n, chunk_size)]
        return [(number,) * size for number in order for size in sizes]
    prompts = chunk_size // n
    groups = [order[start : start + prompts] for start in range(0, len(order), prompts)]
    return [tuple(number for number in group for _ in range(n)) for group in groups]


def missing_chunks(
    prompts: Sequence[list[int]], settings: SamplingSettings, done: Collection[int] = ()
) -> list[tuple[int, Chunk]]:
    """Number and prompt numbers of every chunk that is not ``done``.

    Args:
        prompts: token ids of every prompt.
        settings: resolved ones.
        done: numbers of the chunks that exist already.
    """
    assert settings.chunk_size is not None
    plan = plan_chunks([len(ids) for ids in prompts], settings.n, settings.chunk_size)
    return [(number, chunk) for number, chunk in enumerate(plan) if number not in done]


def sample_chunks(
    engine: Engine, prompts: Sequence[list[int]], settings: SamplingSettings, chunks: Iterable[tuple[int, Chunk]]
) -> Iterator[Record]:
    """Generate ``chunks``; a record of each, as it is stored.

    Args:
        engine: generates.
        prompts: token ids of every prompt.
        settings: resolved ones.
        chunks: some of :func:`missing_chunks`.
    """
    for number, chunk in chunks:
        samples = engine.generate([prompts[prompt] for prompt in chunk], settings, derived_seed(settings.seed, number))
        yield {
            "chunk": number,
            "samples": [
                {"prompt": prompt, **sampled._asdict()} for prompt, sampled in zip(chunk, samples, strict=True)
            ],
        }


def gather(records: Iterable[Mapping[str, Any]], prompts: int) -> list[list[Sampled]]:
    """The responses to every prompt, in the order of the prompts, whatever the order of the chunks."""
    found: list[list[tuple[int, Sampled]]] = [[] for _ in range(prompts)]
    for record in records:
        for sample in record["samples"]:
            # Four bytes a token: a list of the numbers themselves would take ten times as much.
            ids: Any = array("I", sample["ids"])
            found[sample["prompt"]].append((record["chunk"], Sampled(ids, sample["finished"], sample["logp"])))
    return [[sampled for _, sampled in sorted(answers, key=lambda answer: answer[0])] for answers in found]
