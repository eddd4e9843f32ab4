"""``log.txt``: everything that a command reports, with the time and without secrets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from simpo.runs.atomic import disk_errors

Log = Callable[[str], None]  # called with lines for the user

# ---- Secrets out of what is kept: mappings, YAML, command lines and any text.


REDACTED = "<redacted>"


_SECRET = re.compile(r"(.*_)?(token|secret|password)|.*_key|apikey")


# Tokens of a tokenizer, and figures per token.
_HARMLESS = re.compile(r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|image|audio|video|turn|special|per)_token")


# Keys of Hugging Face and of OpenAI-like services, wherever they stand.
_LITERAL = re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")


# `key: value` or `key=value` on one line, such as a comment holds; a value is quoted or one word.
_ASSIGNMENT = re.compile(r"""(?<![\w-])([\w-]+)(["']?[ \t]*[:=][ \t]*)("[^"\n]*"|'[^'\n]*'|[^\s,{}\[\]#][^\s,}\]]*)""")


_NO_SECRETS = ("null", "~", "true", "false")


def is_secret(key: str) -> bool:
    """Whether values of this key are secrets: ``hub_token`` and ``api-key`` are, ``eos_token`` is not."""
    name = key.lower().replace("-", "_")
    return bool(_SECRET.fullmatch(name)) and not _HARMLESS.fullmatch(name)


def masked(text: str) -> str:
    """Any text without what looks like an access token."""
    return _LITERAL.sub(REDACTED, text)


def redacted(key: str, value: Any) -> Any:
    """The value of a key, without secrets; None, true and false stay, because they tell none."""
    if is_secret(key) and value is not None and not isinstance(value, bool):
        return REDACTED
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [redacted(key, item) for item in value]
    return masked(value) if isinstance(value, str) else value


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping, and those in it, without secrets."""
    return {key: redacted(str(key), value) for key, value in mapping.items()}


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: ``--hub_token X`` and ``--hub_token=X``."""
    kept = []
    secret = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument[2:].partition("=")
            secret = is_secret(name)
            kept.append(f"--{name}={REDACTED}" if secret and equals else _redact_line(argument))
        else:
            kept.append(REDACTED if secret else _redact_line(argument))
    return kept


def redact_yaml(text: str) -> str:
    """The text of a YAML file without secrets, its comments and layout as they are."""
    for start, end in sorted(set(_secret_spans(text)), reverse=True):
        value = text[start:end].rstrip()  # the end of a block is the start of what follows
        text = text[:start] + REDACTED + text[start + len(value) :]
    return _redact_line(text)


def _redact_line(text: str) -> str:
    return masked(_ASSIGNMENT.sub(_assignment, text))


def _secret_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where values of secret keys stand, also those of several lines."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    open_nodes = [root] if root else []
    seen: set[int] = set()  # aliases lead to one node in several ways, even back to itself
    while open_nodes:
        node = open_nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            open_nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and is_secret(key.value) and not _tells_nothing(value):
                    yield value.start_mark.index, value.end_mark.index
                else:
                    open_nodes.append(value)


def _tells_nothing(node: yaml.Node) -> bool:
    return node.tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool")


def _assignment(match: re.Match[str]) -> str:
    key, sign, value = match.groups()
    harmless = not is_secret(key) or value.lower() in _NO_SECRETS
    return match[0] if harmless else f"{key}{sign}{REDACTED}"


def now() -> str:
    """The time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class LogFile(logging.Handler):
    """Appends lines to a file, and whatever loggers let through while it is a handler of one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("note: %(message)s"))
        self.path = path

    def write(self, line: str) -> None:
        """Append a line, without access tokens.

        Raises:
            SimpoError: the file cannot be written.
        """
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now()} {masked(line)}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record; a library's message does not end the run because it cannot be kept."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)
