"""Reads run folders for the report, including unfinished ones; missing or damaged files are noted rather than fatal."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from simpo.config.text import load_yaml
from simpo.errors import SimpoError, third_party
from simpo.runs.files import json_safe
from simpo.runs.folder import RunRecord
from simpo.runs.log import mask_secrets
from simpo.runs.results import EXAMPLES, HELD_OUT, Metric, Stage, read_results
from simpo.runs.results import FILE_NAME as RESULTS

Row = dict[str, Any]

_ROUNDING_ERROR = 1e-3  # of rewards in bfloat16
_PROGRESS = re.compile(r"[\d,]+ of [\d,]+ ")  # progress lines, which are not warnings
_LONGEST_GAP = timedelta(hours=1)  # longer gaps in the log of an unfinished run count as pauses


@dataclass
class Run:
    """One run folder."""

    path: Path  # the folder
    record: RunRecord  # the contents of `run.json`
    name: str
    metrics: list[Metric] = field(default_factory=list)  # from `results.json`; empty until the run has finished
    # The lines of `metrics.jsonl`, oldest first; non-finite numbers are None.
    logs: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # sentences about what could not be read

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder; raise :class:`SimpoError` if it is not one or its ``run.json`` is damaged."""
        try:
            record = RunRecord.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise SimpoError(f"{path}: not a run (no run.json); give the output_dir of a simpo command") from None
        except SimpoError as error:
            raise SimpoError(str(error).removeprefix("output_dir: ").replace("; use a new folder", "")) from error
        run = cls(path, record, path.resolve().name)
        try:
            run.metrics = read_results(path / RESULTS).metrics if (path / RESULTS).exists() else []
        except SimpoError as error:
            run.missing.append(str(error))
        run.logs = run.lines("metrics.jsonl")
        return run

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return self.record.status == "finished"

    @cached_property
    def trained(self) -> Run:
        """The nested run that trained the model (a loop's last round, a sweep's best trial), or this run itself."""
        name = {"demo": "simpo"}.get(self.record.command)
        if self.record.command == "loop":
            name = next((name for name in reversed(self.parts) if name.endswith("/model")), None)
        elif self.record.command == "sweep" and (best := self.metric("best/trial")) is not None:
            name = f"trials/{best.value:03.0f}"
        return self.parts.get(name or "", self)

    def lines(self, name: str, *, numbered: bool = False) -> list[Row]:
        """Read a JSON Lines file in the folder; damaged lines are left out and noted in :attr:`missing`.

        With ``numbered``, damaged lines become empty rows, so that the other rows keep their indices.
        """
        path = self.path / name
        rows = list(map(_parse_row, path.read_bytes().splitlines())) if path.exists() else []
        if damaged := rows.count({}):
            self.missing.append(f"{name}: {damaged:,} of {len(rows):,} lines are damaged and were left out.")
        return rows if numbered else [row for row in rows if row]

    def text(self, name: str) -> str:
        """Read a text file in the folder with secrets masked; empty if the file does not exist."""
        path = self.path / name
        return mask_secrets(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""

    def metric(self, name: str, stage: Stage | None = None) -> Metric | None:
        """Return the metric from ``results.json`` with this name and stage, or None if it has no value."""
        matches = (one for one in self.metrics if (one.name, one.stage) == (name, stage) and one.value is not None)
        return next(matches, None)

    @cached_property
    def logged(self) -> dict[str, list[tuple[float, float]]]:
        """The logged values of each metric, as (step, value) pairs."""
        series: dict[str, list[tuple[float, float]]] = {}
        for log in self.logs:
            step = log.get("step") or 0
            for name, value in log.items():
                if name != "step" and isinstance(value, int | float):
                    series.setdefault(name, []).append((step, value))
        return series

    @property
    def not_finite(self) -> list[str]:
        """The names of metrics that were logged as NaN or infinite."""
        logged = (item for log in self.logs for item in log.items())
        return sorted({name for name, value in logged if value is None and name not in ("step", "epoch")})

    def last(self, name: str) -> tuple[float, float] | None:
        """Return the step and value that were logged last for a metric."""
        return self.logged[name][-1] if name in self.logged else None

    # ---- Held-out rows.

    @cached_property
    def held_out(self) -> dict[Stage, list[Row]]:
        """The scores of the held-out rows at each stage; a row that is damaged in either file is empty in both.

        A stage has no rows if it was not scored, or not for all rows.
        """
        scores = {stage: self.lines(name, numbered=True) for stage, name in HELD_OUT.items()}
        if scores["after"] and len(scores["after"]) != len(scores["before"]):
            self.missing.append(
                "held_out_after.jsonl: left out because it does not have as many rows as held_out_before.jsonl."
            )
            scores["after"] = []
        intact = [all(rows) for rows in zip(*filter(None, scores.values()), strict=True)]
        for stage, rows in scores.items():
            scores[stage] = [row if usable else {} for row, usable in zip(rows, intact, strict=False)]
        return scores

    def column(self, stage: Stage, name: str) -> np.ndarray:
        """Return a metric of the scored held-out rows, ``[rows]``, with NaN where it is missing."""
        values = (row.get(name) for row in self.held_out[stage] if row)
        return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)

    @property
    def starts_at_zero(self) -> bool:
        """Whether all rewards are 0 before training, as with a reference model; their order is then rounding noise."""
        margins = self.column("before", "rewards/margins")
        return not (np.abs(margins) > _ROUNDING_ERROR).any()

    @cached_property
    def examples(self) -> list[Row]:
        """Held-out rows as text, with log-probabilities per token before (``logps``) and after (``after``) training."""
        after = {row.get("row"): row for row in self.lines(EXAMPLES["after"])}
        rows = self.lines(EXAMPLES["before"])
        for row in rows:
            later = after.get(row.get("row"), {}).get("responses", ())
            for response, one in zip(row.get("responses", ()), later, strict=False):
                response["after"] = one.get("logps")
        return rows

    # ---- Recipe and log.

    @cached_property
    def settings(self) -> Row:
        """All recipe keys with their values; empty if the file is missing or damaged."""
        document = None
        with suppress(SimpoError), third_party("recipe.resolved.yaml"):
            document = load_yaml(self.text("recipe.resolved.yaml"), "recipe.resolved.yaml")
        return document if isinstance(document, dict) else {}

    @property
    def recipe(self) -> tuple[str, str]:
        """The command that reproduces the run, and the recipe it was given."""
        text = self.text("recipe.yaml")
        first, _, rest = text.partition("\n")
        if first.startswith("# simpo"):
            return first.removeprefix("# "), rest.strip()
        return f"simpo {self.record.command}", text.strip()

    @cached_property
    def log(self) -> list[tuple[datetime, str]]:
        """The lines of ``log.txt`` with their times; lines without a time, from other programs, are left out."""
        lines = []
        for line in self.text("log.txt").splitlines():
            time, _, text = line.partition(" ")
            with suppress(ValueError):
                moment = datetime.fromisoformat(time)
                lines += [(moment, text)] if moment.tzinfo else []
        return lines

    @property
    def notices(self) -> list[str]:
        """The distinct warnings in the log, in order."""
        notices = dict.fromkeys(text.removeprefix("note: ") for _, text in self.log if text.startswith("note: "))
        return [notice for notice in notices if not _PROGRESS.match(notice)]

    @property
    def error(self) -> str | None:
        """The error or interruption that ended an unfinished run."""
        last = self.log[-1][1] if self.log else ""
        return last.removeprefix("error: ") if last.startswith("error: ") and not self.finished else None

    @property
    def seconds(self) -> float:
        """How long the run has worked, without pauses, from the times in its log."""
        starts = set(map(datetime.fromisoformat, self.record.starts))
        end = {datetime.fromisoformat(self.record.finished)} if self.record.finished else set()
        gaps = pairwise(sorted({*starts, *end, *(time for time, _ in self.log)}))
        worked = (later - earlier for earlier, later in gaps if later not in starts)
        return sum(gap.total_seconds() for gap in worked if self.finished or gap < _LONGEST_GAP)

    @cached_property
    def parts(self) -> dict[str, Run]:
        """The runs nested one or two levels below this folder, by relative path."""
        runs = {}
        for path in sorted((*self.path.glob("*/run.json"), *self.path.glob("*/*/run.json")), key=natural_key):
            try:
                part = Run.read(path.parent)
            except SimpoError as error:
                self.missing.append(str(error))
            else:
                part.name = path.parent.relative_to(self.path).as_posix()
                runs[part.name] = part
        return runs


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several run folders; runs with the same folder name are named by their paths."""
    counts = Counter(path.resolve() for path in paths)
    for path in paths:
        if counts[path.resolve()] > 1:
            raise SimpoError(f"{path}: given twice; give every run once")
    runs = [Run.read(path) for path in paths]
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = run.name if names[run.name] == 1 else str(run.path)
    return runs


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key for natural order: round-10 comes after round-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _parse_row(line: bytes) -> Row:
    """Parse a line of JSON, with non-finite numbers as None; return an empty row if the line is damaged."""
    try:
        return {key: json_safe(value) for key, value in json.loads(line).items()}
    except (ValueError, AttributeError, RecursionError):
        return {}
