"""MkDocs hooks (see mkdocs.yml): navigation, API reference, files that pages link to, and llms.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import simpo

_ROOT = Path(__file__).resolve().parents[1]
_INDEX = _ROOT / "docs/README.md"  # lists all pages by section
_API = "api.md"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)\)")


def sections() -> dict[str, list[tuple[str, str, str]]]:
    """Parse the index: the pages under each heading, as title, path relative to ``docs``, and description."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for line in _INDEX.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (.+)", line):
            found[heading[1]] = []
        elif page := re.match(r"- \[(.+?)\]\((.+?)\): (.+)", line):
            found[list(found)[-1]].append((page[1], page[2], page[3]))
    return found


def on_config(config: Any) -> Any:
    """Build the navigation in the order of the index."""
    config.nav = [{"Home": _INDEX.name}]
    for heading, pages in sections().items():
        config.nav.append({heading: [{title: path} for title, path, _ in pages if not path.startswith("../")]})
    config.nav.append({"API": _API})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the API reference, and the repository files that pages link to."""
    lines = ["# API", "", "The public API of `import simpo`. `simpo.compat` provides the same under TRL's names.", ""]
    lines += [f"::: {module}.{name}\n" for name, module in simpo._PUBLIC.items()]
    files.append(File.generated(config, _API, content="\n".join(lines)))
    for page in files.documentation_pages():
        for _, target in _OUTSIDE.findall(page.content_string):
            if _is_copied(target) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(_ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links into the repository to the copies made by :func:`on_files`; write other targets as plain text."""
    return _OUTSIDE.sub(
        lambda link: f"[{link[1]}]({link[2]})" if _is_copied(link[2]) else f"{link[1]} (`{link[2]}`)", markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    """Unescape bars in code: inside a table, GitHub drops the backslash, but Python-Markdown keeps it."""
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace(r"\|", "|"), html)


def on_post_build(config: Any) -> None:
    """Write llms.txt (llmstxt.org), the index with the addresses of all pages."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for heading, pages in sections().items():
        lines += ["", f"## {heading}", ""]
        lines += [
            f"- [{title}]({path.removeprefix('../').replace('.md', '.html')}): {text}" for title, path, text in pages
        ]
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_copied(target: str) -> bool:
    return (_ROOT / target).is_file() and not target.endswith(".md")
