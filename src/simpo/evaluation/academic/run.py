"""The workflow behind ``simpo evaluate academic``."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.evaluation.academic.scores import Score, differences, read_scores, score_metrics
from simpo.evaluation.once import measure_once
from simpo.results import Metric
from simpo.runs.folder import RunFolder
from simpo.training.device import device, with_dtype
from simpo.training.identity import model_digest
from simpo.training.model_arguments import ModelArguments
from simpo.training.models import below_adapter, check_stored

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
        run.begin(identity, argv=argv, accept_changes=None)
        return measure_once(run, lambda: _measure(lm_eval, model, against, folder))


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
        """Of a model, or an adapter on its base.

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
