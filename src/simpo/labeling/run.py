"""The workflow of ``simpo label``: one run in one folder, which is opened and exported as often as its people like."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from simpo.config import setting
from simpo.errors import InterruptedRun, SimpoError, third_party
from simpo.evaluation.answers import answers_path
from simpo.labeling.export import export
from simpo.labeling.session import Session, Store, items_of_one, items_of_two, load_items, read_judgments
from simpo.runs.files import disk_errors, write_lines
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.manifest import file_digest
from simpo.runs.results import fingerprint, write_results
from simpo.runs.terminal import interruptible

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
    overlap: float = setting(0.2, "Share of the items that every labeler judges; the others are judged by one.")
    guidelines: Path | None = setting(None, "Text file that is shown to labelers (default: a few sentences).")
    seed: int = setting(42, "Seed of the order of items and answers, and of the bootstrap.")
    port: int = setting(8765, "Port of the page on this machine; 0 is any that is free.")
    export: Path | None = setting(None, "Folder of a labeling run: write preference data and agreement, and end.")

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise SimpoError(f"overlap: {self.overlap} is not a share; give a number from 0 to 1")
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
    """Write what was judged so far, also while the page is open, by :func:`~simpo.labeling.export.export`.

    Returns the path of ``results.json``.
    """
    try:
        record = RunRecord.read(folder)
    except FileNotFoundError:
        record = None
    if record is None or record.command != "label" or not (folder / DATABASE).exists():
        raise SimpoError(f"export: {folder} holds no run of simpo label; name the output_dir of one")
    judgments = read_judgments(folder / DATABASE)
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
