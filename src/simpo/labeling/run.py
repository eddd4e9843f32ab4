"""The ``simpo label`` workflow: one run per folder, which can be opened and exported any number of times."""

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
from simpo.config.text import read_text_file
from simpo.errors import InterruptedRun, SimpoError, third_party
from simpo.evaluation.answers import answers_path
from simpo.evaluation.preferences import agreement_metrics
from simpo.labeling.session import KINDS, Item, Judgment, Session, Store, load_items, pair_items, read_items
from simpo.runs.files import disk_errors, write_lines
from simpo.runs.folder import FILE_NAME as RECORD
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.manifest import file_digest
from simpo.runs.results import Metric, fingerprint, write_results
from simpo.runs.terminal import interruptible
from simpo.statistics import bootstrap_interval, krippendorff_alpha, krippendorff_terms, mean_interval, rate_interval

# ---- Export: preference data, verdicts, and how reliable the judgments are.

PREFERENCES, VERDICTS, JUDGMENTS = "preferences.jsonl", "verdicts.jsonl", "judgments.jsonl"
PREFERENCE_COUNT = "label/preferences"  # name of the metric


def export(items: Sequence[Item], judgments: Sequence[Judgment], folder: Path, *, seed: int) -> list[Metric]:
    """Write the output files of a labeling run and return its metrics.

    - ``preferences.jsonl``: training rows for ``simpo train`` and ``simpo reward``, one per item for which the labelers
      on average prefer an answer: pairs, or all answers with scores if any item has more than two answers.
    - ``verdicts.jsonl``: ``{id, winner, a, b}`` for every item with two answers, for ``simpo compare --judge human:``.
    - ``judgments.jsonl``: every judgment, including skips.

    ``judgments`` holds the current judgments in the order in which they were made.
    """
    judged: dict[str, list[Judgment]] = {item.id: [] for item in items}
    for vote in judgments:
        judged[vote.item] += [vote] if vote.kind != "skip" else []
    pairs_only = all(len(item.responses) == 2 for item in items)
    rows = [_preference_row(item, judged[item.id], pairs_only) for item in items if judged[item.id]]
    preferences = [row for row in rows if row is not None]
    write_lines(folder / PREFERENCES, preferences)
    write_lines(folder / VERDICTS, _verdicts(items, judged))
    write_lines(folder / JUDGMENTS, map(_judgment_row, judgments))
    kinds = Counter(vote.kind for vote in judgments)
    metrics = [
        Metric("label/items", sum(not item.is_tie for item in items)),
        Metric("label/items_judged", len(rows)),
        Metric("label/labelers", len({vote.labeler for vote in judgments})),
        *(Metric(f"label/judgments_{kind}", kinds[kind]) for kind in KINDS),
        Metric(PREFERENCE_COUNT, len(preferences)),
        Metric("label/items_judged_without_a_preference", len(rows) - len(preferences)),
    ]
    not_skipped = [vote for votes in judged.values() for vote in votes]
    return metrics + reliability_metrics(not_skipped, seed) if not_skipped else metrics


def mean_scores(judgments: Sequence[Judgment]) -> list[float]:
    """Return each answer's score ``[K]``: how many answers it beats (a tie counts half), averaged over labelers."""
    ranks = np.array([vote.ranks for vote in judgments], dtype=np.float64)  # [labelers, K]
    better = np.sign(ranks[:, None, :] - ranks[:, :, None])  # [labelers, K, K], 1 if answer i beats answer j
    wins = (better / 2 + 0.5).sum(-1) - 0.5  # minus the tie with itself
    return [float(score) for score in wins.mean(0)]


def _preference_row(item: Item, judgments: Sequence[Judgment], pairs_only: bool) -> dict[str, Any] | None:
    """Build the training row for an item; return None if all answers have the same score."""
    scores = mean_scores(judgments)
    if len(set(scores)) == 1:
        return None
    answers: dict[str, Any] = {"responses": list(item.responses), "scores": scores}
    if pairs_only:
        (_, rejected), (_, chosen) = sorted(zip(scores, item.responses, strict=True))
        answers = {"chosen": chosen, "rejected": rejected}
    labelers = dict.fromkeys(vote.labeler for vote in judgments)
    source = {"id": item.id, "labeler": ", ".join(labelers), "judgments": list(map(_judgment_row, judgments))}
    return {"prompt": item.prompt, **item.columns, **answers, **source}


def _judgment_row(judgment: Judgment) -> dict[str, Any]:
    row = asdict(judgment) | {"seconds": round(judgment.seconds, 3)}
    return {"id": row.pop("item"), "judgment": row.pop("kind"), **row}


