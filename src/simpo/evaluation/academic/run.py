"""``simpo evaluate academic``: lm-eval before and after training, and its scores."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from simpo.errors import SimpoError
from simpo.models.identity import model_digest
from simpo.models.loading import below_adapter, check_stored, device, with_dtype
from simpo.models.settings import ModelArguments
from simpo.runs.atomic import write_text
from simpo.runs.folder import RunFolder
from simpo.runs.results import Metric, Stage
from simpo.statistics import mean_interval, share_bounds

# ---- lm-eval's results, and the differences between two models' with what they are worth.


_METHOD = "1.96 standard errors"


_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mc1", "mc2", "pass@1")  # from 0 to 1


@dataclass(frozen=True)
class Score:
    """One figure of one task.

    Attributes:
        value: the figure.
        error: its standard error; None where lm-eval gives none.
        n: number of items; None for a group of tasks.
        items: the figure of every item by its number, where the figure is their mean; else empty.
    """

    value: float
    error: float | None
    n: int | None
    items: dict[str, float]


def read_scores(output: Mapping[str, Any]) -> dict[str, Score]:
    """The figures in what ``lm_eval.simple_evaluate`` returns, by ``task/metric``, ``task/metric:filter`` if filtered.

    Args:
        output: has ``results`` and, where they were asked for, ``samples`` and ``n-samples``.
    """
    found = {}
    for task, figures in output["results"].items():
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            items = _items(output.get("samples", {}).get(task, ()), metric, rule)
            if items and not math.isclose(np.mean(list(items.values())), value, abs_tol=1e-9):
                items = {}  # the figure is something else than their mean
            name = f"{task}/{metric}" if rule == "none" else f"{task}/{metric}:{rule}"
            n = output.get("n-samples", {}).get(task, {}).get("effective")
            found[name] = Score(float(value), float(error) if _is_number(error) else None, n, items)
    return found


def _items(samples: Sequence[Mapping[str, Any]], metric: str, rule: str) -> dict[str, float]:
    rows = [sample for sample in samples if sample.get("filter", "none") == rule]
    if not all(_is_number(row.get(metric)) or isinstance(row.get(metric), bool) for row in rows):
        return {}
    return {str(row["doc_id"]): float(row[metric]) for row in rows}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def score_metrics(scores: Mapping[str, Score], stage: Stage | None) -> list[Metric]:
    """Figures with intervals of 1.96 standard errors to either side, those of shares as Wilson's."""
    metrics = []
    for name, score in scores.items():
        is_share = name.rpartition("/")[2].partition(":")[0] in _SHARES
        around = share_bounds if is_share else lambda value, half: (value - half, value + half)
        low, high = (None, None) if score.error is None else around(score.value, 1.96 * score.error)
        method = None if score.error is None else _METHOD
        metrics.append(Metric(f"academic/{name}", score.value, stage, score.n, low, high, method))
    return metrics


def differences(before: Mapping[str, Score], after: Mapping[str, Score]) -> list[Metric]:
    """After minus before, of the figures that both have.

    Item by item where both have items, because two models find the same items hard; else from the two standard errors,
    which makes the interval wider than it had to be.
    """
    return [_difference(f"academic/{name}/difference", before[name], after[name]) for name in before if name in after]


def _difference(name: str, before: Score, after: Score) -> Metric:
    value = after.value - before.value
    if before.items and before.items.keys() == after.items.keys():
        found = mean_interval([after.items[key] - before.items[key] for key in before.items])
        return Metric.of(name, found, method=f"paired, {found.method}")
    if before.error is None or after.error is None:
        return Metric(name, value, None, after.n)
    half = 1.96 * math.hypot(before.error, after.error)
    return Metric(name, value, None, after.n, value - half, value + half, f"unpaired, {_METHOD}")


# Arithmetic, knowledge, truthfulness, following instructions and formats, toxicity, bias.
TASKS = ("gsm8k", "mmlu", "truthfulqa_mc2", "ifeval", "toxigen", "crows_pairs_english")


