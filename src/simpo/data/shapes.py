"""Converts rows of other tools' datasets to the columns that this package reads.

:func:`canonical` renames and restructures columns. The result has ``prompt``, ``chosen`` and ``rejected``,
``responses`` and ``scores``, ``completion`` or ``messages``, along with all columns that were not needed. An ambiguous
row is a bad row.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset

from simpo.data.messages import is_transcript, is_transcript_prompt, kind_of
from simpo.data.rows import BadRow, Row, Tie, rows_of, undecoded
from simpo.errors import SimpoError, third_party

FOREIGN_SHAPES = (
    "question, instruction (+ input), query or input as prompt; response, output or answer as completion; "
    "{input, preferred_output, non_preferred_output} (OpenAI); {conversations} of from/value messages (ShareGPT), also "
    "with chosen and rejected; {instruction, completions} with scores (UltraFeedback); {prompt, answers} with ranks "
    "(Nectar); {context, response1, response2, overall_preference} (HelpSteer); "
    "{prompt, response_0, response_1, better_response_id} (SafeRLHF); "
    "{conversation_a, conversation_b, winner} (Arena); "
    "rename other columns with column_mapping"
)
# Columns that hold text or messages, and columns that never hold plain text.
_TEXT_COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "question", "instruction", "query", "input", "context",
    "response", "output", "answer", "response1", "response2", "response_0", "response_1", "response_2",
)  # fmt: skip
_STRUCTURED_COLUMNS = (
    "messages", "conversations", "conversation", "responses", "scores", "completions", "answers",
    "preferred_output", "non_preferred_output", "conversation_a", "conversation_b",
)  # fmt: skip
_OPTION_COLUMNS = ("tools", "chat_template_kwargs")
_NUMBER_COLUMNS = (
    "weight", "label_probability", "margin", "chosen_score", "rejected_score", "score_chosen", "score_rejected",
)  # fmt: skip
_NUMBER = re.compile(r"\s*-?\d+(\.\d+)?([eE][-+]?\d+)?\s*")
_QUESTION_COLUMNS = ("question", "instruction", "query")
# Columns that may hold the question; if several have text, those that are not read are reported.
ASKED_COLUMNS = ("prompt", *_QUESTION_COLUMNS, "input", "messages", "conversations", "conversation")
_ANSWER_COLUMNS = ("response", "output", "answer")
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
# Text that may be needed to answer a question, but that there is no standard way to combine with it.
_CONTEXT_COLUMNS = ("context", "history", "documents")
_RATING_COLUMNS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system", "function_call": "assistant",
}  # fmt: skip
_RESPONSE_KEYS = ("response", "answer", "text", "content")
_SCORE_KEYS = ("overall_score", "score", "rating", "rank")
# Characters of a Python literal. Parsing one takes about 4 microseconds and hundreds of bytes per character.
_MAX_LITERAL = 1_000_000


def _by_sign(value: Any) -> int | None:
    return {1: 1, -1: 0, 0: None}[np.sign(float(value))]


def _by_name(value: Any) -> int | None:
    name = str(value).strip().lower()
    return None if name.startswith("tie") else {"model_a": 0, "a": 0, "model_b": 1, "b": 1, "both_bad": None}[name]


_OPENAI = ("input", "preferred_output", "non_preferred_output")
# Two response columns and the column that names the better one -> its value as the index 0 or 1, or None for a tie.
_VERDICTS: dict[tuple[str, ...], Callable[[Any], int | None]] = {
    ("response_0", "response_1", "better_response_id"): lambda value: {0.0: 0, 1.0: 1}[float(value)],
    ("response1", "response2", "overall_preference"): _by_sign,
    ("response_1", "response_2", "preference_strength"): _by_sign,
    ("response_a", "response_b", "winner"): _by_name,
    ("conversation_a", "conversation_b", "winner"): _by_name,
}
# Feedback labels: columnar files store them as numbers, CSV files as text.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Keys that identify a message, of either kind, or a content part.
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"}, {"type", "text"})
# A message or a list of messages serialized by JSON, Python or numpy, perhaps inside a JSON string.
_SERIALIZED = re.compile(r"""["'\s]*(array\()?\[?\s*\{\s*\\?["'](role|content|from|value|type|text)\\?["']\s*:""")


def canonical(row: Mapping[str, Any], *, answers: bool = True) -> tuple[Row, str | None]:
    """Convert a row to the columns that this package reads; also return what was converted, or None if nothing was.

    With ``answers``, columns that hold the answer to a question are converted as well.
    """
    copy = dict(row)
    notes: list[str] = []
    for name, value in row.items():
        copy[name] = _decode_cell(value, name, notes)
    read = [_read_system(copy), _read_pair(copy, answers=answers), _read_conversation(copy), _read_question(copy)]
    if answers:
        read += [_read_answer(copy), _read_label(copy)]
    return copy, "; ".join(dict.fromkeys([*notes, *filter(None, read)])) or None


def first_canonical(dataset: Dataset) -> Row:
    """Return the first readable row among the first 100 of a dataset; an empty one if there is none."""
    head = range(min(len(dataset), 100))
    for row, _ in rows_of(undecoded(dataset.select(head)).with_format(None)[:], head, ""):
        with suppress(BadRow):
            return canonical(row)[0]
    return {}


def parse_text(text: str) -> Any:
    """Parse text as JSON or as a Python literal of limited length; raise ValueError if it is neither."""
    for read in (json.loads, _python_value) if len(text) <= _MAX_LITERAL else (json.loads,):
        with suppress(SimpoError), third_party("text"):
            return read(text)
    if len(text) > _MAX_LITERAL:
        raise ValueError(f"not JSON, and has over {_MAX_LITERAL:,} characters, too many for a Python list")
    raise ValueError("neither JSON nor a Python list")


def _python_value(text: str) -> Any:
    tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    tokens = [kind for kind in tokens if kind not in (tokenize.NL, tokenize.NEWLINE)]
    # numpy prints lists without commas, and Python would concatenate adjacent strings.
    if (tokenize.STRING, tokenize.STRING) in pairwise(tokens):
        raise ValueError("two texts that no comma separates")
    return ast.literal_eval(text.strip())


def _decode_cell(value: Any, name: str, notes: list[str]) -> Any:
    """Decode a cell: parse text that holds a list, messages or a number, and convert from/value messages."""
    if isinstance(value, str) and name in (*_STRUCTURED_COLUMNS, *_OPTION_COLUMNS):
        value = _parse_cell(value, name, notes) if value.strip() else None
    elif name in _TEXT_COLUMNS:
        value = _deserialize_messages(value, name, notes)
    elif isinstance(value, str) and name in _NUMBER_COLUMNS and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, list) and name == "responses":
        value = [_deserialize_messages(item, name, notes) for item in value]
    return _convert_messages(value, name, notes) if name in _TEXT_COLUMNS or name in _STRUCTURED_COLUMNS else value


def _parse_cell(text: str, name: str, notes: list[str]) -> Any:
    try:
        value = parse_text(text)
    except ValueError as error:
        if name not in _OPTION_COLUMNS and not re.match(r"\s*(\[|\{|array\()", text):
            return text
        raise BadRow(f"{name} is text that is {error}") from error
    if isinstance(value, str):
        return _parse_cell(value, name, notes)
    notes.append(f"{name} parsed from text")
    return value


def _deserialize_messages(value: Any, name: str, notes: list[str]) -> Any:
    """Parse messages that were serialized as text; other objects stay text, because answers may be JSON."""
    if not isinstance(value, str) or not _SERIALIZED.match(value):
        return value
    try:
        parsed = parse_text(value)
    except ValueError:
        if any(all(re.search(rf"""["']{key}\\?["']\s*:""", value) for key in keys) for keys in _MESSAGE_KEYS):
            raise BadRow(f"{name} is a conversation serialized as neither JSON nor a Python list") from None
        return value
    if isinstance(parsed, str):
        return _deserialize_messages(parsed, name, notes)
    items, kinds = (parsed, _MESSAGE_KEYS) if isinstance(parsed, list) else ([parsed], _MESSAGE_KEYS[:2])
    if not all(isinstance(item, dict) and any(keys <= set(item) for keys in kinds) for item in items):
        return value
    notes.append(f"{name} parsed from text")
    return parsed


def _convert_messages(value: Any, name: str, notes: list[str]) -> Any:
    """Convert ShareGPT's messages (from, value) to messages with role and content; return anything else unchanged."""
    if isinstance(value, list):
        return [_convert_messages(item, name, notes) for item in value]
    if not isinstance(value, dict) or value.get("from") is None or value.get("role") is not None:
        return value
    role = _ROLES.get(str(value["from"]).lower())
    if role is None:
        raise BadRow(f"{name} has a message from {value['from']!r}, not one of {', '.join(_ROLES)}")
    notes.append("from/value messages")
    rest = {key: item for key, item in value.items() if key not in ("from", "value", "role", "content")}
    if value["from"] != "function_call":
        return {"role": role, "content": value.get("value"), **rest}
    try:
        calls = parse_text(value["value"])
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"type": "function", "function": {"name": call["name"], **call}} for call in calls]
    except (ValueError, TypeError, KeyError) as error:
        raise BadRow(f"{name} has a function_call that is not JSON with a name") from error
    return {"role": role, "content": "", "tool_calls": calls, **rest}


