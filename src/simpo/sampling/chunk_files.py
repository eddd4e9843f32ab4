"""The chunks of a run on the disk, each process's in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpo.runs.lines import JsonLines
from simpo.sampling.chunks import Record


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
