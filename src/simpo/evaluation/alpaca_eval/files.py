"""AlpacaEval's files: outputs of a model, annotations, and the published baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simpo.data.formats import is_number
from simpo.data.rows import Row
from simpo.errors import SimpoError
from simpo.evaluation.alpaca_eval.win_rate import Baselines
from simpo.evaluation.rows import check_same, check_unique, file_digest, hub_file, read_rows, text_in
from simpo.runs.atomic import write_text

REPOSITORY = "tatsu-lab/alpaca_eval"


_REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"


@dataclass(frozen=True)
class Output:
    """A model's answer to an instruction, as ``model_outputs.json`` has it, and where it stands."""

    instruction: str
    output: str
    generator: str
    dataset: str | None
    where: str


@dataclass(frozen=True)
class Match:
    """The baseline's answer (1) and the model's (2) to an instruction."""

    instruction: str
    dataset: str | None
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str


@dataclass(frozen=True)
class Annotation:
    """A match and the judge's verdict, as ``annotations.json`` has it.

    Attributes:
        match: what was judged.
        annotator: who judged.
        preference: in [1, 2], 2 where the model is preferred; NaN where there is none.
        raw_completion: what the judge wrote; None if it was not asked.
    """

    match: Match
    annotator: str
    preference: float
    raw_completion: str | None = None


def read_outputs(path: str | Path) -> list[Output]:
    """Outputs ``{instruction, output, generator, dataset}``; the last two may be missing.

    Raises:
        SimpoError: the file cannot be read, or an instruction occurs twice.
    """
    outputs = [_output(row, where) for row, where in read_rows(path)]
    check_unique(((output.instruction, output.where) for output in outputs), "instruction")
    return outputs


def _output(row: Row, where: str) -> Output:
    return Output(
        text_in(row, "instruction", where),
        text_in(row, "output", where),
        str(row.get("generator") or "model"),
        row.get("dataset"),
        where,
    )


def reference_file() -> Path:
    """The instructions and the baseline's outputs, from the hub.

    Raises:
        SimpoError: they cannot be had.
    """
    return hub_file(REPOSITORY, _REFERENCE_FILE, "--reference_outputs")


def match_outputs(reference: Sequence[Output], outputs: Sequence[Output], source: str) -> list[Match]:
    """Pair a model's outputs with the baseline's, in the order of the baseline's.

    Raises:
        SimpoError: they are not outputs for the same instructions.
    """
    found = {output.instruction: output for output in outputs}
    expected = {output.instruction: output.where for output in reference}
    given = {output.instruction: output.where for output in outputs}
    check_same(expected, given, "instruction", source)
    return [
        Match(
            ours.instruction,
            ours.dataset,
            ours.output,
            ours.generator,
            found[ours.instruction].output,
            found[ours.instruction].generator,
        )
        for ours in reference
    ]


def write_outputs(path: Path, matches: Sequence[Match]) -> None:
    """Write the model's side as ``model_outputs.json``."""
    rows = [
        {
            "dataset": match.dataset,
            "instruction": match.instruction,
            "output": match.output_2,
            "generator": match.generator_2,
        }
        for match in matches
    ]
    _write(path, rows)


def read_annotations(path: str | Path) -> list[Annotation]:
    """Annotations in their order; a preference of 0, which older versions write for a draw, is 1.5.

    Raises:
        SimpoError: the file cannot be read, an instruction occurs twice, or a preference is out of bounds.
    """
    rows = read_rows(path)
    check_unique(((text_in(row, "instruction", where), where) for row, where in rows), "instruction")
    return [_annotation(row, where) for row, where in rows]


def _annotation(row: Row, where: str) -> Annotation:
    match = Match(
        text_in(row, "instruction", where),
        row.get("dataset"),
        text_in(row, "output_1", where),
        str(row.get("generator_1") or "baseline"),
        text_in(row, "output_2", where),
        str(row.get("generator_2") or row.get("generator") or "model"),
    )
    return Annotation(match, str(row.get("annotator") or "unknown"), _preference(row, where))


