"""An evaluation is measured once: a finished run is left as it is, and that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simpo.results import FILE_NAME, Metric, write_results
from simpo.runs.folder import RunFolder


def measure_once(run: RunFolder, measure: Callable[[], list[Metric]]) -> Path:
    """Measure, write ``results.json`` and finish the run, unless it was finished before.

    Args:
        run: after its :meth:`~simpo.runs.folder.RunFolder.begin`.
        measure: gives the figures.

    Returns:
        The path of ``results.json``.
    """
    if run.finished:
        run.say(f"{run.path} holds this run already, finished; nothing was computed")
    else:
        write_results(run.path, command=run.command, fingerprint=run.fingerprint, metrics=measure())
        run.finish()
    return run.path / FILE_NAME
