"""``log.txt`` with everything that a command reports, and the removal of secrets from all that is stored."""

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

Log = Callable[[str], None]  # called with lines for the user

REDACTED = "<redacted>"

_SECRET = re.compile(r"(.*_)?(token|secret|password|passwd|authorization|credentials?|bearer)|.*_key|apikey")
_SHORTEST = 8  # characters of a value in the environment that is masked; a shorter one may be a common word
# Tokens of a tokenizer, and metrics per token.
_HARMLESS = re.compile(r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|image|audio|video|turn|special|per)_token")
# Keys of Hugging Face and of OpenAI-like services, wherever they occur.
_LITERAL = re.compile(r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
# `key: value` or `key=value` on one line, also in a comment; a value is quoted or one word.
_ASSIGNMENT = re.compile(r"""(?<![\w-])([\w-]+)(["']?[ \t]*[:=][ \t]*)("[^"\n]*"|'[^'\n]*'|[^\s,{}\[\]#][^\s,}\]]*)""")


def is_secret(key: str) -> bool:
    """Whether values of this key are secrets: ``hub_token`` and ``api-key`` are, ``eos_token`` is not."""
    name = key.lower().replace("-", "_")
    return bool(_SECRET.fullmatch(name)) and not _HARMLESS.fullmatch(name)


def mask_secrets(text: str) -> str:
    """Any text without what looks like an access token, and without the secrets of the environment."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret(name):
            text = text.replace(value, REDACTED)
    return _LITERAL.sub(REDACTED, text)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping, and those in it, without secrets; None, true and false stay, because they reveal nothing."""
    return {key: _redacted(str(key), value) for key, value in mapping.items()}


def _redacted(key: str, value: Any, secrets: Collection[Any] = ()) -> Any:
    """The value of a key without secrets and without values that are equal to one of ``secrets``."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(key):
        return REDACTED
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), item, secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(key, item, secrets) for item in value]
    if value in secrets:
        return REDACTED
    return _redact_line(value) if isinstance(value, str) else value


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
    """The text of a YAML file without secrets.

    Comments and layout are kept if every secret is the value of its key on one line. Otherwise (blocks, lists, aliases)
    the file is written anew from its contents.
    """
    kept = _redact_line(text)
    try:
        document = yaml.safe_load(text)
        secrets = list(_secrets(document))
        if not secrets:
            return kept
        clean = _redacted("", document, secrets)
    except yaml.YAMLError:
        return kept
    except RecursionError:
        return "# not kept, because it contains itself\n"
    with suppress(yaml.YAMLError):  # where a masked value left the rest of its block behind
        if yaml.safe_load(kept) == clean:
            return kept
    return yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)


def _secrets(value: Any, secret: bool = False) -> Iterator[Any]:
    """All values under secret keys."""
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
    """The time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class EarlyNotices(MemoryHandler):
    """Keeps what is reported before a run has a folder, for the run's log."""

    def __init__(self) -> None:
        super().__init__(sys.maxsize, flushLevel=sys.maxsize)
        self.setLevel(logging.WARNING)


class LogFile(logging.Handler):
    """Appends lines to a file, and the records of loggers that it is a handler of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("note: %(message)s"))
        self.path = path

    def write(self, line: str) -> None:
        """Append a line, without access tokens."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{utc_now()} {mask_secrets(line)}\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record; a library's message that cannot be stored does not end the run."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)
