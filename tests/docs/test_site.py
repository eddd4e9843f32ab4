"""The documentation site: built without warnings or network, complete, and accessible in a browser."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.browser import Browser, chromium

import simpo

_ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="MkDocs is not installed (extra docs)")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(_ROOT / "src")}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page_public_name_and_linked_file_is_included(site):
    pages = {path.stem for path in (_ROOT / "docs").glob("*.md")} - {"README"}
    assert pages <= {path.stem for path in site.glob("*.html")}
    reference = (site / "api.html").read_text()
    for name, module in simpo._PUBLIC.items():
        assert f'id="{module}.{name}"' in reference, name
    assert (site / "benchmarks/results/nvidia-h100-80gb-hbm3.json").is_file()
    assert "<code>|y|</code>" in (site / "objectives.html").read_text()
    listed = (site / "llms.txt").read_text()
    assert all(f"({page}.html): " in listed for page in pages)


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (380, True)])
def test_pages_are_without_errors_and_accessible(address, width, dark, tmp_path):
    chromium()
    axe = find_spec("axe_playwright_python")
    with Browser(tmp_path) as browser:
        for name in ("index", "quick-start", "objectives", "api"):
            page = browser.open(f"{address}/{name}.html", width=width, dark=dark)
            page.wait("document.readyState === 'complete' && document.querySelector('article h1') !== null")
            assert page.complaints == [], name
            assert all(url.startswith((address, "data:", "blob:")) for url in page.requests)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if axe is not None and name in ("index", "quick-start"):  # it is slow on long pages
                page.evaluate((Path(axe.submodule_search_locations[0]) / "axe.min.js").read_text())
                found = page.evaluate(
                    "axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html).slice(0, 3)]))"
                )
                assert [one for one in found if one[0] in ("serious", "critical")] == [], name
            page.screenshot(tmp_path / f"{name}.png")
