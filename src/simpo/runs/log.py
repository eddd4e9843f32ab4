"""``log.txt``, the record of everything a command reports, and the redaction of secrets before anything is stored."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import yaml

from simpo.runs.files import disk_errors

Log = Callable[[str], None]  # reports a line to the user

REDACTED = "<redacted>"

_SECRET = re.compile(r"(.*_)?(token|secret|password|passwd|authorization|credentials?|bearer)|.*_key|apikey")
_SHORTEST = 8  # characters; shorter values of environment variables may be common words and are not masked
# Keys that end in "token" but hold no secret: a tokenizer's special tokens, and metrics per token.
_HARMLESS = re.compile(r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|image|audio|video|turn|special|per)_token")
# Hugging Face tokens and the API keys of OpenAI-like services, anywhere in a text.
_LITERAL = re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
# `key: value` or `key=value` on one line, even in a comment; the value is quoted or a single word.
_ASSIGNMENT = re.compile(r"""(?<![\w-])([\w-]+)(["']?[ \t]*[:=][ \t]*)("[^"\n]*"|'[^'\n]*'|[^\s,{}\[\]#][^\s,}\]]*)""")


def is_secret(key: str) -> bool:
    """Whether this key holds a secret: ``hub_token`` and ``api-key`` do, ``eos_token`` does not."""
    name = key.lower().replace("-", "_")
    return bool(_SECRET.fullmatch(name)) and not _HARMLESS.fullmatch(name)


def mask_secrets(text: str) -> str:
    """Mask everything that looks like an access token, and the secrets in environment variables."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret(name):
            text = text.replace(value, REDACTED)
    return _LITERAL.sub(REDACTED, text)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Redact the secrets in a mapping and in nested mappings; None, True and False stay because they reveal nothing."""
    return {key: _redact_value(str(key), value) for key, value in mapping.items()}


def _redact_value(key: str, value: Any, secrets: Collection[Any] = ()) -> Any:
    """Redact a value whose key is secret or that equals one of ``secrets``; recurse into containers."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(key):
        return REDACTED
    if isinstance(value, Mapping):
        return {name: _redact_value(str(name), item, secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value(key, item, secrets) for item in value]
    if value in secrets:
        return REDACTED
    return _redact_line(value) if isinstance(value, str) else value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Redact secrets in a command line, given as ``--hub_token X`` or ``--hub_token=X``."""
    redacted = []
    secret = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument[2:].partition("=")
            secret = is_secret(name)
            redacted.append(f"--{name}={REDACTED}" if secret and equals else _redact_line(argument))
        else:
            redacted.append(REDACTED if secret else _redact_line(argument))
    return redacted


def redact_yaml(text: str) -> str:
    """Redact the secrets in the text of a YAML file.

    Comments and layout survive if every secret is on the same line as its key. Otherwise (block scalars, lists,
    aliases), the parsed document is redacted and dumped again.
    """
    redacted_text = _redact_line(text)
    try:
        document = yaml.safe_load(text)
        secrets = list(_secrets(document))
        if not secrets:
            return redacted_text
        redacted_document = _redact_value("", document, secrets)
    except yaml.YAMLError:
        return redacted_text
    except RecursionError:
        return "# not stored because the document contains itself\n"
    with suppress(yaml.YAMLError):  # masking may leave the rest of a block scalar behind
        if yaml.safe_load(redacted_text) == redacted_document:
            return redacted_text
    return yaml.safe_dump(redacted_document, sort_keys=False, allow_unicode=True)


def _secrets(value: Any, secret: bool = False) -> Iterator[Any]:
    """Yield all values under secret keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, secret or is_secret(str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from _secrets(item, secret)
    elif secret and value is not None and not isinstance(value, bool):
        yield value


def _redact_line(text: str) -> str:
    def mask(match: re.Match[str]) -> str:
        key, sign, value = match.groups()
        harmless = not is_secret(key) or value.lower() in ("null", "~", "true", "false")
        return match[0] if harmless else f"{key}{sign}{REDACTED}"

    return mask_secrets(_ASSIGNMENT.sub(mask, text))


def utc_now() -> str:
    """Return the current time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class EarlyNotices(MemoryHandler):
    """Buffers warnings logged before the run folder exists, for ``log.txt``."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize, flushLevel=sys.maxsize)
        self.setLevel(logging.WARNING)


class LogFile(logging.Handler):
    """Appends lines to a file; as a logging handler, it also appends log records."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("note: %(message)s"))
        self.path = path

    def write(self, line: str) -> None:
        """Append a line with access tokens masked."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{utc_now()} {mask_secrets(line)}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a log record; failing to store a library's message does not end the run."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)
