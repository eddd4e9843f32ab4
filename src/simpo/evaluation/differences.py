"""What judges said, written down: every pair for programs, the clearest ones for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simpo.atomic import write_text
from simpo.evaluation.preferences import Judged
from simpo.judges.protocol import Pair, as_text
from simpo.runs.lines import JsonLines
from simpo.terminal import printable

_SHOWN = 10


def write_verdicts(path: Path, judged: Judged) -> None:
    """Write every pair with its answers, verdicts (null where there is none) and margins as JSON lines."""
    lines = JsonLines(path)
    lines.keep(0)
    lines.append(
        {
            **{"id": pair.id, "prompt": pair.prompt, **pair.context.columns, "a": pair.a, "b": pair.b},
            "verdicts": {name: float(values[index]) for name, values in judged.verdicts.items()},
            "margins": {name: float(values[index]) for name, values in judged.margins.items()},
        }
        for index, pair in enumerate(judged.pairs)
    )


def widest_differences(judged: Judged) -> list[int]:
    """The pairs with the clearest verdicts, one of a prompt at most, the clearest first.

    How clear is how far the judges' mean verdict is from a tie, no verdict being one; between equals the first judge
    with scores decides, by how far its scores are apart.
    """
    clear = np.abs(np.mean([np.nan_to_num(verdicts - 0.5) for verdicts in judged.verdicts.values()], axis=0))
    apart = np.abs(next(iter(judged.margins.values()), np.zeros(len(clear))))
    chosen: dict[int, int] = {}  # prompt -> its clearest pair
    for index in np.lexsort((-apart, -clear)):
        if clear[index] > 0:
            chosen.setdefault(int(judged.prompts[index]), int(index))
    return list(chosen.values())[:_SHOWN]


def write_differences(path: Path, judged: Judged, names: tuple[str, str]) -> None:
    """Write :func:`widest_differences` as Markdown.

    Args:
        path: the file.
        judged: pairs and verdicts.
        names: of the models.
    """
    chosen = widest_differences(judged)
    parts = [f"# Where A ({names[0]}) and B ({names[1]}) differ most\n"]
    if not chosen:
        parts.append("No verdict for either.\n")
    for index in chosen:
        parts += _section(judged.pairs[index], _verdicts(index, judged))
    write_text(path, "\n".join(parts))


def _verdicts(index: int, judged: Judged) -> Iterable[str]:
    for judge, verdicts in judged.verdicts.items():
        apart = f" (scores {judged.margins[judge][index]:+.4g})" if judge in judged.margins else ""
        yield f"{judge}: {_said(verdicts[index])}{apart}"


def _said(verdict: float) -> str:
    if np.isnan(verdict):
        return "no verdict"
    if verdict == 0.5:
        return "tie"
    return "A better" if verdict > 0.5 else "B better"


def _section(pair: Pair, verdicts: Iterable[str]) -> list[str]:
    return [
        f"## {pair.id}\n",
        "; ".join(verdicts) + "\n",
        *_quoted("Prompt", as_text(pair.prompt)),
        *_quoted("A", pair.a),
        *_quoted("B", pair.b),
    ]


def _quoted(title: str, text: str) -> list[str]:
    """As it is, between fences that are longer than any in it."""
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"**{title}**\n", f"{fence}text", text, f"{fence}\n"]
