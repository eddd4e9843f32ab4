"""The workflow of ``simpo label``: one run in one folder, opened and exported as often as its people like."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from simpo.config import check_values, setting
from simpo.errors import InterruptedRun, SimpoError, third_party
from simpo.evaluation.answers import answers_path
from simpo.evaluation.preferences import agreement_metrics
from simpo.labeling.session import KINDS, Item, Judgment, Session, Store, items_of_one, items_of_two, load_items
from simpo.runs.files import disk_errors, write_lines
from simpo.runs.folder import FILE_NAME as RECORD
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric, fingerprint, write_results
from simpo.runs.terminal import interruptible
from simpo.statistics import bootstrap_interval, krippendorff_alpha, krippendorff_terms, mean_interval, rate_interval

# ---- Judgments to preference data, verdicts and their reliability.

PREFERENCES, VERDICTS, JUDGMENTS = "preferences.jsonl", "verdicts.jsonl", "judgments.jsonl"
PREFERENCE_COUNT = "label/preferences"  # the metric


def export(items: Sequence[Item], judgments: Sequence[Judgment], folder: Path, *, seed: int) -> list[Metric]:
    """Write the files of a labeling run.

    - ``preferences.jsonl``: the rows that ``simpo train`` and ``simpo reward`` read, one for every item of which the
      labelers on the whole prefer an answer: a pair, or all answers with their scores if any item has more than two.
    - ``verdicts.jsonl``: ``{id, winner, a, b}`` of every item with two answers, for ``simpo compare --judge human:``.
    - ``judgments.jsonl``: every judgment, skipped items included.

    ``judgments`` are those that count, in the order in which they were made.
    """
    judged: dict[str, list[Judgment]] = {item.id: [] for item in items}
    for one in judgments:
        judged[one.item] += [one] if one.kind != "skip" else []
    pairs_only = all(len(item.responses) == 2 for item in items)
    rows = [_preference(item, judged[item.id], pairs_only) for item in items if judged[item.id]]
    preferences = [row for row in rows if row is not None]
    write_lines(folder / PREFERENCES, preferences)
    write_lines(folder / VERDICTS, _verdicts(items, judged))
    write_lines(folder / JUDGMENTS, map(_judgment_row, judgments))
    kinds = Counter(one.kind for one in judgments)
    metrics = [
        Metric("label/items", sum(not item.is_tie for item in items)),
        Metric("label/items_judged", len(rows)),
        Metric("label/labelers", len({one.labeler for one in judgments})),
        *(Metric(f"label/judgments_{kind}", kinds[kind]) for kind in KINDS),
        Metric(PREFERENCE_COUNT, len(preferences)),
        Metric("label/items_judged_without_a_preference", len(rows) - len(preferences)),
    ]
    counted = [one for found in judged.values() for one in found]
    return metrics + reliability_metrics(counted, seed) if counted else metrics


def scores_of(judgments: Sequence[Judgment]) -> list[float]:
    """The number of other answers that an answer beats, a tie counting half; the mean over the labelers."""
    ranks = np.array([one.ranks for one in judgments], dtype=np.float64)  # [labelers, K]
    better = np.sign(ranks[:, None, :] - ranks[:, :, None])  # [labelers, K, K], 1 where the answer's rank is lower
    wins = (better / 2 + 0.5).sum(-1) - 0.5  # without the answer itself
    return [float(score) for score in wins.mean(0)]


def _preference(item: Item, judgments: Sequence[Judgment], pairs_only: bool) -> dict[str, Any] | None:
    """The row of an item; None if no answer is better than another."""
    scores = scores_of(judgments)
    if len(set(scores)) == 1:
        return None
    answers: dict[str, Any] = {"responses": list(item.responses), "scores": scores}
    if pairs_only:
        (_, rejected), (_, chosen) = sorted(zip(scores, item.responses, strict=True))
        answers = {"chosen": chosen, "rejected": rejected}
    names = dict.fromkeys(one.labeler for one in judgments)
    about = {"id": item.id, "labeler": ", ".join(names), "judgments": list(map(_judgment_row, judgments))}
    return {"prompt": item.prompt, **item.columns, **answers, **about}


def _judgment_row(judgment: Judgment) -> dict[str, Any]:
    row = asdict(judgment) | {"seconds": round(judgment.seconds, 3)}
    return {"id": row.pop("item"), "judgment": row.pop("kind"), **row}


def _verdicts(items: Sequence[Item], judged: Mapping[str, Sequence[Judgment]]) -> Iterator[dict[str, Any]]:
    """The winner of every item with two answers that was judged; identical answers tie by themselves."""
    for item in items:
        found = judged[item.id]
        if len(item.responses) == 2 and (found or item.is_tie):
            a, b = scores_of(found) if found else (0.0, 0.0)
            answers = dict(zip("ab", item.responses, strict=True))
            winner = "tie" if a == b else "a" if a > b else "b"
            yield {"id": item.id, "winner": winner, **answers, "judgments": len(found)}


# ---- Can the judgments be relied upon?


def reliability_metrics(judgments: Sequence[Judgment], seed: int) -> list[Metric]:
    """Agreement of the labelers beyond chance, preference for what is shown first, and time.

    A ranking is compared answer by answer: of every two answers it says that the first is better, the second, or
    neither. Resampling for intervals takes an item as a whole.

    There is at least one judgment, and none of them is a skip.
    """
    # [pairs of answers] of each judgment: 1 if the first is better, 0.5 for neither, 0 if the second is
    verdicts = {
        (one.labeler, one.item): np.array([(np.sign(b - a) + 1) / 2 for a, b in combinations(one.ranks, 2)])
        for one in judgments
    }
    labelers = list(dict.fromkeys(one.labeler for one in judgments))
    metrics = [_alpha(verdicts, seed)]
    for pair in combinations(labelers, 2):
        both = [item for name, item in verdicts if name == pair[0] and (pair[1], item) in verdicts]
        first, second = (np.concatenate([[], *(verdicts[name, item] for item in both)]) for name in pair)
        places = [place for place, item in enumerate(both) for _ in verdicts[pair[0], item]]
        metrics += agreement_metrics("+".join(map(_quoted, pair)), np.array(places), first, second, seed)
    metrics.append(_first_shown(judgments))
    seconds = {"": [one.seconds for one in judgments]}
    for name in labelers if len(labelers) > 1 else ():
        seconds[f"/{name}"] = [one.seconds for one in judgments if one.labeler == name]
    metrics.append(Metric.of("seconds_per_item", mean_interval(seconds[""])))
    return metrics + [
        Metric(f"seconds_per_item_median{of}", float(np.median(found)), n=len(found)) for of, found in seconds.items()
    ]


def _quoted(name: str) -> str:
    """A labeler's name next to another one in the name of a metric, which no other two have."""
    return json.dumps(name, ensure_ascii=False) if set(name) & set('+"') else name


