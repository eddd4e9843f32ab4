"""A local stand-in for the hub's upload API: repositories, LFS objects and commits, all in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_SMALL = 64  # bytes; larger files are LFS objects


class Hub:
    """Serves the API in a thread; use it as a context manager.

    Attributes:
        files: the repository's files after the last commit, with their contents.
        objects: LFS objects by SHA-256, committed or not.
        puts: SHA-256 of each object received, in order.
        commits: number of commits.
        writers: tokens with write permission.
        private: whether the repository is private.
        broken: number of objects received before the server starts to fail, or None.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.commits = 0
        self.writers = {"hf_writer"}
        self.private = True
        self.broken: int | None = None
        self.created: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and JSON response to a request."""
        if method == "PUT":
            return self._receive(path.rsplit("/", 1)[1], body)
        answers = {"/repos/create": self._create, "/objects/batch": self._batch, "validate-yaml": self._validate}
        answers |= {"/preupload/main": self._preupload, "/commit/main": self._commit}
        for ending, answer in answers.items():
            if path.endswith(ending):
                return 200, answer(body)
        return 200, {"id": "someone/model", "sha": str(self.commits), "siblings": [], "private": self.private}

    def _receive(self, digest: str, body: bytes) -> tuple[int, Any]:
        if self.broken is not None and len(self.puts) >= self.broken:
            return 400, {"error": "broken"}
        assert hashlib.sha256(body).hexdigest() == digest
        self.puts.append(digest)
        self.objects[digest] = body
        return 200, {}

    def _create(self, body: bytes) -> dict[str, Any]:
        self.created.append(json.loads(body))
        return {"url": f"{self.url}/someone/model"}

    def _preupload(self, body: bytes) -> dict[str, Any]:
        return {"files": [self._upload_mode(file) for file in json.loads(body)["files"]]}

    def _batch(self, body: bytes) -> dict[str, Any]:
        return {"transfer": "basic", "objects": list(map(self._action, json.loads(body)["objects"]))}

    def _validate(self, body: bytes) -> dict[str, Any]:
        return {"warnings": [], "errors": []}

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        found = {"path": file["path"], "uploadMode": "lfs" if file["size"] > _SMALL else "regular"}
        old = self.files.get(file["path"])
        if old is not None:
            blob = hashlib.sha1(f"blob {len(old)}\0".encode() + old).hexdigest()
            found["oid"] = hashlib.sha256(old).hexdigest() if file["size"] > _SMALL else blob
        return {**found, "shouldIgnore": False}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.url}/upload/{wanted['oid']}"}}}

    def _commit(self, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
        self.commits += 1
        return {"commitUrl": f"{self.url}/someone/model/commit/{self.commits}", "commitOid": str(self.commits)}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
                path = self.path.partition("?")[0]
                allowed = self.command == "PUT" or token in hub.writers
                status, found = hub.answer(self.command, path, body) if allowed else (403, {"error": "no permission"})
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_HEAD = _serve

            def log_message(self, *args: object) -> None:
                pass

        return Handler