def _preference(row: Row, where: str) -> float:
    value = row.get("preference")
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        raise SimpoError(f"{where}: preference: expected a number from 1 to 2, got {value!r:.60}")
    return float(value) or 1.5


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write ``annotations.json``; a preference that is missing is null."""
    rows = [
        {
            **vars(annotation.match),
            "annotator": annotation.annotator,
            "preference": None if np.isnan(annotation.preference) else annotation.preference,
            "raw_completion": annotation.raw_completion,
        }
        for annotation in annotations
    ]
    _write(path, rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


# ---- What the benchmark has measured once: difficulties and gamed baselines, from files.


_GAMED_FILE = "df_gamed.csv"


@dataclass(frozen=True)
class LengthControl:
    """Where the difficulties and the gamed baselines come from; None is the hub."""

    gamed: str | None = None
    difficulty: str | None = None

    def read(self, count: int, log: Callable[[str], None]) -> Baselines | None:
        """What the length-controlled win rate needs; None, and a line that says so, where the hub has to give it and
        cannot.

        Args:
            count: of the instructions.
            log: called with that line, and one where there are difficulties of more instructions.

        Raises:
            SimpoError: a file that was given cannot be used, or has difficulties of fewer instructions.
        """
        try:
            found = read_baselines(self.gamed, self.difficulty)
        except SimpoError as error:
            if self.gamed is not None:
                raise
            log(f"note: no length-controlled win rate: {error}; --annotations computes it later")
            return None
        if count > len(found.difficulties):
            raise SimpoError(
                f"{count} instructions, but difficulties of {len(found.difficulties)}: give the benchmark's"
            )
        if count < len(found.difficulties):
            log(
                f"note: difficulties of {len(found.difficulties)} instructions are looked up by position: the "
                f"length-controlled win rate is right only if the {count} are the benchmark's first, in its order"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """What determines the correction of given preferences; the hub's files are None."""
        return {
            name: None if path is None else file_digest(path)
            for name, path in (("gamed", self.gamed), ("difficulty", self.difficulty))
        }


def read_baselines(gamed: str | Path | None, difficulty: str | Path | None) -> Baselines:
    """The gamed baselines and the difficulties, from the hub where they are not given.

    The gamed file's columns are ``index``, ``std_delta_len``, ``instruction_difficulty`` and a preference in [0, 1],
    whose name starts with ``preference``. It has the difficulties too, which a file of ``index`` and
    ``instruction_difficulty`` may replace.

    Raises:
        SimpoError: a file cannot be read, or lacks a column.
    """
    path = hub_file(REPOSITORY, _GAMED_FILE, "--gamed") if gamed is None else gamed
    rows = read_rows(path)
    numbers = [
        [_number(row, key, where) for key in ("std_delta_len", "instruction_difficulty", "preference")]
        for row, where in rows
    ]
    length, difficulties, y = np.array(numbers).T
    if not ((y >= 0) & (y <= 1)).all():
        raise SimpoError(f"{rows[int(((y < 0) | (y > 1)).argmax())][1]}: preference: expected a number from 0 to 1")
    own = rows if difficulty is None else read_rows(difficulty)
    return Baselines(_by_index(own), np.column_stack([np.tanh(length), difficulties, np.zeros(len(y))]), y)


def _by_index(rows: Sequence[tuple[Row, str]]) -> np.ndarray:
    found = {int(_number(row, "index", where)): _number(row, "instruction_difficulty", where) for row, where in rows}
    if sorted(found) != list(range(len(found))):
        raise SimpoError(f"{rows[0][1]}: index: the {len(found)} instructions are not numbered from 0 on")
    return np.array([found[index] for index in range(len(found))])


def _number(row: Row, name: str, where: str) -> float:
    key = next((key for key in row if key == name or (name == "preference" and key.startswith(name))), None)
    if key is None or not is_number(_as_number(row[key])):
        raise SimpoError(f"{where}: no number {name!r}; it has {', '.join(sorted(row))}")
    return float(row[key])


def _as_number(cell: object) -> object:
    """A cell, the number that it holds if it is text: cells of CSV files are."""
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return None
