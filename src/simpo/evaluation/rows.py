"""Rows of the benchmarks' files and of answer files, with error messages that name the row and the cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from simpo.data.messages import Message, read_messages
from simpo.data.prompts import prompt_id
from simpo.data.rows import BadRow, Row, rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.runs.atomic import write_text


def read_rows(path: str | Path) -> list[tuple[Row, str]]:
    """The rows of a file (``.jsonl[.gz]``, ``.json[.gz]``, ``.csv``, ``.parquet``) and where each comes from.

    Raises:
        SimpoError: there is no such file, or it cannot be read.
    """
    dataset = load_rows(str(Path(path).expanduser().resolve()), split="train")
    return rows_of(dataset[:], range(len(dataset)), Path(path).name)


def text_in(row: Row, key: str, where: str) -> str:
    """A cell that holds text.

    Raises:
        SimpoError: it is missing or something else.
    """
    return _cell(row, key, where, str, "text")


def list_in(row: Row, key: str, where: str) -> list[Any]:
    """A cell that holds a list.

    Raises:
        SimpoError: it is missing or something else.
    """
    return _cell(row, key, where, list, "a list")


def _cell(row: Row, key: str, where: str, kind: type, name: str) -> Any:
    if key not in row:
        raise SimpoError(f"{where}: no {key!r}; it has {', '.join(sorted(row)) or 'no columns'}")
    if not isinstance(row[key], kind):
        raise SimpoError(f"{where}: {key}: expected {name}, got {row[key]!r:.60}")
    return row[key]


def check_unique(keys: Iterable[tuple[Hashable, str]], what: str) -> None:
    """Look for a key that occurs twice.

    Args:
        keys: each with where it stands.
        what: the keys' name in the message.

    Raises:
        SimpoError: one does.
    """
    seen: dict[Hashable, str] = {}
    for key, where in keys:
        if key in seen:
            raise SimpoError(f"{where}: {what} {str(key)!r:.80} occurs twice, first at {seen[key]}")
        seen[key] = where


def check_same(expected: dict[Any, str], given: dict[Any, str], what: str, source: str) -> None:
    """Look whether answers are those to a benchmark's questions, no more and no fewer.

    Args:
        expected: the questions' keys, each with where it stands.
        given: the answers' keys, each with where it stands.
        what: the keys' name in the message.
        source: the answers' name in the message.

    Raises:
        SimpoError: an answer is to another question, or a question has no answer.
    """
    strange = [key for key in given if key not in expected]
    if strange:
        raise SimpoError(
            f"{given[strange[0]]}: {len(strange)} of {len(given)} answers are to other questions than the benchmark's; "
            f"the first has {what} {str(strange[0])!r:.80}"
        )
    missing = [key for key in expected if key not in given]
    if missing:
        raise SimpoError(
            f"{source}: {len(missing)} of {len(expected)} questions have no answer; the first is "
            f"{expected[missing[0]]} ({what} {str(missing[0])!r:.80})"
        )


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        SimpoError: it cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SimpoError(f"{path}: cannot be read: {error.strerror}") from error


def hub_file(repository: str, name: str, option: str) -> Path:
    """A file of a data set on the hub, from the cache if it is there.

    Raises:
        SimpoError: it cannot be had; names the option that takes a local one.
    """
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SimpoError(f"{repository}: {name} cannot be had from the hub ({reason}); give it by {option}") from error


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- Files of answers: what ``simpo sample`` writes, and AlpacaEval's ``model_outputs.json``.


Record = dict[str, Any]


def read_answer_file(path: Path) -> dict[str, Record]:
    """Prompts with their answers by the prompts' ids, in the order of the file.

    Rows are ``{id, prompt, responses}`` with whatever else ``simpo sample`` stores, or ``{instruction, output}``. An
    answer may be empty.

    Raises:
        SimpoError: the file cannot be read, a row is neither, or a prompt occurs twice.
    """
    found = [(_record(row, where), where) for row, where in read_rows(path)]
    check_unique(((record["id"], where) for record, where in found), "prompt")
    return {record["id"]: record for record, _ in found}


def _record(row: Row, where: str) -> Record:
    if "instruction" in row and "output" in row:
        instruction = text_in(row, "instruction", where)
        return {"id": prompt_id(instruction), "prompt": instruction, "responses": [text_in(row, "output", where)]}
    text_in(row, "id", where)
    responses = list_in(row, "responses", where)
    if not responses or not all(isinstance(response, str) for response in responses):
        raise SimpoError(f"{where}: responses: expected one or more texts")
    return row | {"prompt": _prompt(row.get("prompt"), where)}


def _prompt(value: object, where: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    try:
        return read_messages(value, "prompt")
    except BadRow as error:
        raise SimpoError(f"{where}: {error.reason}") from error