def _single_column(row: Row, names: tuple[str, ...]) -> str | None:
    """Return which one of these columns the row has; empty text counts only if none of the others is present."""
    present = [name for name in names if row.get(name) is not None]
    present = [name for name in present if row[name] != ""] or present[:1]
    if len(present) > 1:
        raise BadRow(f"ambiguous columns {' and '.join(present)}: rename one with column_mapping")
    return present[0] if present else None


def _read_system(row: Row) -> str | None:
    name = _single_column(row, _SYSTEM_COLUMNS)
    if name is None or name == "system":
        return None
    row["system"] = row.pop(name)
    return f"{name} as system"


def _present(row: Mapping[str, Any]) -> set[str]:
    return {name for name, value in row.items() if value is not None}


def _is_comparison(row: Row) -> bool:
    present = _present(row)
    return {"chosen", "rejected"} <= present or {"responses", "scores"} <= present


def _read_pair(row: Row, *, answers: bool) -> str | None:
    """Convert comparisons whose responses have other names or are in a list with their scores."""
    if _is_comparison(row):
        return None
    fitting: list[tuple[str, ...]] = [names for names in (_OPENAI, *_VERDICTS) if set(names) <= _present(row)]
    for name in ("completions", "answers"):
        items = row.get(name)
        if isinstance(items, list) and items and None not in _keys_of(items[0]):
            fitting.append((name,))
    if len(fitting) > 1:
        raise BadRow(f"ambiguous columns {' and '.join('(' + ', '.join(names) + ')' for names in fitting)}")
    if not fitting:
        return None
    names = fitting[0]
    if len(names) == 1:
        _read_scored(row, *names)
    elif names == _OPENAI:
        _read_openai(row)
    else:
        _read_verdict(row, names, answers=answers)
    return f"comparison from {', '.join(names)}"


