"""What a sweep ends in: the table of its trials, their figures, the best recipe, and what to try next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simpo.errors import SimpoError
from simpo.runs.atomic import write_text
from simpo.runs.log import redact
from simpo.runs.results import FILE_NAME, Metric, print_whole, read_results
from simpo.workflows.sweep.space import Axis, shown
from simpo.workflows.sweep.study import TrialResult


def rank(tried: Sequence[TrialResult], *, smaller_is_better: bool) -> list[TrialResult]:
    """The finished trials, the best first; of equals the one with the lowest number. Repeated ones are left out.

    Raises:
        SimpoError: none has finished; says why the first one failed.
    """
    finished = [trial for trial in tried if trial.value is not None and trial.same_as is None]
    if not finished:
        why = next((f"; trial {t.number}: {t.reason}" for t in tried if t.state == "failed"), "")
        raise SimpoError(f"none of the {len(tried)} trials has finished{why}")
    sign = 1 if smaller_is_better else -1
    return sorted(finished, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def sweep_metrics(
    tried: Sequence[TrialResult], found: Mapping[int, Metric], *, smaller_is_better: bool
) -> list[Metric]:
    """How many trials ended how, the best one, and every finished trial's figure, the best first.

    Args:
        tried: all trials.
        found: by number, the metric of the trials that have finished.
        smaller_is_better: whether the metric is to be small.
    """
    ranked = rank(tried, smaller_is_better=smaller_is_better)
    states = [trial.state for trial in tried]
    best = found[ranked[0].number]
    return [
        Metric("trials/finished", len(ranked)),
        *(Metric(f"trials/{state}", states.count(state)) for state in ("pruned", "failed")),
        Metric("best/trial", ranked[0].number),
        dataclasses.replace(best, name=f"best/{best.name}", stage=None),
        *(_of_trial(trial, found[trial.number]) for trial in ranked),
    ]


def _of_trial(trial: TrialResult, metric: Metric) -> Metric:
    return dataclasses.replace(metric, name=f"{_folder(trial)}/{metric.name}", stage=None)


def _folder(trial: TrialResult) -> str:
    return f"trials/{trial.number:03d}"


def write_best(
    path: Path, best: TrialResult, metric: Metric, recipe: Mapping[str, Any], fixed: Mapping[str, Sequence[str]]
) -> None:
    """The recipe with the best trial's values, without an output folder, and without secrets.

    Args:
        path: the file.
        best: the trial.
        metric: what it reached.
        recipe: the keys of the recipe that was swept, as written.
        fixed: the options that all trials had.
    """
    given: dict[str, Any] = {key: value for key, value in recipe.items() if key != "output_dir"}
    given |= {key: _plain(texts) for key, texts in fixed.items()}
    given |= {key: yaml.safe_load(value) for key, value in best.values.items()}
    text = yaml.safe_dump(redact(given), sort_keys=False, allow_unicode=True, width=120)
    head = f"# Trial {best.number} of a sweep, the best by {metric.name}: {_shown(metric)} ({shown(best.values)}).\n"
    write_text(path, f"{head}# simpo train {path} --output_dir DIR\n\n{text}")


def _plain(texts: Sequence[str]) -> Any:
    """An option's values as YAML has them."""
    values = [yaml.safe_load(text) for text in texts]
    return values if len(values) > 1 else (values[0] if values else True)


def print_table(
    folder: Path, tried: Sequence[TrialResult], axes: Sequence[Axis], metric: str, console: Console | None = None
) -> None:
    """Print all trials, the best first, with the figures of ``folder/results.json``, and what to think of them."""
    figures = {found.name: found for found in read_results(folder / FILE_NAME).metrics}
    names = {f"{_folder(trial)}/{metric}": trial for trial in tried}
    ranked = [(names[name], figures[name]) for name in figures if name in names]  # the file has them in order
    unfinished = [trial for trial in tried if trial.state in ("pruned", "failed")]
    table = Table(title=Text("simpo sweep"), box=SIMPLE_HEAD)
    for heading in ("trial", *(axis.key for axis in axes), metric.removeprefix("eval_")):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for trial, figure in ranked:
        table.add_row(*_cells(trial, axes, _shown(figure)))
    for trial in unfinished:
        table.add_row(*_cells(trial, axes, trial.state))
    console = console or Console()
    print_whole(console, table)
    for line in (*_remarks(ranked, axes), *_fates(tried)):
        console.print(Text(line), soft_wrap=True)


def _cells(trial: TrialResult, axes: Sequence[Axis], figure: str) -> list[Text]:
    # Text, so that rich does not take brackets for its markup.
    return [Text(cell) for cell in (str(trial.number), *(trial.values.get(axis.key, "") for axis in axes), figure)]


def _shown(metric: Metric) -> str:
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.3g}, {metric.high:.3g}]"
    return f"{metric.value:.4g}{interval}"


def _remarks(ranked: Sequence[tuple[TrialResult, Metric]], axes: Sequence[Axis]) -> Iterator[str]:
    """How sure the choice is, and where to look further."""
    best, figure = ranked[0]
    if figure.low is not None and figure.high is not None:
        close = sum(_may_be_equal(figure, other.value or 0.0) for _, other in ranked[1:])
        if close:
            yield (
                f"{close} of the other {len(ranked) - 1} finished trials lie within the interval of the best: on "
                f"{figure.n} pairs such differences may be chance"
            )
    for axis in axes:
        end = axis.edge(best.values[axis.key])
        elsewhere = [other.value for trial, other in ranked if trial.values[axis.key] != best.values[axis.key]]
        if end is not None and not any(_may_be_equal(figure, value or 0.0) for value in elsewhere):
            further = "larger" if end == "largest" else "smaller"
            yield f"{axis.key}: the best, {best.values[axis.key]}, is the {end} that was tried; try {further} ones too"


def _may_be_equal(best: Metric, value: float) -> bool:
    """Whether ``value`` is the best one's, or within its interval."""
    return value == best.value or (best.low is not None and best.high is not None and best.low <= value <= best.high)


def _fates(tried: Sequence[TrialResult]) -> Iterator[str]:
    """What became of the trials without a figure of their own."""
    for trial in tried:
        if trial.state == "failed":
            yield f"trial {trial.number} failed: {trial.reason}"
    repeated = [str(trial.number) for trial in tried if trial.same_as is not None]
    if repeated:
        yield f"drawn with values tried before and not run again: trials {', '.join(repeated)}"
