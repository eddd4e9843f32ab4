"""Label pages, served by this process or by one that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
import uvicorn

from simpo.labeling.server import listen, make_app
from simpo.labeling.session import Item, Judgment, Session, Store
from simpo.runs.files import write_lines

TOKEN = "secret"
_SERVER = Path(__file__).parents[1] / "servers/label_page.py"


class Served:
    """A page with these items, with its judgments stored in ``folder``."""

    def __init__(self, items: list[Item], folder: Path, *, overlap: float = 0.0) -> None:
        self._items, self._database, self._overlap = items, folder / "judgments.sqlite", overlap
        self._process: subprocess.Popen | None = None
        self._server: uvicorn.Server | None = None
        self._socket = listen(0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/?token={TOKEN}"

    def start(self) -> None:
        """Serve the page from a thread in this process."""
        self._store = Store(self._database)
        app = make_app(self.session(), token=TOKEN, guidelines="Be fair.")
        config = uvicorn.Config(app, log_config=None, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def session(self) -> Session:
        """The items and the judgments so far."""
        return Session(self._items, self._store, seed=0, overlap=self._overlap)

    def start_process(self) -> None:
        """Serve the page on the same port from a separate process."""
        self._socket.close()
        rows = self._database.with_name("items.jsonl")
        write_lines(rows, [item.row() for item in self._items])
        arguments = map(str, (rows, self._database, self._overlap, self.port, TOKEN))
        command = [sys.executable, str(_SERVER), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """Kill the process, as in a crash."""
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._process = None

    def close(self) -> None:
        """Stop the server, wherever it runs."""
        if self._process is not None:
            self.kill()
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join()
            self._store.close()
        self._socket.close()

    def judgments(self) -> list[Judgment]:
        """Return the judgments, read while the page is open."""
        with closing(Store(self._database)) as store:
            return store.judgments()


@pytest.fixture
def page_of(tmp_path: Path):
    """Create pages that are closed at the end of the test."""
    made: list[Served] = []

    def make(items: list[Item], **options: float) -> Served:
        made.append(Served(items, tmp_path, **options))
        return made[-1]

    yield make
    for served in made:
        served.close()


def make_items(count: int, k: int = 2) -> list[Item]:
    """Return ``count`` items with ``k`` answers each, which name their position in the file."""
    return [Item(f"p{n}", f"Question {n}?", tuple(f"answer {n}.{i}" for i in range(k))) for n in range(count)]
