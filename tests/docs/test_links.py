"""Links in the documentation have a target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PAGES = sorted(path.relative_to(_ROOT).as_posix() for path in (*_ROOT.glob("*.md"), *_ROOT.glob("docs/*.md")))
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", _PAGES)
def test_links_have_a_target(name):
    page = _ROOT / name
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), f"{target}#{anchor}"


def test_every_page_is_in_the_index():
    index = (_ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in _ROOT.glob("docs/*.md")} - {"README.md"}
    assert not [page for page in sorted(pages) if f"]({page})" not in index]
