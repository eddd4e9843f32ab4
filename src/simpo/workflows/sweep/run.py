"""The workflow of ``simpo sweep``: trials that are ordinary runs, a table of them, and the best recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.analysis.plots import plot_effects
from simpo.errors import SimpoError
from simpo.models.devices import free_memory
from simpo.runs.folder import FolderInUseError, RunFolder, RunRecord
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, write_results
from simpo.training.run import TrainingJob
from simpo.training.tasks import PREFERENCES
from simpo.workflows.sweep.report import print_table, rank, sweep_metrics, write_best
from simpo.workflows.sweep.space import Axis, Values, combinations, one_at_a_time, shown
from simpo.workflows.sweep.study import Sampler, Study, TrialLease, TrialResult
from simpo.workflows.sweep.trial import WIN_RATE, Failed, Pruned, read_metric, run_trial

BEST, EFFECTS = "best.yaml", "effects.png"
# Held-out metrics that tell better from worse, and whether they are to be small.
SMALLER_IS_BETTER = {
    "eval_rewards/accuracies": False,
    "eval_rewards/margins": False,
    "eval_logps/chosen": False,
    "eval_loss": True,
    WIN_RATE: False,
}
_COMMAND = "sweep"
_PAUSE = 1.0  # seconds between looks at the trials of other processes
_PATIENCE = 30.0  # seconds for a leader to say what it leads


@dataclass(frozen=True)
class Sweep:
    """What is searched, and how.

    Attributes:
        folder: of the sweep.
        recipe: the recipe that trials start from; None if the options say everything.
        fixed: options that all trials have: what stands behind every ``--key``.
        axes: what is varied.
        metric: of held-out pairs after training, as in ``results.json``; of answers, at the last evaluation.
        sampler: ``grid`` for every combination, ``tpe`` to draw.
        trials: how many.
        prune: break off trials that are worse than the median at an evaluation.
        read: from the arguments of ``simpo train``, what they give.
        argv: the command line, for the record.
    """

    folder: Path
    recipe: Path | None
    fixed: Mapping[str, Sequence[str]]
    axes: tuple[Axis, ...]
    metric: str
    sampler: Sampler
    trials: int
    prune: bool
    read: Callable[[list[str]], TrainingJob]
    argv: Sequence[str] = ()

    @property
    def smaller_is_better(self) -> bool:
        """Whether the metric is to be small."""
        return SMALLER_IS_BETTER[self.metric]

    def arguments(self, values: Values, folder: Path) -> list[str]:
        """The command line of ``simpo train`` for a trial."""
        fixed = [word for key, texts in self.fixed.items() for word in (f"--{key}", *texts)]
        varied = [f"--{key}={value}" for key, value in values.items()]
        recipe = [] if self.recipe is None else [str(self.recipe)]
        return [*recipe, *fixed, *varied, f"--output_dir={folder}"]

    def identity(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What determines the result, given the recipe's keys."""
        keys = {key: str(value) for key, value in recipe.items() if key != "output_dir"}
        keys |= {key: " ".join(texts) for key, texts in self.fixed.items()}
        keys |= {f"axis {axis.key}": str(axis) for axis in self.axes}
        how = {"metric": self.metric, "sampler": self.sampler, "trials": self.trials, "prune": self.prune}
        return keys | {f"sweep {key}": value for key, value in how.items()}


def run_sweep(sweep: Sweep, recipe: Mapping[str, Any]) -> Path | None:
    """Run the trials that are left, and when all are settled write the table's figures, the best recipe and the plot.

    The same call continues a sweep that was killed and leaves a finished one as it is. Where another process leads the
    sweep already, this one takes trials of it until there are none, and the leader reports.

    Args:
        sweep: what to do.
        recipe: the recipe's keys and values, as written.

    Returns:
        The path of ``results.json``; None for a process that only took trials.

    Raises:
        SimpoError: something that the user gave cannot be used, the disk is full, or no trial finished.
        InterruptedRun: a signal came; the trial has saved a checkpoint.
    """
    _check(sweep)
    identity = sweep.identity(recipe)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(RunFolder(sweep.folder, command=_COMMAND))
            folder.begin(identity, argv=sweep.argv, recipe=sweep.recipe)
        except FolderInUseError:
            pass
        else:
            if not folder.finished:
                study = _open(sweep)
                folder.log(f"{sweep.trials} trials ({sweep.sampler}): {'; '.join(map(str, sweep.axes))}")
                _run_trials(sweep, study, folder.log, leading=True)
                _report(sweep, study, recipe, folder.fingerprint)
                folder.finish()
            return sweep.folder / FILE_NAME
    _check_same(sweep.folder, identity)
    print(f"another process leads the sweep in {sweep.folder}: taking trials of it")
    _run_trials(sweep, _open(sweep), print, leading=False)
    return None


def _open(sweep: Sweep) -> Study:
    return Study(
        sweep.folder,
        sweep.axes,
        sweep.sampler,
        sweep.trials,
        smaller_is_better=sweep.smaller_is_better,
    )


