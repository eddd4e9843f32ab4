"""A real browser for tests: headless Chromium, driven through the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 30.0  # seconds
_KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Enter": 13,
    "Escape": 27,
    "Backspace": 8,
}


def chromium() -> str:
    """Return the path of the browser; skip the test if there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium (Debian package chromium)")
    return found


class Browser:
    """A browser process; use it as a context manager.

    Attributes:
        pages: the open pages.
    """

    def __init__(self, folder: Path) -> None:
        """Start the browser with its profile in ``folder``."""
        to_browser, commands = os.pipe()
        events, from_browser = os.pipe()
        # The protocol uses descriptors 3 (commands) and 4 (events); the shell moves our pipes there.
        script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"'
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-proxy-server", f"--user-data-dir={folder / 'profile'}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", script, chromium(), *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._commands, self._events = commands, events
        self._buffer, self._number = b"", 0
        self.pages: list[Page] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._commands)  # the browser exits when its pipe is closed
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._events)

    def open(self, url: str, *, width: int = 1400, height: int = 900, dark: bool = False) -> Page:
        """Open a page of this size, recording the console and all requests from the start."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self.pages.append(page)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.resize(width, height, dark=dark)
        page.send("Page.navigate", url=url)
        return page

    def send(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE
        while True:
            found = self._receive(deadline)
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Return the next message; events are recorded on their page."""
        while b"\0" not in self._buffer:
            if not select.select([self._events], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._events, 1 << 20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        found = json.loads(line)
        for page in self.pages:
            if found.get("sessionId") == page.session:
                page.note(found)
        return found


class Page:
    """A page in a browser.

    Attributes:
        session: the page's session id in the protocol.
        complaints: console errors and warnings, uncaught exceptions, and failed or blocked requests.
        requests: the URLs the page requested.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self.session = session
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def note(self, event: dict[str, Any]) -> None:
        """Record an event of the protocol."""
        method, given = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(given["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command for this page and return its result."""
        return self._browser.send(method, session=self.session, **parameters)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size in CSS pixels and the color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true and return its value."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with suppress(RuntimeError):  # the page is not loaded yet
                if found := self.evaluate(expression):
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"{expression} stays false; complaints: {self.complaints}")

    def press(self, key: str) -> None:
        """Press a key, such as ``a`` or ``ArrowLeft``."""
        code = _KEYS.get(key, ord(key[0].upper()))
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Type text at the focus."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Save the visible part of the page as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