def _read_openai(row: Row) -> None:
    conversation = row.pop("input")
    if not isinstance(conversation, dict) or "messages" not in conversation:
        raise BadRow("input has no messages")
    row["chosen"], row["rejected"] = row.pop("preferred_output"), row.pop("non_preferred_output")
    if clash := sorted(set(conversation) & set(row)):
        raise BadRow(f"ambiguous: {clash[0]} is both a column and a key of input")
    row.update({key: value for key, value in conversation.items() if key != "messages"})
    row["prompt"] = conversation["messages"]


def _read_verdict(row: Row, names: tuple[str, ...], *, answers: bool) -> None:
    if "prompt" not in row and isinstance(row.get("context"), str | list):
        row["prompt"] = row.pop("context")
    if not answers and "prompt" in row:
        return
    try:
        better = _VERDICTS[names](row[names[2]])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadRow(f"{names[2]} does not name the better response") from error
    if better is None:
        raise Tie(f"{names[2]} is a tie")
    pair = [row.pop(name) for name in names[:2]]
    row["chosen"], row["rejected"] = pair[better], pair[1 - better]


def _keys_of(item: object) -> tuple[str | None, str | None]:
    """Return the keys that hold a response's text and its score."""
    present = _present(item) if isinstance(item, dict) else set()
    text, score = (next((key for key in keys if key in present), None) for keys in (_RESPONSE_KEYS, _SCORE_KEYS))
    return text, score


