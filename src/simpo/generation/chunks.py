"""Responses in chunks, each from a seed of its own: files, records, and several processes on one run.

What a chunk holds does not depend on the chunks before it, on when the run was killed, or on which process generates
it, so a run that was continued, by whatever number of processes, has the same responses as one that never stopped.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from simpo.data.prompts import Prompt
from simpo.errors import SimpoError
from simpo.generation.engine import Engine, ResponseText, Sampled
from simpo.generation.settings import SamplingSettings, derived_seed
from simpo.models.devices import from_main
from simpo.runs.atomic import staged_files
from simpo.runs.lines import JsonLines

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


# ---- The chunks of a run on the disk, each process's in a file of its own.


class ChunkFiles:
    """The files in a run folder; they are removed when the run is finished.

    Args:
        folder: the run's folder, which all processes share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def mine(self, rank: int) -> JsonLines:
        """What the process ``rank`` writes.

        Raises:
            SimpoError: as :class:`simpo.runs.lines.JsonLines`.
        """
        # A dot-name: what the manifest of a finished run does not list.
        return JsonLines(self._folder / f".chunks-{rank}.jsonl")

    def records(self) -> Iterator[Record]:
        """Every chunk that any process has stored, in any order.

        Opening a file drops a torn last line, so no process may be writing.

        Raises:
            SimpoError: a file is damaged.
        """
        seen: set[int] = set()
        for path in self._paths():
            for record in JsonLines(path):
                if record["chunk"] not in seen:  # what outlives a run that was killed may have made one again
                    seen.add(record["chunk"])
                    yield record

    def remove(self) -> None:
        """Remove them all."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(".chunks-*.jsonl"))


# ---- The processes that ``torchrun`` starts: they exchange a few objects, share work and wait for one
# another.


# One that has done its share waits for the slowest; those that end are noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among all that share a run.

    Attributes:
        rank: its number; 0 is the main one, which alone reads, says and writes what concerns the whole run.
        size: how many there are.
        group: through which they exchange objects, where they are several.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the main one."""
        return self.rank == 0

    def from_main(self, value: Any = None) -> Any:
        """The main process's ``value``, in every process; all have to call it.

        Raises:
            SimpoError: another process has ended.
        """
        with _peers():
            return from_main(value, self.group)

    def wait(self) -> None:
        """Return when every process has called it.

        Raises:
            SimpoError: another process has ended.
        """
        if self.size > 1:
            with _peers():
                dist.barrier(group=self.group)


def joined_processes() -> Processes:
    """Join those that were started together, each with an accelerator of its own where there are any.

    Raises:
        SimpoError: more processes than accelerators.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    _take_accelerator(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # nothing large is exchanged
    return Processes(dist.get_rank(), dist.get_world_size(), group)


def _take_accelerator(number: int) -> None:
    if not torch.accelerator.is_available():
        return
    if number >= (count := torch.accelerator.device_count()):
        raise SimpoError(f"nproc_per_node: process {number} has no accelerator, there are {count}; start {count}")
    torch.accelerator.set_device_index(number)


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SimpoError(
            "another process has ended; its own message says why, and the same command continues"
        ) from error


# ---- Responses as rows of a file, with all that is known of them.


def response_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sampled]]
) -> list[list[str]]:
    """The responses to every prompt as texts."""
    decoder = ResponseText(tokenizer)
    return [
        [decoder.decode(prompt.ids, sampled.ids) for sampled in answers]
        for prompt, answers in zip(prompts, samples, strict=True)
    ]


def write_responses(
    path: Path, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], samples: Sequence[Sequence[Sampled]]
) -> None:
    """Write a JSON line a prompt; the file is whole or absent.

    Args:
        path: the file.
        prompts: what was asked.
        texts: the responses to every prompt.
        samples: the same as they were sampled.

    Raises:
        SimpoError: the disk is full or the folder cannot be written.
    """
    rows = (_row(*parts) for parts in zip(prompts, texts, samples, strict=True))
    with (
        staged_files(path.parent) as staged,
        (staged / path.name).open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(prompt: Prompt, texts: Sequence[str], answers: Sequence[Sampled]) -> Mapping[str, Any]:
    return {
        "id": prompt.id,
        "prompt": prompt.content,
        **prompt.context.columns,
        "responses": list(texts),
        "response_ids": [list(sampled.ids) for sampled in answers],
        "finished": [sampled.finished for sampled in answers],
        "logps": [sampled.logp for sampled in answers],
        "where": prompt.where,
        "extra": prompt.extra,
    }


def read_samples(rows: Sequence[Mapping[str, Any]]) -> list[list[Sampled]]:
    """The responses to every prompt as they were sampled, from the rows of such a file."""
    return [
        [Sampled(*parts) for parts in zip(row["response_ids"], row["finished"], row["logps"], strict=True)]
        for row in rows
    ]
