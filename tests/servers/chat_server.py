"""A local OpenAI-compatible server that answers with a function, and can fail in given ways first."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Raw:
    """An HTTP response as it is sent.

    Attributes:
        status: HTTP status code.
        body: the bytes of the body; the content-length is too large if ``torn``.
        headers: headers in addition to the length.
        stall: seconds to wait before sending anything.
        torn: whether the connection is closed before the end of the body.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    stall: float = 0.0
    torn: bool = False


def completion(text: str, top_logprobs: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return a chat completion with one choice."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top_logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in top_logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


class ChatServer:
    """Serves ``answer(body)``, a completion or a :class:`Raw` response, in a thread; use it as a context manager.

    Attributes:
        bodies: request bodies in order of arrival.
        keys: ``authorization`` headers of the requests.
        headers: all request headers, with lower-case names.
        paths: request paths with queries.
        times: times of arrival.
        faults: responses for the first requests, one each.
        most_at_once: the largest number of concurrent requests.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any], faults: Iterable[Raw] = ()) -> None:
        self._answer = answer
        self.faults = list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def respond(self, body: dict[str, Any], path: str, headers: dict[str, str]) -> Raw:
        """Return the response to a request."""
        with self._lock:
            self.bodies.append(body)
            self.keys.append(headers.get("authorization"))
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            found = fault or self._answer(body)
            if isinstance(found, Raw):
                time.sleep(found.stall)
                return found
            return Raw(body=json.dumps(found).encode())
        finally:
            with self._lock:
                self._now -= 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    request_queue_size = 128  # connections beyond this would wait for a second


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            raw = server.respond(body, self.path, {name.lower(): value for name, value in self.headers.items()})
            if self.path.partition("?")[0] != "/v1/chat/completions":
                raw = Raw(404, b'{"error": {"message": "no such path"}}')
            try:
                self.send_response(raw.status)
                for name, value in raw.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(raw.body) + raw.torn * 10))
                self.end_headers()
                self.wfile.write(raw.body)
            except OSError:  # the client did not wait
                pass

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