def _verdicts(items: Sequence[Item], judged: Mapping[str, Sequence[Judgment]]) -> Iterator[dict[str, Any]]:
    """Yield the winner of every judged item with two answers; identical answers are a tie without being judged."""
    for item in items:
        votes = judged[item.id]
        if len(item.responses) == 2 and (votes or item.is_tie):
            a, b = mean_scores(votes) if votes else (0.0, 0.0)
            answers = dict(zip("ab", item.responses, strict=True))
            winner = "tie" if a == b else "a" if a > b else "b"
            yield {"id": item.id, "winner": winner, **answers, "judgments": len(votes)}


# ---- Reliability.


def reliability_metrics(judgments: Sequence[Judgment], seed: int) -> list[Metric]:
    """Compute inter-labeler agreement, bias toward the answer shown first, and time per item.

    A ranking counts as one verdict for each of its pairs of answers: the first is better, the second is better, or
    neither. The bootstrap resamples whole items. ``judgments`` must not be empty or contain skips.
    """
    # Per judgment, [pairs of answers]: 1 if the first is better, 0.5 for a tie, 0 if the second is better.
    verdicts = {
        (vote.labeler, vote.item): np.array([(np.sign(b - a) + 1) / 2 for a, b in combinations(vote.ranks, 2)])
        for vote in judgments
    }
    labelers = list(dict.fromkeys(vote.labeler for vote in judgments))
    metrics = [_alpha(verdicts, seed)]
    for pair in combinations(labelers, 2):
        both = [item for name, item in verdicts if name == pair[0] and (pair[1], item) in verdicts]
        first, second = (np.concatenate([[], *(verdicts[name, item] for item in both)]) for name in pair)
        item_of_verdict = [index for index, item in enumerate(both) for _ in verdicts[pair[0], item]]
        metrics += agreement_metrics("+".join(map(_quoted, pair)), np.array(item_of_verdict), first, second, seed)
    metrics.append(_first_shown(judgments))
    seconds = {"": [vote.seconds for vote in judgments]}
    for name in labelers if len(labelers) > 1 else ():
        seconds[f"/{name}"] = [vote.seconds for vote in judgments if vote.labeler == name]
    metrics.append(Metric.of("seconds_per_item", mean_interval(seconds[""])))
    return metrics + [
        Metric(f"seconds_per_item_median{suffix}", float(np.median(times)), n=len(times))
        for suffix, times in seconds.items()
    ]


def _quoted(name: str) -> str:
    """Quote a labeler's name if it could make the metric name ``A+B`` ambiguous."""
    return json.dumps(name, ensure_ascii=False) if set(name) & set('+"') else name


def _alpha(verdicts: Mapping[tuple[str, str], np.ndarray], seed: int) -> Metric:
    """Compute Krippendorff's alpha for all labelers, over the items judged by at least two of them."""
    counts: dict[str, np.ndarray] = {}  # verdicts of each kind per item, [pairs of answers, 3]
    for (_, item), verdict in verdicts.items():
        counts[item] = counts.get(item, 0) + np.eye(3)[(2 * verdict).astype(int)]
    terms = np.array([krippendorff_terms(count).sum(0) for count in counts.values()])
    terms = terms[terms[:, :-1].any(axis=1)]
    if not len(terms):
        return Metric("krippendorff_alpha", None, n=0)
    return Metric.of("krippendorff_alpha", bootstrap_interval(terms, krippendorff_alpha, seed=seed))


def _first_shown(judgments: Sequence[Judgment]) -> Metric:
    """Compute how often the answer shown first won, among comparisons with a winner; 0.5 means no position bias."""
    shares = []
    for vote in judgments:
        shown = [vote.ranks[index] for index in vote.shown]
        won = [first < second for first, second in combinations(shown, 2) if first != second]
        shares += [sum(won) / len(won)] if won else []
    return (
        Metric.of("first_shown_preferred", rate_interval(shares))
        if shares
        else Metric("first_shown_preferred", None, n=0)
    )


# ---- The run.

ITEMS, DATABASE = "items.jsonl", "judgments.sqlite"
_TOKEN = ".token"  # noqa: S105 - a file name; the token is kept so that an open page survives a restart of the command
_GUIDELINES = Path(__file__).parent / "page" / "guidelines.txt"


