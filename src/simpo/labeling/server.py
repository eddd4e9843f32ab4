"""The web server for the label page; it listens on this machine only and requires a token."""

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
# Pages of other sites cannot send this header: browsers ask for permission first, which this server never grants.
_TOKEN_HEADER = "x-simpo-token"  # noqa: S105 - the name of the header
_LONGEST_BODY = 1 << 17  # bytes
_HEADERS = {
    # Only the page's own files may load, whatever markup a prompt or answer contains.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",  # the URL contains the token
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_FORBIDDEN = "Open the address printed by simpo label."
Action = Callable[[dict[str, Any]], dict[str, Any]]


def make_app(session: Session, *, token: str, guidelines: str) -> Starlette:
    """Create the web application: the page and its JSON API.

    Every request must carry ``token``, the secret in the page's URL, and a host name of this machine. Checking the host
    name prevents DNS rebinding, where another site's domain is made to resolve to this machine.
    """

    def authorized(given: str | None) -> bool:
        return secrets.compare_digest(token.encode(), (given or "").encode())

    def page(request: Request) -> Response:
        if not authorized(request.query_params.get("token")):
            return PlainTextResponse(f"{_FORBIDDEN}\n", 403, _HEADERS)
        return _file("label.html")

    def endpoint(action: Action) -> Callable[[Request], Any]:
        async def respond(request: Request) -> Response:
            if not authorized(request.headers.get(_TOKEN_HEADER)):
                return _json({"error": _FORBIDDEN}, 403)
            try:
                return _json(await run_in_threadpool(action, await _body(request)))
            except SimpoError as error:
                return _json({"error": str(error)}, 400)

        return respond

    actions: dict[str, Action] = {
        "guidelines": lambda body: {"guidelines": guidelines},
        "next": lambda body: session.next(read_labeler(body)),
        "judge": lambda body: session.judge(read_vote(body), read_key(body)),
        "undo": lambda body: session.undo(read_key(body), read_labeler(body)),
    }
    routes = [Route(f"/api/{name}", endpoint(action), methods=["POST"]) for name, action in actions.items()]
    files = [Route(f"/{name}", lambda request, name=name: _file(name)) for name in ("label.css", "label.js")]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost", "[::1]"], www_redirect=False)
    return Starlette(routes=[Route("/", page), *files, *routes], middleware=[trusted])


async def _body(request: Request) -> dict[str, Any]:
    """Read the JSON object in a request; raise :class:`SimpoError` if there is none."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _LONGEST_BODY:
            raise SimpoError(f"the request is longer than {_LONGEST_BODY:,} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise SimpoError("expected a JSON object")
    for key, value in body.items():
        if any("\ud800" <= character <= "\udfff" for character in f"{key}{value}"):
            raise SimpoError(f"{key!a}: contains a lone surrogate (half of a character); remove it")
    return body


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """Build a JSON response; ASCII only, because answers may contain lone surrogates."""
    return Response(json.dumps(content), status, headers=_HEADERS, media_type="application/json")


def _file(name: str) -> Response:
    return FileResponse(_PAGE / name, headers=_HEADERS)


def listen(port: int) -> socket.socket:
    """Open a listening socket on the loopback address; port 0 picks a free port."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # to restart right after a server was killed
    try:
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        code = getattr(error, "errno", None)
        reason = "is in use" if code == errno.EADDRINUSE else f"cannot be used ({error})"
        raise SimpoError(f"--port: {port} {reason}; choose another port, or 0 for any free one") from error
    return listening


def serve(app: Starlette, listening: socket.socket) -> None:
    """Handle requests until Ctrl-C or SIGTERM; the signal is raised again after the last response."""
    config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])
