"""Limits on the time and memory that a chat template, which may come from anybody, may use."""

from __future__ import annotations

import operator
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from simpo.data.rows import BadRow
from simpo.errors import SimpoError, one_line

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SECONDS = 2.0  # processor time for one conversation, which takes milliseconds
_MEMORY = 1 << 30  # bytes
_LONGEST = 1 << 26  # characters
_BITS = 64  # size of a factor or an exponent


class _OverrunError(BaseException):
    """The time is over; not an Exception, so that no library handles it."""


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text that a tokenizer's chat template makes of messages.

    Raises:
        BadRow: the template refuses them, with whatever error of its own or of Jinja.
        SimpoError: it needs too much time or memory, or writes too much.
    """
    try:
        with _limited():
            text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except _OverrunError:
        raise SimpoError(f"chat_template: one conversation takes more than {_SECONDS:g} s to render") from None
    except MemoryError:
        raise SimpoError(f"chat_template: one conversation takes more than {_MEMORY >> 30} GiB to render") from None
    except Exception as error:
        raise BadRow(f"the chat template refuses it: {one_line(error)}") from error
    if len(text) > _LONGEST:
        raise SimpoError(f"chat_template: one conversation becomes {len(text):,} characters")
    return text


@contextmanager
def _limited() -> Iterator[None]:
    """Bound the processor time and the memory of the body, except on Windows and outside the main thread."""
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OverrunError

    memory, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
        _limit_memory(memory)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _limit_memory(current: tuple[int, int]) -> None:
    statistics = Path("/proc/self/statm")  # Linux; elsewhere the limit has no effect anyway
    if statistics.exists():
        limit = int(statistics.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        if current[0] == resource.RLIM_INFINITY or limit < current[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, current[1]))


def _bounded(function: Callable[[Any, Any], Any], largest: int) -> Callable[[Any, Any], Any]:
    """The operation, except on numbers so large that nothing could interrupt it."""

    def apply(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > largest:
            raise OverflowError("the number is too large")
        return function(left, right)

    return apply


# Jinja's sandbox, in which transformers runs templates, bounds the length of ranges but not the size of numbers.
SandboxedEnvironment.intercepted_binops = frozenset(("*", "**"))
SandboxedEnvironment.default_binop_table |= {
    "*": _bounded(operator.mul, 1 << _BITS),
    "**": _bounded(operator.pow, _BITS),
}
