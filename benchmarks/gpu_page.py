"""Write the tables of GPU measurements into docs/performance.md: python -m benchmarks.gpu_page

The measurements come from ``benchmarks/gpu.sh`` and are stored in ``benchmarks/results``, one JSON file per GPU.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- gpu: (?P<card>\S+) (?P<section>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update_tables(text: str) -> str:
    """Rewrite the table between every ``<!-- gpu: CARD SECTION -->`` and its ``<!-- end -->`` in ``text``."""

    def block(match: re.Match[str]) -> str:
        found = json.loads((RESULTS / f"{match['card']}.json").read_text())[match["section"]]
        table = _variants(found) if "variants" in found else _entrants(found)
        return f"{match[1]}{table}\n{match[4]}"

    return _BLOCK.sub(block, text)


def _variants(found: dict[str, Any]) -> str:
    """Format a ``profile_step`` measurement: one row per variant of simpo on the same model."""
    rows = []
    for one in found["variants"]:
        name = one["name"].removeprefix("simpo ")
        if "failed" in one:
            rows.append(f"| {name} | {one['failed'].partition(': ')[2]} | | |")
        else:
            gib = f"{one['peak_mib'] / 1024:.1f} GiB"
            rows.append(f"| {name} | {one['tokens_per_second']:,.0f} | {one['utilisation']:.1%} | {gib} |")
    return "\n".join(["| simpo's settings | tokens/s | MFU | peak |", "|---|---:|---:|---:|", *rows])


def _entrants(found: dict[str, Any]) -> str:
    """Format a ``compare`` measurement: entrants from fastest to slowest, then those that were not measured."""
    rows = []
    for one in sorted(found["entrants"], key=lambda each: each["speed_ratio"]):
        numbers = f"{one['tokens_per_second']:,.0f} | {one['utilisation']:.1%} | {one['peak_mib'] / 1024:.1f} GiB"
        rows.append(f"| {one['name']} | {numbers} | {one['speed_ratio']:.2f} | {one['bound']:.2f} |")
    for name, reason in found["absent"].items():
        rows.append(f"| {name} | {reason.partition('. ')[0]} | | | | |")
    head = "| | tokens/s | MFU | peak | slower by | counted |\n|---|---:|---:|---:|---:|---:|"
    return "\n".join([head, *rows])


if __name__ == "__main__":
    PAGE.write_text(update_tables(PAGE.read_text()))