def _read_scored(row: Row, name: str) -> None:
    items = row.pop(name)
    if len({_keys_of(item) for item in items}) > 1:
        raise BadRow(f"{name} has items without a response or a score")
    text, score = _keys_of(items[0])
    if any(systems := [item.get("custom_system_prompt") for item in items]):  # one per response
        row["custom_system_prompt"] = systems
    row["responses"] = [item[text] for item in items]
    row["scores"] = [item[score] for item in items]
    if score == "rank":  # 1 is the best
        row["scores"] = [-rank if isinstance(rank, int | float) else rank for rank in row["scores"]]


def _read_conversation(row: Row) -> str | None:
    """Rename other columns with a conversation: to the prompt of a comparison, or to the messages to train on."""
    name = _single_column(row, ("conversations", "conversation", *(("messages",) if row.get("conversations") else ())))
    if name is None:
        # `chosen` and the others hold the answers to this conversation.
        if row.get("prompt") is None and row.get("messages") and _is_answer(row.get("chosen")):
            row["prompt"] = row.pop("messages")
            return "messages as prompt"
        return None
    has_answers = _is_comparison(row) or row.get("completion") is not None
    if has_answers and row.get("prompt") is not None:
        return None
    if not has_answers and row.get("messages"):
        raise BadRow(f"ambiguous columns {name} and messages: rename one with column_mapping")
    row["prompt" if has_answers else "messages"] = row.pop(name)
    return f"{name} as {'prompt' if has_answers else 'messages'}"


