"""The workflow of ``simpo reproduce``: trials that are not done yet, verdicts, and ``reproduce.html``."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from tqdm import tqdm

from simpo import __version__
from simpo.errors import SimpoError
from simpo.runs.files import JsonLines, json_safe, write_text
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import Metric, write_results
from simpo.runs.terminal import interruptible, progress
from simpo.statistics import Interval, mean_interval
from simpo.workflows.recipes import PAPER_SETTINGS, compose_recipe
from simpo.workflows.reproduction.study import (
    METRICS,
    OWN_KEYS,
    REGISTERED,
    Arm,
    Measured,
    Outcome,
    Study,
    Trial,
    decide,
    prepare_base,
    read_studies,
    run_trial,
)

PAGE, CLAIMS = "reproduce.html", "claims.json"


def reproduce(studies: Sequence[Study], folder: Path, *, processes: int, argv: Sequence[str] = ()) -> list[Outcome]:
    """Run the trials of the studies that the folder does not have yet, and write the page.

    A run that was stopped is continued by the same call, and other studies may be added; the figures are the same,
    except for the seconds. The page has every registered study whose trials the folder has.

    Raises:
        SimpoError: the folder cannot be used.
        InterruptedRun: the user stopped it.
    """
    with interruptible(), RunFolder(folder, command="reproduce") as run:
        if run.finished:
            run.reopen()
        run.begin({"registered": yaml.safe_load(REGISTERED.read_text(encoding="utf-8"))}, argv=argv)
        prepare_base(folder / "base", run.log)
        trials = Trials(folder, processes, run.log)
        trials.run(trial for study in studies for arm in study.arms.values() for trial in arm.tuning_trials())
        trials.run(trial for study in studies for trial in trials.tuned(study))
        wanted = {study.name for study in studies}
        earlier = [study for study in read_studies() if study.name not in wanted and trials.has(study)]
        results = [trials.result(study) for study in sorted([*studies, *earlier], key=lambda study: study.number)]
        write_text(folder / PAGE, render(results))
        document = {result.study.name: [asdict(outcome) for outcome in result.outcomes] for result in results}
        write_text(folder / CLAIMS, json.dumps(json_safe(document), indent=2, allow_nan=False) + "\n")
        metrics = [
            Metric.of(f"{result.study.name}/{arm}/{name}", mean_interval(values[name]))
            for result in results
            for arm, values in result.measured.items()
            for name in METRICS
        ]
        write_results(folder, command="reproduce", fingerprint=run.fingerprint, metrics=metrics)
        run.finish()
        return [outcome for result in results for outcome in result.outcomes]


@dataclass(frozen=True)
class Result:
    """What came out of a study."""

    study: Study
    chosen: Mapping[str, Mapping[str, Any]]  # the settings of each arm after tuning
    measured: Mapping[str, Measured]  # the numbers of each arm
    outcomes: Sequence[Outcome]  # of the claims


class Trials:
    """The trials of a folder, each of which is run once."""

    def __init__(self, folder: Path, processes: int, log: Log) -> None:
        self._base = folder / "base"
        self._lines = JsonLines(folder / "trials.jsonl", checked=True)
        self._done: dict[str, dict[str, float]] = {line["key"]: line["metrics"] for line in self._lines}
        self._processes, self._log = processes, log

    def run(self, trials: Iterable[Trial]) -> None:
        """Run those that are missing, several at a time, and store each as soon as it is done."""
        wanted = {trial.key: trial for trial in trials}
        missing = {key: trial for key, trial in wanted.items() if key not in self._done}
        if not missing:
            return
        scratch = tempfile.TemporaryDirectory()
        pool = ProcessPoolExecutor(
            min(self._processes, len(missing)),
            multiprocessing.get_context("spawn"),
            initializer=_start_process,
            initargs=(scratch.name,),
        )
        try:
            running = {pool.submit(run_trial, self._base, trial): trial for trial in missing.values()}
            with progress("trials", len(missing), 0, self._log) as advance:
                for future in as_completed(running):
                    trial, metrics = running[future], future.result()
                    self._lines.append([{"key": trial.key, "trial": asdict(trial), "metrics": metrics}])
                    self._done[trial.key] = metrics
                    advance(1)
        except BrokenProcessPool as error:
            raise SimpoError(
                "processes: a trial's process was killed, most likely because memory ran out; run the same command "
                "again with a smaller number, which continues"
            ) from error
        except BaseException:  # of the user, too: trials that are running, and those that a process has taken, end now
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            scratch.cleanup()

    def best(self, arm: Arm) -> dict[str, Any]:
        """The candidate with the highest win rate on the tuning prompts; the first among equals."""
        candidates, trials = arm.candidates(), arm.tuning_trials()
        rates = [self._done[trial.key]["win_rate"] for trial in trials]
        return candidates[int(np.argmax(rates)) if rates else 0]

    def tuned(self, study: Study) -> list[Trial]:
        """The trials that decide a study, of the best candidates; its tuning trials are done."""
        return [arm.trial(self.best(arm), seed) for arm in study.arms.values() for seed in study.seeds]

    def has(self, study: Study) -> bool:
        """Whether all trials of a study are done."""
        tuning = [trial for arm in study.arms.values() for trial in arm.tuning_trials()]
        return all(one.key in self._done for one in tuning) and all(one.key in self._done for one in self.tuned(study))

    def measured(self, trials: Sequence[Trial]) -> Measured:
        """The metrics of trials that are done, ``[trials]`` each."""
        found = [self._done[trial.key] for trial in trials]
        # A number that was undefined, such as a correlation with a constant, is stored as null and becomes NaN.
        return {name: np.array([metrics[name] for metrics in found], dtype=np.float64) for name in METRICS}

    def result(self, study: Study) -> Result:
        """What came out of a study, all trials of which are done."""
        chosen = {name: self.best(arm) for name, arm in study.arms.items()}
        trials = {name: [arm.trial(chosen[name], seed) for seed in study.seeds] for name, arm in study.arms.items()}
        measured = {name: self.measured(several) for name, several in trials.items()}
        return Result(study, chosen, measured, [decide(claim, measured) for claim in study.claims])


def _start_process(scratch: str) -> None:
    """Start a process for trials: it reports by their metrics only, writes to ``scratch``, and ends with its parent."""
    import datasets  # noqa: PLC0415 - in the trial's process
    import transformers  # noqa: PLC0415

    for signum in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; the parent ends this process
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()
    tempfile.tempdir = scratch
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which would outlive a process that is killed
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - as long as the process


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- The same plan for real models.


def plan(studies: Sequence[Study], setting: str) -> list[str]:
    """The commands that would run the studies in one of the paper's settings, with its published values."""
    if setting not in PAPER_SETTINGS:
        raise SimpoError(f"--setting: {setting!r} is unknown; the settings are {', '.join(PAPER_SETTINGS)}")
    names = dict.fromkeys(str(arm.given["objective"]) for study in studies for arm in study.arms.values())
    rates = {name: float(yaml.safe_load(compose_recipe(name, setting))["learning_rate"]) for name in names}
    start = PAPER_SETTINGS[setting].model
    text = _TEMPLATES.get_template("plan.txt").render(
        studies=studies, rates=rates, setting=setting, start=start, own_keys=OWN_KEYS
    )
    return text.splitlines()