def _check(sweep: Sweep) -> None:
    """Read every trial's recipe, or where they are not known yet the values one at a time, before anything is written.

    Raises:
        SimpoError: one is no recipe, has no held-out pairs, is not evaluated where it should be pruned, or has no judge
            of its answers where these are compared.
    """
    for values in combinations(sweep.axes) if sweep.sampler == "grid" else one_at_a_time(sweep.axes):
        given = sweep.read(sweep.arguments(values, sweep.folder))
        data = given.data
        if not (data.eval_dataset_name or data.dataset_test_split or data.dataset_mixer or data.dataset_mixture):
            raise SimpoError("eval_dataset_name: name held-out pairs, which the trials are compared on")
        judged = any(getattr(callback, "settings", {}).get("eval_judge") for callback in given.callbacks)
        if sweep.metric == WIN_RATE and not judged:
            raise SimpoError(f"--metric: {WIN_RATE} is of answers that are judged; set eval_generations and eval_judge")
        if sweep.prune and given.config.eval_strategy == "no":
            raise SimpoError("--prune looks at evaluations while training: set eval_strategy: steps and eval_steps")


def _check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    differences = _leaders_record(folder).differences(identity)
    if differences:
        raise SimpoError(
            f"output_dir: {folder} is in use by a sweep with other settings ({'; '.join(differences)}); "
            "name a new folder"
        )


def _leaders_record(folder: Path) -> RunRecord:
    """What the leader has written, which may only just have taken the folder."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            return RunRecord.read(folder)
        time.sleep(_PAUSE / 10)
    raise SimpoError(f"output_dir: {folder} is in use by a process that has begun no sweep; name a new folder")


def _run_trials(sweep: Sweep, study: Study, log: Log, *, leading: bool) -> None:
    """Take trials until none is left; the leader also waits for those of others, and takes them over if these die."""
    waiting = False
    while True:
        claim = study.claim()
        if claim is not None:
            waiting = False
            _settle(sweep, study, claim, log)
            free_memory()  # after what the trial raised has been dealt with
            continue
        running = [tried.number for tried in study.tried() if tried.state == "running"]
        if not running or not leading:
            return
        if not waiting:
            waiting = True
            log(f"waiting for {len(running)} trials of other processes")
        time.sleep(_PAUSE)


def _settle(sweep: Sweep, study: Study, claim: TrialLease, log: Log) -> None:
    """Run one trial and record how it ended; whatever ends this process leaves the trial to the next one."""
    name = f"trial {claim.number} ({shown(claim.values)})"
    same = _same(study, claim)
    if same is not None and same.value is not None:
        log(f"{name}: as trial {same.number}")
        study.finish(claim, same.value, same_as=same.number)
        return
    folder = study.trial_folder(claim.number)
    log(f"{name} in {folder}")
    try:
        given = sweep.read(sweep.arguments(claim.values, folder))
        found = run_trial(PREFERENCES, given, folder, sweep.metric, prune=claim if sweep.prune else None)
    except Pruned as stop:
        study.prune(claim)
        log(f"{name}: pruned {stop}")
    except Failed as failure:
        study.fail(claim, str(failure))
        log(f"{name}: failed: {failure}")
    except BaseException:
        claim.release()
        raise
    else:
        assert found.value is not None
        study.finish(claim, found.value)
        log(f"{name}: {sweep.metric} {found.value:.4g}")


def _same(study: Study, claim: TrialLease) -> TrialResult | None:
    """The finished trial that has the same values, if TPE has drawn them before."""
    finished = (trial for trial in study.tried() if trial.value is not None and trial.same_as is None)
    return next((trial for trial in finished if trial.values == claim.values), None)


def _report(sweep: Sweep, study: Study, recipe: Mapping[str, Any], fingerprint: str) -> None:
    """Write the best recipe, the plot and ``results.json``."""
    tried = study.tried()
    ranked = rank(tried, smaller_is_better=sweep.smaller_is_better)
    found = {trial.number: read_metric(study.trial_folder(trial.number), sweep.metric) for trial in ranked}
    best = ranked[0]
    write_best(sweep.folder / BEST, best, found[best.number], recipe, sweep.fixed)
    effects = {
        axis.key: [(trial.values[axis.key], found[trial.number].interval) for trial in ranked] for axis in sweep.axes
    }
    plot_effects(
        sweep.folder / EFFECTS,
        effects,
        f"{sweep.metric.removeprefix('eval_')}, held out",
        smaller_is_better=sweep.smaller_is_better,
    )
    metrics = sweep_metrics(tried, found, smaller_is_better=sweep.smaller_is_better)
    write_results(sweep.folder, command=_COMMAND, fingerprint=fingerprint, metrics=metrics)


def print_sweep(sweep: Sweep) -> Path:
    """Print the table of a finished sweep; returns the folder of its best trial, with the model."""
    study = _open(sweep)
    tried = study.tried()
    print_table(sweep.folder, tried, sweep.axes, sweep.metric)
    return study.trial_folder(rank(tried, smaller_is_better=sweep.smaller_is_better)[0].number)