def _is_answer(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(value, str) or (isinstance(first, dict) and first.get("role") == "assistant")


def _read_question(row: Row) -> str | None:
    more = row.get("input")
    if row.get("prompt") is not None:
        if isinstance(row["prompt"], str) and isinstance(more, str) and more.strip():
            raise BadRow("ambiguous columns prompt and input: rename one with column_mapping")
        return None
    if row.get("messages") is not None:
        return None
    name = _single_column(row, _QUESTION_COLUMNS) or ("input" if more is not None else None)
    if name is None:
        return None
    if context := [column for column in _CONTEXT_COLUMNS if row.get(column)]:
        raise BadRow(f"column {context[0]} next to {name}: combine both in a column prompt, or rename it")
    if not isinstance(row[name], str | list):
        raise BadRow(f"{name} is {kind_of(row[name])}, not text or messages")
    row["prompt"] = row.pop(name)
    if name == "input" or more is None or more == "":
        return f"{name} as prompt"
    if not isinstance(row["prompt"], str) or not isinstance(more, str):
        raise BadRow(f"{name} and input are not text")
    row["prompt"] += f"\n\n{row.pop('input')}"
    return f"{name} and input as prompt"


def _read_answer(row: Row) -> str | None:
    answered = {"completion", "messages", "responses"} & _present(row)
    if row.get("prompt") is None or answered or _is_comparison(row):
        return None
    name = _single_column(row, _ANSWER_COLUMNS)
    if name is None:
        return None
    if rated := [column for column in _RATING_COLUMNS if row.get(column) is not None]:
        raise BadRow(
            f"one {name} per row, rated by {rated[0]} and others: for simpo train, combine all responses to a prompt "
            "in a row {prompt, responses, scores}; for simpo sft, rename the column to completion (column_mapping)"
        )
    row["completion"] = row.pop(name)
    return f"{name} as completion"


def _read_label(row: Row) -> str | None:
    """Convert LLaMA-Factory's feedback: rename the label, and split off the last answer, which the label judges."""
    if row.get("label") is None and read_label(row.get("kto_tag")) is not None:
        row["label"] = row.pop("kto_tag")
    messages = row.get("messages")
    if read_label(row.get("label")) is None or row.get("prompt") is not None or _is_comparison(row):
        return None
    if not isinstance(messages, list):
        return None
    if not _is_answer(messages[-1:]):
        raise BadRow("label judges messages that do not end with an assistant message")
    row["prompt"], row["completion"] = messages[:-1], messages[-1:]
    del row["messages"]
    return "messages with a label as prompt and completion"


def read_label(value: object) -> bool | None:
    """Return whether a label marks a response as desirable; None if it is not a label."""
    return _LABELS.get(str(value).strip().lower())


# ---- Detecting text that was already rendered with a chat template, and must not be rendered again.

# How turns begin in common families of templates: ChatML, Llama 2 and 3, Gemma, Phi, DeepSeek, Command R, GLM, gpt-oss,
# Nemotron. A lone <s> may be HTML.
_TURN_START = re.compile(
    r"\s*(<s>\s*|<bos>\s*|\[gMASK\]\s*|<sop>\s*)*"
    r"(<\|im_start\|>\s*\w|<\|start_header_id\|>|<\|header_start\|>|\[INST\]|<start_of_turn>|<\|turn>"
    r"|<\|(user|system|assistant)\|>|<\|begin_of_text\|>|<\uff5c(begin\u2581of\u2581sentence|User|Assistant)\uff5c>"
    r"|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|start\|>\w|<\|channel\|>\w|<\|start_of_role\|>|<extra_id_[01]>|<bos>)"
)
# How the assistant's turn begins in these families, possibly with reasoning tags. Only at the end of a prompt, because
# texts about templates contain it elsewhere. HelpSteer2's prompts end with the user's turn.
_ASSISTANT_START = re.compile(
    r"<extra_id_1>Assistant\n|(?:<\|im_start\|>assistant\n|<\|(?:start_header_id|header_start)\|>assistant<\|\w+\|>"
    r"|<(?:start_of_turn|\|turn)>model\n|\[/INST\]|<\|assistant\|>|<\uff5cAssistant\uff5c>|<\|CHATBOT_TOKEN\|>"
    r"|<\|start\|>assistant|<\|start_of_role\|>assistant<\|\w+\|>)(?:\s|</?think>)*\Z"
)
_TRANSCRIPT_END = re.compile(r"(\n\s*(### ?)?Assistant:|### Response:|\bASSISTANT:)\s*\Z")
_CUE = re.compile(r"\n\s*Assistant:")
_CHECKED_COLUMNS = ("prompt", "chosen", "rejected", "completion", "responses", "messages")


def check_not_rendered(row: Mapping[str, Any], frame: tuple[str, str] | None = None) -> None:
    """Raise BadRow if texts of a row begin like rendered turns, or are enclosed by ``frame``.

    ``frame`` is what the chat template writes before and after a user message in a generation prompt.
    """
    for name in _CHECKED_COLUMNS:
        for text in texts_of(row.get(name)):
            framed = frame is not None and frame[0] in text and text.rstrip().endswith(frame[1])
            # A transcript that starts with something else, such as instructions, cannot be split into turns.
            unsplit = name == "prompt" and (
                _ASSISTANT_START.search(text) or (_TRANSCRIPT_END.search(text) and not is_transcript_prompt(text))
            )
            if row.get("prompt") is None and text is row[name] and _CUE.search(text):
                unsplit = not is_transcript(text)
            if framed or unsplit or _TURN_START.match(text):
                raise BadRow(
                    f"{name} is already rendered with a chat template: give the plain text or messages, or set "
                    "chat_template: none"
                )


def texts_of(value: Any) -> Iterator[str]:
    """Yield the text of a cell, or of its messages, unless it is blank."""
    if isinstance(value, str):
        yield from [value] if value.strip() else []
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        yield from texts_of(value.get("content", value.get("text")))