@dataclass(kw_only=True)
class LabelSettings:
    """Settings of ``simpo label``: the answers to judge, the page, and the export."""

    answers: str | None = setting(
        None,
        "File of answers or output folder of simpo sample: two answers per prompt are compared, more are ranked.",
        positional="ANSWERS",
    )
    against: str | None = setting(None, "A second model's answers; every answer is compared with each of them.")
    output_dir: Path | None = setting(None, "Output folder; give the same one again to continue.")
    pairs: bool = setting(False, "Compare all pairs of answers to a prompt instead of ranking the answers.")
    overlap: float = setting(0.2, "Share of items judged by all labelers; the rest are judged once.", least=0, most=1)
    guidelines: Path | None = setting(None, "Text file shown to labelers (default: a few sentences).")
    seed: int = setting(42, "Seed for the order of items and answers, and for the bootstrap.")
    port: int = setting(8765, "Local port of the page; 0 picks a free one.")
    export: Path | None = setting(None, "Folder of a labeling run: write its preference data and agreement, then exit.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.export is not None:
            if self.answers or self.against or self.output_dir:
                raise SimpoError("export: the folder already has all inputs; leave out ANSWERS, against and output_dir")
        elif self.answers is None or self.output_dir is None:
            missing = "output_dir" if self.answers else "answers"
            raise SimpoError(f"{missing} is missing: give ANSWERS and --output_dir, or --export FOLDER")
        if self.against is not None and self.pairs:
            raise SimpoError("pairs: answers of two models are always compared in pairs; leave this option out")


def label(settings: LabelSettings, *, argv: Sequence[str] = ()) -> int:
    """Serve the page until Ctrl-C or SIGTERM; return the number of items judged so far."""
    try:
        from simpo.labeling.server import listen, make_app, serve  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise SimpoError(f"simpo label needs {error.name}: pip install 'simpo[label]'") from error
    assert settings.answers is not None and settings.output_dir is not None
    folder = settings.output_dir
    paths = [answers_path(name) for name in (settings.answers, settings.against) if name is not None]
    with third_party(f"guidelines: {settings.guidelines} cannot be read"):
        guidelines = read_text_file(settings.guidelines or _GUIDELINES).strip()
    with RunFolder(folder, command="label") as run:
        items, dropped = pair_items(*paths) if len(paths) > 1 else read_items(paths[0], pairs=settings.pairs)
        with closing(listen(settings.port)) as listening:
            identity = {f"answers {number}": file_digest(path) for number, path in enumerate(paths)}
            identity |= {"pairs": str(settings.pairs), "seed": str(settings.seed)}
            run.begin(identity | {"guidelines": fingerprint(guidelines)}, argv=argv)
            write_lines(folder / ITEMS, [item.row() for item in items])
            to_judge = [item for item in items if not item.is_tie]
            run.log(f"{len(to_judge):,} items to judge")
            for reason, count in dropped.items():
                run.log(f"  not shown: {count:,} {reason.replace('_', ' ')}")
            with closing(Store(folder / DATABASE)) as store:
                session = Session(to_judge, store, seed=settings.seed, overlap=settings.overlap)
                token = _token(folder)
                port = listening.getsockname()[1]
                # Printed but not logged, because the address contains the token.
                print(f"open:  http://127.0.0.1:{port}/?{urlencode({'token': token})}")
                print("stop:  Ctrl-C (judgments are saved as they are made)")
                try:
                    with interruptible():
                        serve(make_app(session, token=token, guidelines=guidelines), listening)
                except InterruptedRun:
                    pass  # the normal way to stop
                return len({vote.item for vote in store.judgments() if vote.kind != "skip"})


def export_run(folder: Path) -> Path:
    """Export the judgments made so far with :func:`export`; the page may be open meanwhile.

    Returns the path of ``results.json``.
    """
    if not (folder / DATABASE).exists() or not (folder / RECORD).exists():
        raise SimpoError(f"export: {folder} is not a run of simpo label; give the output_dir of one")
    record = RunRecord.read(folder)
    with closing(Store(folder / DATABASE)) as store:
        judgments = store.judgments()
    if not judgments:
        raise SimpoError(f"export: nothing has been judged in {folder} yet; open its page with simpo label")
    metrics = export(load_items(folder / ITEMS), judgments, folder, seed=int(record.identity["seed"]))
    return write_results(folder, command="label", fingerprint=record.fingerprint, metrics=metrics)


def _token(folder: Path) -> str:
    """Return the run's secret token, creating it if needed; only the file's owner can read it."""
    path = folder / _TOKEN
    with disk_errors(path):
        path.touch(0o600)
        if not path.read_text(encoding="utf-8"):  # just created, or left empty by a killed process
            path.write_text(secrets.token_urlsafe(24), encoding="utf-8")
        return path.read_text(encoding="utf-8")