def _alpha(verdicts: Mapping[tuple[str, str], np.ndarray], seed: int) -> Metric:
    """Krippendorff's alpha of all labelers, over items that at least two of them judged."""
    counts: dict[str, np.ndarray] = {}  # [pairs of answers, 3] of each item
    for (_, item), found in verdicts.items():
        counts[item] = counts.get(item, 0) + np.eye(3)[(2 * found).astype(int)]
    terms = np.array([krippendorff_terms(found).sum(0) for found in counts.values()])
    terms = terms[terms[:, :-1].any(axis=1)]
    if not len(terms):
        return Metric("krippendorff_alpha", None, n=0)
    return Metric.of("krippendorff_alpha", bootstrap_interval(terms, krippendorff_alpha, seed=seed))


def _first_shown(judgments: Sequence[Judgment]) -> Metric:
    """Share of the comparisons with a winner that the answer shown first won; without position bias it is a half."""
    shares = []
    for one in judgments:
        shown = [one.ranks[place] for place in one.shown]
        won = [first < second for first, second in combinations(shown, 2) if first != second]
        shares += [sum(won) / len(won)] if won else []
    return (
        Metric.of("first_shown_preferred", rate_interval(shares))
        if shares
        else Metric("first_shown_preferred", None, n=0)
    )


# ---- The run.

ITEMS, DATABASE = "items.jsonl", "judgments.sqlite"
_TOKEN = ".token"  # noqa: S105 - a file; kept, so that a page that is open stays valid when the command runs again
_GUIDELINES = Path(__file__).parent / "page" / "guidelines.txt"