# ---- The page: what was claimed, what came out, and how certain it is.


def render(results: Sequence[Result]) -> str:
    """The page of the studies that were run: their arms' numbers, the claims' outcomes, the settings after tuning."""
    return _TEMPLATES.get_template("reproduce.html").render(
        results=results,
        metrics=METRICS,
        verdicts=[outcome.verdict for result in results for outcome in result.outcomes],
        seeds=len(next(iter(results[0].measured.values()))[METRICS[0]]),
        version=__version__,
    )


def _axis(arms: Mapping[str, Measured], metric: str) -> tuple[float, float]:
    """The ends of an axis for the means of all arms and their intervals."""
    means = [mean_interval(values[metric]) for values in arms.values()]
    ends = [end for one in means for end in (one.low, one.high, one.value) if end is not None and math.isfinite(end)]
    least, most = min(ends, default=0.0), max(ends, default=0.0)
    return least, most if most > least else least + 1.0


def mean_text(values: np.ndarray) -> str:
    """The mean of ``values`` ``[seeds]`` with its interval; where one of them is undefined, with how many seeds."""
    undefined = int((~np.isfinite(values)).sum())
    return f"undefined with {undefined} of {len(values)} seeds" if undefined else interval_text(mean_interval(values))


def interval_text(found: Interval) -> str:
    """A number with its interval, where there is one, to three significant digits."""
    if not math.isfinite(found.value):
        return "undefined"
    bounds = "" if found.low is None or found.high is None else f" [{found.low:.3g}, {found.high:.3g}]"
    return f"{found.value:.3g}{bounds}"


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"axis": _axis, "interval": interval_text, "mean": mean_interval, "mean_text": mean_text}
