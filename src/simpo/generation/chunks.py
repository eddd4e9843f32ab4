"""Splits sampling into chunks with seeds of their own, so that runs can be resumed and spread over processes.

A chunk's responses do not depend on earlier chunks, on when the run was killed, or on which process generates them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.generation.engine import Engine, Images, Sampled
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.runs.files import JsonLines

Chunk = tuple[int, ...]  # indices of prompts
Record = dict[str, Any]


def plan_chunks(lengths: Sequence[int], n: int, chunk_size: int) -> list[Chunk]:
    """Split prompts into chunks of prompt indices; each index occurs ``n`` times in total.

    Chunks hold prompts of similar length, the longest first: this keeps padding low, and a chunk that does not fit into
    memory fails right away. If ``chunk_size`` is at least ``n``, all answers to a prompt are in the same chunk.

    ``lengths`` are the prompts' lengths in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if n > chunk_size:
        sizes = [min(chunk_size, n - start) for start in range(0, n, chunk_size)]
        return [(index,) * size for index in order for size in sizes]
    prompts = chunk_size // n
    groups = [order[start : start + prompts] for start in range(0, len(order), prompts)]
    return [tuple(index for index in group for _ in range(n)) for group in groups]


def missing_chunks(
    prompts: Sequence[list[int]], settings: SamplingSettings, done: Collection[int] = ()
) -> list[tuple[int, Chunk]]:
    """Return the number and the prompts of every chunk whose number is not in ``done``; ``settings`` are resolved."""
    assert settings.chunk_size is not None
    plan = plan_chunks([len(ids) for ids in prompts], settings.n, settings.chunk_size)
    return [(number, chunk) for number, chunk in enumerate(plan) if number not in done]


def sample_chunks(
    engine: Engine,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    chunks: Iterable[tuple[int, Chunk]],
    images: Callable[[int], Images] | None = None,
) -> Iterator[Record]:
    """Generate the given :func:`missing_chunks`, yielding one storable record per chunk.

    ``images`` maps a prompt's index to its images; None if no prompt has images.
    """
    for number, chunk in chunks:
        ids, seed = [prompts[index] for index in chunk], derived_seed(settings.seed, number)
        with_images = {} if images is None else {"images": [images(index) for index in chunk]}
        samples = engine.generate(ids, settings, seed, **with_images)
        yield {
            "chunk": number,
            "samples": [{"prompt": index, **sampled._asdict()} for index, sampled in zip(chunk, samples, strict=True)],
        }


def gather(records: Iterable[Mapping[str, Any]], prompts: int) -> list[list[Sampled]]:
    """Collect the responses to each of the ``prompts``, in prompt order, from chunks in any order."""
    responses: list[list[tuple[int, Sampled]]] = [[] for _ in range(prompts)]
    for record in records:
        for sample in record["samples"]:
            ids: Any = array("I", sample["ids"])  # four bytes per token, a tenth of what a list would take
            responses[sample["prompt"]].append((record["chunk"], Sampled(ids, sample["finished"], sample["logp"])))
    return [[sampled for _, sampled in sorted(answers, key=lambda answer: answer[0])] for answers in responses]


class ChunkFiles:
    """Chunks stored in a shared run folder, one file per process, until the run is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, rank: int) -> JsonLines:
        """Open the file for process ``rank``."""
        # The leading dot keeps it out of the manifest of a finished run.
        return JsonLines(self._folder / f".chunks-{rank}.jsonl", checked=True)

    def records(self) -> Iterator[Record]:
        """Yield every stored chunk once, in any order.

        No process may be writing: opening a file drops an incomplete last line.
        """
        seen: set[int] = set()
        for path in sorted(self._folder.glob(".chunks-*.jsonl")):
            for record in JsonLines(path, checked=True):
                if record["chunk"] not in seen:  # a process that outlived a killed run may store a chunk again
                    seen.add(record["chunk"])
                    yield record

    def remove(self) -> None:
        """Remove the files."""
        for path in self._folder.glob(".chunks-*.jsonl"):
            path.unlink()
