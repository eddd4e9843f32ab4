"""Responses in chunks, each with its own seed, so that a run may be interrupted and shared by several processes.

A chunk does not depend on the chunks before it, on when the run was killed, or on which process generates it.
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
    """The prompts of every chunk, as indices; each prompt occurs ``n`` times in all.

    Prompts of similar length share a chunk, the longest first, so that there is little padding and a chunk that does
    not fit into memory fails at once. All answers to a prompt are in one chunk if ``chunk_size`` is at least ``n``.

    ``lengths`` are the tokens of every prompt.
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
    """Number and prompts of every chunk that is not ``done``.

    ``settings`` are resolved; ``done`` are the numbers of the chunks that exist.
    """
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
    """Generate some of the :func:`missing_chunks`; yields the record of each, as it is stored.

    ``images`` returns the images of the prompt with an index; None if no prompt has any.
    """
    for number, chunk in chunks:
        ids, seed = [prompts[index] for index in chunk], derived_seed(settings.seed, number)
        shown = {} if images is None else {"images": [images(index) for index in chunk]}
        samples = engine.generate(ids, settings, seed, **shown)
        yield {
            "chunk": number,
            "samples": [{"prompt": index, **sampled._asdict()} for index, sampled in zip(chunk, samples, strict=True)],
        }


def gather(records: Iterable[Mapping[str, Any]], prompts: int) -> list[list[Sampled]]:
    """The responses to every prompt, in the order of the prompts, whatever the order of the chunks."""
    found: list[list[tuple[int, Sampled]]] = [[] for _ in range(prompts)]
    for record in records:
        for sample in record["samples"]:
            ids: Any = array("I", sample["ids"])  # four bytes per token; a list of integers takes ten times as many
            found[sample["prompt"]].append((record["chunk"], Sampled(ids, sample["finished"], sample["logp"])))
    return [[sampled for _, sampled in sorted(answers, key=lambda answer: answer[0])] for answers in found]


class ChunkFiles:
    """The chunks in a run folder that all processes share, one file per process; removed when the run is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, rank: int) -> JsonLines:
        """The file that the process ``rank`` writes."""
        # The manifest of a finished run does not list names that start with a dot.
        return JsonLines(self._folder / f".chunks-{rank}.jsonl", checked=True)

    def records(self) -> Iterator[Record]:
        """Every chunk that any process has stored, in any order.

        No process may be writing, because opening a file drops an incomplete last line.
        """
        seen: set[int] = set()
        for path in sorted(self._folder.glob(".chunks-*.jsonl")):
            for record in JsonLines(path, checked=True):
                if record["chunk"] not in seen:  # a process that outlived a killed run may have repeated a chunk
                    seen.add(record["chunk"])
                    yield record

    def remove(self) -> None:
        """Remove the files."""
        for path in self._folder.glob(".chunks-*.jsonl"):
            path.unlink()
