"""The web server of the label page: on this machine only, for those who know the token."""

from __future__ import annotations

import errno
import json
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from simpo.errors import SimpoError
from simpo.labeling.session import Session, read_key, read_labeler, read_vote

HOST = "127.0.0.1"
_PAGE = Path(__file__).parent / "page"
# A page of another site cannot send it: browsers ask first, and this server does not allow it.
_TOKEN_HEADER = "x-simpo-token"  # noqa: S105 - the name of the header
_LONGEST_BODY = 1 << 17  # bytes
_HEADERS = {
    # Nothing but the page's own files, whatever a text contains that is shown.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",  # the URL contains the token
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_FORBIDDEN = "Open the address that simpo label printed."
Action = Callable[[dict[str, Any]], dict[str, Any]]


def make_app(session: Session, *, token: str, guidelines: str) -> Starlette:
    """The application: the page, and what it asks and reports as JSON.

    Requests need the token, and a host name of this machine: a page of another site whose name was made to point here
    (DNS rebinding) is refused.

    ``token`` is the secret in the page's URL.
    """

    def allowed(given: str | None) -> bool:
        return secrets.compare_digest(token.encode(), (given or "").encode())

    def page(request: Request) -> Response:
        if not allowed(request.query_params.get("token")):
            return PlainTextResponse(f"{_FORBIDDEN}\n", 403, _HEADERS)
        return _file("label.html")

    def answer(act: Action) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            if not allowed(request.headers.get(_TOKEN_HEADER)):
                return _json({"error": _FORBIDDEN}, 403)
            try:
                return _json(await run_in_threadpool(act, await _body(request)))
            except SimpoError as error:
                return _json({"error": str(error)}, 400)

        return respond

    actions: dict[str, Action] = {
        "guidelines": lambda body: {"guidelines": guidelines},
        "next": lambda body: session.next(read_labeler(body)),
        "judge": lambda body: session.judge(read_vote(body), read_key(body)),
        "undo": lambda body: session.undo(read_key(body), read_labeler(body)),
    }
    routes = [Route(f"/api/{name}", answer(act), methods=["POST"]) for name, act in actions.items()]
    files = [Route(f"/{name}", lambda request, name=name: _file(name)) for name in ("label.css", "label.js")]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost", "[::1]"], www_redirect=False)
    return Starlette(routes=[Route("/", page), *files, *routes], middleware=[trusted])


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object in a request; raises :class:`SimpoError` if there is none."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _LONGEST_BODY:
            raise SimpoError(f"the request has more than {_LONGEST_BODY:,} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SimpoError("expected a JSON object")
    for key, value in found.items():
        if any("\ud800" <= character <= "\udfff" for character in f"{key}{value}"):
            raise SimpoError(f"{key!a}: contains half of a character (of a surrogate pair); remove it")
    return found


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """A reply; ASCII only, because an answer that is shown may contain half of a surrogate pair."""
    return Response(json.dumps(content), status, headers=_HEADERS, media_type="application/json")


def _file(name: str) -> Response:
    return FileResponse(_PAGE / name, headers=_HEADERS)


def listen(port: int) -> socket.socket:
    """A socket on this machine's loopback address; port 0 is any free one."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed is no obstacle
    try:
        found.bind((HOST, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        code = getattr(error, "errno", None)
        reason = "is in use" if code == errno.EADDRINUSE else f"cannot be used ({error})"
        raise SimpoError(f"--port: {port} {reason}; name another one, or 0 for any that is free") from error
    return found


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM, which are raised again when the last answer is sent."""
    config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])