@dataclass(kw_only=True)
class LabelSettings:
    """The answers to judge and the settings of the page."""

    answers: str | None = setting(
        None,
        "File of answers, or folder of simpo sample: two to a prompt are compared, more are ranked.",
        positional="ANSWERS",
    )
    against: str | None = setting(None, "Another model's answers; each is compared with each of the first's.")
    output_dir: Path | None = setting(None, "Folder of the run; the same one continues it.")
    pairs: bool = setting(False, "Compare every two answers to a prompt instead of ranking them all.")
    overlap: float = setting(0.2, "Share of items that every labeler judges; one judges the others.", least=0, most=1)
    guidelines: Path | None = setting(None, "Text file that is shown to labelers (default: a few sentences).")
    seed: int = setting(42, "Seed of the order of items and answers, and of the bootstrap.")
    port: int = setting(8765, "Port of the page on this machine; 0 is any that is free.")
    export: Path | None = setting(None, "Folder of a labeling run: write preference data and agreement, and end.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.export is not None:
            if self.answers or self.against or self.output_dir:
                raise SimpoError("export: that folder has everything; leave ANSWERS, against and output_dir out")
        elif self.answers is None or self.output_dir is None:
            missing = "output_dir" if self.answers else "answers"
            raise SimpoError(f"{missing} is missing: give ANSWERS and --output_dir, or --export FOLDER")
        if self.against is not None and self.pairs:
            raise SimpoError("pairs: answers of two models are always compared in pairs; leave it out")


def label(settings: LabelSettings, *, argv: Sequence[str] = ()) -> int:
    """Open the page until Ctrl-C or SIGTERM; returns the number of items that have been judged so far."""
    try:
        from simpo.labeling.server import listen, make_app, serve  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError(f"simpo label needs {error.name}: pip install 'simpo[label]'") from error
    assert settings.answers is not None and settings.output_dir is not None
    folder = settings.output_dir
    paths = [answers_path(name) for name in (settings.answers, settings.against) if name is not None]
    with third_party(f"guidelines: {settings.guidelines} cannot be read"):
        guidelines = (settings.guidelines or _GUIDELINES).read_text(encoding="utf-8").strip()
    with RunFolder(folder, command="label") as run:
        items, dropped = items_of_two(*paths) if len(paths) > 1 else items_of_one(paths[0], pairs=settings.pairs)
        with closing(listen(settings.port)) as listening:
            identity = {f"answers {number}": file_digest(path) for number, path in enumerate(paths)}
            identity |= {"pairs": str(settings.pairs), "seed": str(settings.seed)}
            run.begin(identity | {"guidelines": fingerprint(guidelines)}, argv=argv)
            write_lines(folder / ITEMS, [item.row() for item in items])
            asked = [item for item in items if not item.is_tie]
            run.log(f"{len(asked):,} items to judge")
            for reason, count in dropped.items():
                run.log(f"  not shown: {count:,} {reason.replace('_', ' ')}")
            with closing(Store(folder / DATABASE)) as store:
                session = Session(asked, store, seed=settings.seed, overlap=settings.overlap)
                token = _token(folder)
                port = listening.getsockname()[1]
                # Not logged, because it contains the token.
                print(f"open:  http://127.0.0.1:{port}/?{urlencode({'token': token})}")
                print("stop:  Ctrl-C (every judgment is stored when it is made)")
                try:
                    with interruptible():
                        serve(make_app(session, token=token, guidelines=guidelines), listening)
                except InterruptedRun:
                    pass  # the usual end
                return len({one.item for one in store.judgments() if one.kind != "skip"})


def export_run(folder: Path) -> Path:
    """Write what was judged so far, also while the page is open, by :func:`export`.

    Returns the path of ``results.json``.
    """
    if not (folder / DATABASE).exists() or not (folder / RECORD).exists():
        raise SimpoError(f"export: {folder} holds no run of simpo label; name the output_dir of one")
    record = RunRecord.read(folder)
    with closing(Store(folder / DATABASE)) as store:  # also while the page is open
        judgments = store.judgments()
    if not judgments:
        raise SimpoError(f"export: nothing has been judged in {folder} yet; open its page with simpo label")
    metrics = export(load_items(folder / ITEMS), judgments, folder, seed=int(record.identity["seed"]))
    return write_results(folder, command="label", fingerprint=record.fingerprint, metrics=metrics)


def _token(folder: Path) -> str:
    """The secret of this run, which only its owner can read; new if there is none."""
    path = folder / _TOKEN
    with disk_errors(path):
        path.touch(0o600)
        if not path.read_text(encoding="utf-8"):  # new, or left empty by a killed process
            path.write_text(secrets.token_urlsafe(24), encoding="utf-8")
        return path.read_text(encoding="utf-8")
