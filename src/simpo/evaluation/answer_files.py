"""Files of answers: what ``simpo sample`` writes, and AlpacaEval's ``model_outputs.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo.data.messages import Message, read_messages
from simpo.data.prompts import prompt_id
from simpo.data.rows import BadRow, Row
from simpo.errors import SimpoError
from simpo.evaluation.rows import check_unique, list_in, read_rows, text_in

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