@dataclass(frozen=True)
class AcademicSettings:
    """What lm-eval is asked for.

    Attributes:
        tasks: its names of tasks, or paths of task files.
        task_folder: a folder with further tasks' files.
        num_fewshot: examples before each item; None for the tasks' own number.
        limit: items of each task; None for all.
        batch_size: as lm-eval has it, a number or ``auto``.
        apply_chat_template: show items as a user's messages.
    """

    tasks: tuple[str, ...] = TASKS
    task_folder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: str = "auto"
    apply_chat_template: bool = True


def evaluate_academic(
    model: ModelArguments,
    against: ModelArguments | None,
    settings: AcademicSettings,
    folder: Path,
    *,
    argv: Sequence[str] = (),
) -> Path:
    """Run lm-eval on a model and on the one that it was made from; a model that is through is not run again.

    Args:
        model: which.
        against: the start model; None for no comparison.
        settings: what is asked for.
        folder: the run's; gets ``scores-after.json``, ``scores-before.json`` and ``results.json``.
        argv: the command line after the command's name, for the record.

    Returns:
        The path of ``results.json``.

    Raises:
        SimpoError: lm-eval is not installed, or cannot do what it is asked for.
    """
    with RunFolder(folder, command="evaluate") as run:
        lm_eval = _LmEval(settings)
        identity = {"benchmark": "academic", "model": model_digest(model), "dtype": with_dtype(model).dtype}
        identity |= dataclasses.asdict(settings) | {"lm_eval": metadata.version("lm-eval")}
        if against is not None:
            identity["against"] = model_digest(against)
        run.begin(identity, argv=argv)
        return run.complete(lambda: _measure(lm_eval, model, against, folder))


def _measure(lm_eval: _LmEval, model: ModelArguments, against: ModelArguments | None, folder: Path) -> list[Metric]:
    before = None if against is None else _scores(lm_eval, against, folder / "scores-before.json")
    after = _scores(lm_eval, model, folder / "scores-after.json")
    if before is None:
        return score_metrics(after, None)
    return score_metrics(before, "before") + score_metrics(after, "after") + differences(before, after)


class _LmEval:
    """lm-eval and its index of tasks, which takes a while to make."""

    def __init__(self, settings: AcademicSettings) -> None:
        try:
            self._lm_eval: Any = importlib.import_module("lm_eval")
        except ImportError as error:
            raise SimpoError("academic benchmarks need lm-eval: pip install 'simpo[academic]'") from error
        self._settings = settings
        self._tasks = importlib.import_module("lm_eval.tasks").TaskManager(include_path=settings.task_folder)
        unknown = [name for name in settings.tasks if not self._tasks.match_tasks([name]) and not Path(name).is_file()]
        if unknown:
            raise SimpoError(f"tasks: lm-eval knows no {', '.join(unknown)}; lm-eval ls tasks lists its names")

    def scores(self, model: ModelArguments) -> dict[str, Score]:
        """The scores of a model, or of an adapter on its base.

        Raises:
            SimpoError: lm-eval cannot do what it is asked for.
        """
        settings = self._settings
        check_stored(model)
        try:
            output = self._lm_eval.simple_evaluate(
                model="hf",
                model_args=_model_args(model),
                tasks=list(settings.tasks),
                task_manager=self._tasks,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                batch_size=settings.batch_size,
                device=str(device()),
                apply_chat_template=settings.apply_chat_template,
                log_samples=True,
            )
        except (ValueError, KeyError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise SimpoError(f"lm-eval: {model.model_name_or_path}: {reason}") from error
        return read_scores(output)


def _model_args(model: ModelArguments) -> dict[str, Any]:
    base = below_adapter(model)
    given = {
        "pretrained": base.model_name_or_path,
        "revision": base.model_revision,
        "dtype": with_dtype(model).dtype,
        "trust_remote_code": model.trust_remote_code,
    }
    own = {} if base is model else {"peft": model.model_name_or_path, "tokenizer": model.model_name_or_path}
    return given | own


def _scores(lm_eval: _LmEval, model: ModelArguments, path: Path) -> dict[str, Score]:
    """From the file, if an earlier start has got so far."""
    if not path.exists():
        scores = lm_eval.scores(model)
        write_text(path, json.dumps({name: dataclasses.asdict(score) for name, score in scores.items()}) + "\n")
    return {name: Score(**score) for name, score in json.loads(path.read_text(encoding="utf-8")).items()}
