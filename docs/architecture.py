"""Generate the file tree in architecture.md from the modules' docstrings: python docs/architecture.py"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
_START = "<!-- tree -->\n"


def page() -> str:
    """Return the page with a current tree: one line per module, from the first line of its docstring."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(_START)[0] + _START + _tree()


def _tree() -> str:
    """Return one table per package, in alphabetical order."""
    source = ROOT / "src" / "simpo"
    folders = sorted({path.parent for path in source.rglob("*.py")})
    return "\n".join(_table(folder, folder.relative_to(source.parent)) for folder in folders)


def _table(folder: Path, name: Path) -> str:
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    rows = "".join(f"| `{path.name}` | {_summary(path)} |\n" for path in modules)
    heading = f"\n### `{name.as_posix()}`\n\n{_summary(folder / '__init__.py')}\n"
    return heading + (f"\n| file | subject |\n|---|---|\n{rows}" if rows else "")


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
