"""Run folders as a report reads them: as far as a run has come, and with a note of whatever is missing or damaged."""

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
import yaml

from simpo.errors import SimpoError, third_party
from simpo.runs.files import json_safe
from simpo.runs.folder import RunRecord
from simpo.runs.log import mask_secrets
from simpo.runs.results import EXAMPLES, HELD_OUT, Metric, Stage, read_results
from simpo.runs.results import FILE_NAME as RESULTS

Row = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ROUNDING = 1e-3  # of a reward in bfloat16
_PROGRESS = re.compile(r"[\d,]+ of [\d,]+ ")  # how far something has come, and nothing to worry about
_LONGEST_GAP = timedelta(hours=1)  # between two lines of a log; a longer one is a pause, not work


@dataclass
class Run:
    """One run folder."""

    path: Path  # the folder
    record: RunRecord  # its `run.json`
    name: str
    metrics: list[Metric] = field(default_factory=list)  # of `results.json`; empty until the run has finished
    # The lines of `metrics.jsonl`, oldest first; numbers that were not finite are None.
    logs: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what could not be read, in sentences

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder."""
        try:
            record = RunRecord.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise SimpoError(f"{path}: not a run (no run.json); name the output_dir of a simpo command") from None
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
        """The run itself, or the part of it that trained the model in question."""
        name = {"demo": "simpo"}.get(self.record.command)
        if self.record.command == "loop":
            name = next((name for name in reversed(self.parts) if name.endswith("/model")), None)
        elif self.record.command == "sweep" and (best := self.metric("best/trial")) is not None:
            name = f"trials/{best.value:03.0f}"
        return self.parts.get(name or "", self)

    def lines(self, name: str, *, numbered: bool = False) -> list[Row]:
        """The rows of a JSON Lines file in the folder; damaged lines are left out and noted in :attr:`missing`.

        With ``numbered``, an empty row is in the place of a damaged line, so that the others keep their numbers.
        """
        path = self.path / name
        rows = list(map(_row, path.read_bytes().splitlines())) if path.exists() else []
        if damaged := rows.count({}):
            self.missing.append(f"{name}: {damaged:,} of {len(rows):,} lines are damaged and were left out.")
        return rows if numbered else [row for row in rows if row]

    def text(self, name: str) -> str:
        """The text of a file in the folder, without secrets; empty if there is none."""
        path = self.path / name
        return mask_secrets(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""

    def metric(self, name: str, stage: Stage | None = None) -> Metric | None:
        """The metric of ``results.json`` with this name that has a value."""
        found = (one for one in self.metrics if (one.name, one.stage) == (name, stage) and one.value is not None)
        return next(found, None)

    @cached_property
    def logged(self) -> dict[str, list[tuple[float, float]]]:
        """Step and value of everything that was logged, by name."""
        found: dict[str, list[tuple[float, float]]] = {}
        for log in self.logs:
            step = log.get("step") or 0
            for name, value in log.items():
                if name != "step" and isinstance(value, int | float):
                    found.setdefault(name, []).append((step, value))
        return found

    @property
    def not_finite(self) -> list[str]:
        """The names of what was logged as NaN or infinite."""
        logged = (item for log in self.logs for item in log.items())
        return sorted({name for name, value in logged if value is None and name not in ("step", "epoch")})

    def last(self, name: str) -> tuple[float, float] | None:
        """The last logged value of a metric, after its step."""
        return self.logged[name][-1] if name in self.logged else None

    # ---- Held-out rows.

    @cached_property
    def held_out(self) -> dict[Stage, list[Row]]:
        """The scores of every held-out row, none of a row whose line is damaged in either file.

        A stage that has not been scored, or not of all rows, has no rows.
        """
        found = {stage: self.lines(name, numbered=True) for stage, name in HELD_OUT.items()}
        if found["after"] and len(found["after"]) != len(found["before"]):
            self.missing.append("held_out_after.jsonl: not as many rows as held_out_before.jsonl; left out.")
            found["after"] = []
        whole = [all(rows) for rows in zip(*filter(None, found.values()), strict=True)]
        for stage, rows in found.items():
            found[stage] = [row if kept else {} for row, kept in zip(rows, whole, strict=False)]
        return found

    def column(self, stage: Stage, name: str) -> np.ndarray:
        """``[rows]`` values of a metric of the held-out rows that have scores, NaN where there is none."""
        values = (row.get(name) for row in self.held_out[stage] if row)
        return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the start model's rewards are 0, as with a reference; which of two is larger is then rounding."""
        margins = self.column("before", "rewards/margins")
        return not (np.abs(margins) > _ROUNDING).any()

    @cached_property
    def examples(self) -> list[Row]:
        """Held-out rows as text, with the token log-probabilities before and, as ``after``, after training."""
        after = {row.get("row"): row for row in self.lines(EXAMPLES["after"])}
        rows = self.lines(EXAMPLES["before"])
        for row in rows:
            later = after.get(row.get("row"), {}).get("responses", ())
            for response, one in zip(row.get("responses", ()), later, strict=False):
                response["after"] = one.get("logps")
        return rows

    # ---- What ran.

    @cached_property
    def settings(self) -> Row:
        """All keys of the recipe with their values; none if the file is absent or damaged."""
        found = None
        with suppress(SimpoError), third_party("recipe.resolved.yaml"):
            found = yaml.load(self.text("recipe.resolved.yaml"), _LOADER)  # noqa: S506 - a safe one
        return found if isinstance(found, dict) else {}

    @property
    def recipe(self) -> tuple[str, str]:
        """The command that reproduces the run, and the recipe that it was given."""
        text = self.text("recipe.yaml")
        first, _, rest = text.partition("\n")
        if first.startswith("# simpo"):
            return first.removeprefix("# "), rest.strip()
        return f"simpo {self.record.command}", text.strip()

    @cached_property
    def log(self) -> list[tuple[datetime, str]]:
        """The lines of ``log.txt`` with their times; what another program printed has none and is left out."""
        found = []
        for line in self.text("log.txt").splitlines():
            time, _, text = line.partition(" ")
            with suppress(ValueError):
                moment = datetime.fromisoformat(time)
                found += [(moment, text)] if moment.tzinfo else []
        return found

    @property
    def notices(self) -> list[str]:
        """The warnings of the log, each once, in their order."""
        found = dict.fromkeys(text.removeprefix("note: ") for _, text in self.log if text.startswith("note: "))
        return [notice for notice in found if not _PROGRESS.match(notice)]

    @property
    def error(self) -> str | None:
        """Why the last start ended, if it ended in an error or was interrupted."""
        last = self.log[-1][1] if self.log else ""
        return last.removeprefix("error: ") if last.startswith("error: ") and not self.finished else None

    @property
    def seconds(self) -> float:
        """Time that the run has worked: between the lines of its log, without pauses."""
        starts = set(map(datetime.fromisoformat, self.record.starts))
        end = {datetime.fromisoformat(self.record.finished)} if self.record.finished else set()
        gaps = pairwise(sorted({*starts, *end, *(time for time, _ in self.log)}))
        passed = (later - earlier for earlier, later in gaps if later not in starts)
        return sum(gap.total_seconds() for gap in passed if self.finished or gap < _LONGEST_GAP)

    @cached_property
    def parts(self) -> dict[str, Run]:
        """The runs in this folder's folders that trained a model, by their path from here."""
        runs = {}
        for path in sorted((*self.path.glob("*/run.json"), *self.path.glob("*/*/run.json")), key=in_order):
            try:
                part = Run.read(path.parent)
            except SimpoError as error:
                self.missing.append(str(error))
            else:
                part.name = path.parent.relative_to(self.path).as_posix()
                runs[part.name] = part
        return runs


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several folders; runs of the same name are called by their paths."""
    places = Counter(path.resolve() for path in paths)
    for path in paths:
        if places[path.resolve()] > 1:
            raise SimpoError(f"{path}: given twice; name every run once")
    runs = [Run.read(path) for path in paths]
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = run.name if names[run.name] == 1 else str(run.path)
    return runs


def in_order(path: Path) -> list[tuple[int, str]]:
    """A key that sorts paths by the numbers in them, so that round-10 comes after round-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _row(line: bytes) -> Row:
    """A row of JSON Lines, whose numbers that are not finite become None; empty if the line is damaged."""
    try:
        return {key: json_safe(value) for key, value in json.loads(line).items()}
    except (ValueError, AttributeError, RecursionError):
        return {}
