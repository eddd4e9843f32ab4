"""Workflow of ``simpo reproduce``: run the missing trials, decide the claims, and write ``reproduce.html``."""

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
    """Run the studies' missing trials and write the page.

    The same call resumes a stopped run, and later calls may add studies. Metrics are reproducible except for
    ``seconds``. The page covers every registered study whose trials are complete in the folder.

    Raises:
        SimpoError: the folder cannot be used.
        InterruptedRun: the user interrupted the run.
    """
    with interruptible(), RunFolder(folder, command="reproduce") as run:
        if run.finished:
            run.reopen()
        run.begin({"registered": yaml.safe_load(REGISTERED.read_text(encoding="utf-8"))}, argv=argv)
        prepare_base(folder / "base", run.log)
        trials = Trials(folder, processes, run.log)
        trials.run(trial for study in studies for arm in study.arms.values() for trial in arm.tuning_trials())
        trials.run(trial for study in studies for trial in trials.final_trials(study))
        requested = {study.name for study in studies}
        earlier = [study for study in read_studies() if study.name not in requested and trials.has_finished(study)]
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
    """The result of one study."""

    study: Study
    chosen: Mapping[str, Mapping[str, Any]]  # settings of each arm after tuning
    measured: Mapping[str, Measured]  # metrics of each arm
    outcomes: Sequence[Outcome]  # one per claim


class Trials:
    """The trials stored in a folder; each is run only once."""

    def __init__(self, folder: Path, processes: int, log: Log) -> None:
        self._base = folder / "base"
        self._lines = JsonLines(folder / "trials.jsonl", checked=True)
        self._done: dict[str, dict[str, float]] = {line["key"]: line["metrics"] for line in self._lines}
        self._processes, self._log = processes, log

    def run(self, trials: Iterable[Trial]) -> None:
        """Run the missing trials in parallel, and store each as soon as it is done."""
        requested = {trial.key: trial for trial in trials}
        missing = {key: trial for key, trial in requested.items() if key not in self._done}
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
                "processes: a trial's process was killed, most likely because memory ran out; resume with the same "
                "command and fewer processes"
            ) from error
        except BaseException:  # including Ctrl-C: end the running trials, and those already handed to a process
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            scratch.cleanup()

    def best(self, arm: Arm) -> dict[str, Any]:
        """Return the candidate with the highest win rate on the tuning prompts, or the first of several."""
        candidates, trials = arm.candidates(), arm.tuning_trials()
        rates = [self._done[trial.key]["win_rate"] for trial in trials]
        return candidates[int(np.argmax(rates)) if rates else 0]

    def final_trials(self, study: Study) -> list[Trial]:
        """Return the trials that decide a study, with the best candidates; requires its tuning trials to be done."""
        return [arm.trial(self.best(arm), seed) for arm in study.arms.values() for seed in study.seeds]

    def has_finished(self, study: Study) -> bool:
        """Whether all trials of a study are done."""
        tuning = [trial for arm in study.arms.values() for trial in arm.tuning_trials()]
        if any(trial.key not in self._done for trial in tuning):  # the final trials depend on them
            return False
        return all(trial.key in self._done for trial in self.final_trials(study))

    def measured(self, trials: Sequence[Trial]) -> Measured:
        """Return the metrics of finished trials, each of shape ``[trials]``."""
        records = [self._done[trial.key] for trial in trials]
        # Undefined values, such as a correlation with a constant, are stored as null and become NaN here.
        return {name: np.array([metrics[name] for metrics in records], dtype=np.float64) for name in METRICS}

    def result(self, study: Study) -> Result:
        """Return the result of a study whose trials are all done."""
        chosen = {name: self.best(arm) for name, arm in study.arms.items()}
        trials = {name: [arm.trial(chosen[name], seed) for seed in study.seeds] for name, arm in study.arms.items()}
        measured = {name: self.measured(arm_trials) for name, arm_trials in trials.items()}
        return Result(study, chosen, measured, [decide(claim, measured) for claim in study.claims])


def _start_process(scratch: str) -> None:
    """Initialize a worker process: quiet, with temporary files in ``scratch``, and ending with its parent."""
    import datasets  # noqa: PLC0415 - slow, and only worker processes need it
    import transformers  # noqa: PLC0415

    for signum in (signal.SIGINT, signal.SIGTERM):  # a terminal signals all processes; the parent ends this one
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, daemon=True).start()
    tempfile.tempdir = scratch
    tqdm.set_lock(threading.RLock())  # tqdm's default is a semaphore, which would outlive a killed process
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open until the process ends


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- The same plan for real models.


def plan(studies: Sequence[Study], setting: str) -> list[str]:
    """Return the commands that run the studies in one of the paper's settings, with published hyperparameters."""
    if setting not in PAPER_SETTINGS:
        raise SimpoError(f"--setting: {setting!r} is unknown; the settings are {', '.join(PAPER_SETTINGS)}")
    names = dict.fromkeys(str(arm.given["objective"]) for study in studies for arm in study.arms.values())
    rates = {name: float(yaml.safe_load(compose_recipe(name, setting))["learning_rate"]) for name in names}
    start = PAPER_SETTINGS[setting].model
    text = _TEMPLATES.get_template("plan.txt").render(
        studies=studies, rates=rates, setting=setting, start=start, own_keys=OWN_KEYS
    )
    return text.splitlines()


# ---- The page: claims, verdicts, and their uncertainty.


def render(results: Sequence[Result]) -> str:
    """Render the page: for each study, the outcomes of its claims, and metrics and tuned settings of its arms."""
    return _TEMPLATES.get_template("reproduce.html").render(
        results=results,
        metrics=METRICS,
        verdicts=[outcome.verdict for result in results for outcome in result.outcomes],
        seeds=len(next(iter(results[0].measured.values()))[METRICS[0]]),
        version=__version__,
    )


def _axis(arms: Mapping[str, Measured], metric: str) -> tuple[float, float]:
    """Return the ends of an axis that fits the means of all arms and their intervals."""
    means = [mean_interval(values[metric]) for values in arms.values()]
    ends = [end for one in means for end in (one.low, one.high, one.value) if end is not None and math.isfinite(end)]
    least, most = min(ends, default=0.0), max(ends, default=0.0)
    return least, most if most > least else least + 1.0


def mean_text(values: np.ndarray) -> str:
    """Format the mean of ``values`` ``[seeds]`` and its interval, or say for how many seeds it is undefined."""
    undefined = int((~np.isfinite(values)).sum())
    return f"undefined for {undefined} of {len(values)} seeds" if undefined else interval_text(mean_interval(values))


def interval_text(interval: Interval) -> str:
    """Format a value and its interval, if there is one, to three significant digits."""
    if not math.isfinite(interval.value):
        return "undefined"
    bounds = "" if interval.low is None or interval.high is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
    return f"{interval.value:.3g}{bounds}"


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"axis": _axis, "interval": interval_text, "mean": mean_interval, "mean_text": mean_text}
