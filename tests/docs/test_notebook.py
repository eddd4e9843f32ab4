"""The example notebook runs from scratch, and its committed state is executed and clean.

With ``SIMPO_WRITE_NOTEBOOK=1``, the executed notebook is written back.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

_NOTEBOOK = Path(__file__).parents[2] / "examples/simpo.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(_NOTEBOOK, as_version=4)


def _code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    # use neither another python3 kernel nor the user's configuration
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    committed = [len(cell.outputs) for cell in _code(notebook)]
    work = tmp_path / "work"
    work.mkdir()
    resources = {"metadata": {"path": str(work)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=120, record_timing=False, resources=resources)
    client.execute()  # raises on an error
    assert [len(cell.outputs) for cell in _code(notebook)] == committed
    assert not list(work.iterdir())
    if os.environ.get("SIMPO_WRITE_NOTEBOOK"):
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, _NOTEBOOK)


def test_the_committed_notebook_is_executed_and_clean(notebook):
    assert [cell.execution_count for cell in _code(notebook)] == list(range(1, len(_code(notebook)) + 1))
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert kinds == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    text = _NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|usr|work|Users)/", text)
    assert len(text) < 200_000
