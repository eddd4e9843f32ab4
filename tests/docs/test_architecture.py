"""The architecture page matches the modules' docstrings, and no file or function is too long."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SCRIPT = _ROOT / "docs/architecture.py"
_LONGEST_FILE, _LONGEST_FUNCTION = 500, 60  # lines


def test_every_module_has_its_line():
    spec = importlib.util.spec_from_file_location("architecture", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = module.PAGE.read_text(encoding="utf-8") == module.page()
    assert current, "docs/architecture.md is not what the docstrings say; run: python docs/architecture.py"


@pytest.mark.parametrize(
    "path", (_ROOT / "src").rglob("*.py"), ids=lambda path: path.relative_to(_ROOT / "src").as_posix()
)
def test_files_and_functions_are_not_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= _LONGEST_FILE
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    too_long = [node.name for node in functions if node.end_lineno - node.lineno >= _LONGEST_FUNCTION]
    assert not too_long
