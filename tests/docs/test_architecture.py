"""The page of files is what the modules' docstrings say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "docs/architecture.py"


def test_every_module_has_its_line():
    spec = importlib.util.spec_from_file_location("architecture", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = module.PAGE.read_text(encoding="utf-8") == module.page()
    assert current, "docs/architecture.md is not what the docstrings say; run: python docs/architecture.py"
