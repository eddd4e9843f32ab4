"""The prompts on which two models' answers differ most, for people to read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from simpo.atomic import write_text
from simpo.evaluation.preferences import Judged
from simpo.judges.protocol import Pair, as_text

_SHOWN = 10


def widest_differences(judged: Judged, margins: dict[str, np.ndarray]) -> list[int]:
    """The pairs with the clearest verdicts, one of a prompt at most, the clearest first.

    How clear is how far the judges' mean verdict is from a tie, no verdict being one; between equals the first judge
    with scores decides, by how far its scores are apart.

    Args:
        judged: pairs and verdicts.
        margins: judge -> ``[P]``, differences of scores, of those judges that have them.
    """
    clear = np.abs(np.mean([np.nan_to_num(verdicts - 0.5) for verdicts in judged.verdicts.values()], axis=0))
    apart = np.abs(next(iter(margins.values()))) if margins else np.zeros(len(clear))
    chosen: dict[int, int] = {}  # prompt -> its clearest pair
    for index in np.lexsort((-apart, -clear)):
        if clear[index] > 0:
            chosen.setdefault(int(judged.prompts[index]), int(index))
    return list(chosen.values())[:_SHOWN]


def write_differences(path: Path, judged: Judged, margins: dict[str, np.ndarray], names: tuple[str, str]) -> None:
    """Write :func:`widest_differences` as Markdown.

    Args:
        path: the file.
        judged: pairs and verdicts.
        margins: as above.
        names: of the models.
    """
    chosen = widest_differences(judged, margins)
    parts = [f"# Where A ({names[0]}) and B ({names[1]}) differ most\n"]
    if not chosen:
        parts.append("No verdict for either.\n")
    for index in chosen:
        verdicts = _verdicts(index, judged, margins)
        parts += _section(judged.pairs[index], verdicts)
    write_text(path, "\n".join(parts))


def _verdicts(index: int, judged: Judged, margins: dict[str, np.ndarray]) -> Iterable[str]:
    for judge, verdicts in judged.verdicts.items():
        apart = f" (scores {margins[judge][index]:+.4g})" if judge in margins else ""
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
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"**{title}**\n", f"{fence}text", text, f"{fence}\n"]
