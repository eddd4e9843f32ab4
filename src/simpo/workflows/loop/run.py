"""``simpo loop``: rounds, each from the last one's model, until all are done or one goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset

from simpo.client import ChatClient, Endpoint, confirm_cost
from simpo.client.cache import default_cache
from simpo.data.formats import PlainPrompt, read_prompts
from simpo.data.sources import load_rows
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer
from simpo.evaluation.compare import make_judges
from simpo.generation.sample import PromptArguments
from simpo.judging.protocol import Answers, Pair
from simpo.judging.registry import JudgeOptions, check_judges_anew, make_annotator, make_judge
from simpo.models.checkpoint import model_digest
from simpo.runs.folder import RunFolder
from simpo.runs.log import Log
from simpo.runs.results import FILE_NAME, Metric, read_results
from simpo.runs.signals import stoppable
from simpo.training.identity import settings_identity, settings_of
from simpo.workflows.loop import record
from simpo.workflows.loop.rehearsal import rehearse
from simpo.workflows.loop.report import kl, win_rate, write_report
from simpo.workflows.loop.rounds import Rounds
from simpo.workflows.loop.settings import LoopRecipe, LoopSettings, as_it_is

# ---- What judges behind a server will be sent in all rounds, which the user is asked about once, before the
# first.


def agree_to_rounds(recipe: LoopRecipe, options: JudgeOptions, rounds: int, log: Log) -> None:
    """Ask the user about the requests of so many rounds, estimated with answers as long as they may be.

    Args:
        recipe: of the loop.
        options: what annotator and judges need.
        rounds: how many are left.
        log: called with what will be sent.

    Raises:
        SimpoError: the user does not agree, or cannot be asked; nothing has been computed.
    """
    annotator = make_annotator(recipe.settings.annotator, options)
    judges = [make_judge(name, options) for name in recipe.judges]
    answerer = Answerer(as_it_is(recipe.model), recipe.sampling)
    answers = [answerer.stand_in(f"a{k}") for k in range(recipe.sampling.n)]
    rows = [Answers(prompt.id, prompt.content, answers) for prompt in _prompts(recipe.asked)]
    confirm_cost(annotator.estimate(rows) * rounds, yes=recipe.settings.yes, log=log)
    a, b = ([answerer.stand_in(f"{side}{k}") for k in range(recipe.settings.eval_n)] for side in "ab")
    pairs = [Pair(p.id, p.content, *two) for p in _prompts(recipe.held_out) for two in product(a, b)]
    for judge in judges:
        confirm_cost(judge.estimate(pairs) * rounds, yes=recipe.settings.yes, log=log)


def _prompts(source: PromptArguments) -> list[PlainPrompt]:
    return read_prompts(source.rows())[0]


# Keys that change nothing that is computed, or only how far it goes.
_NO_INFLUENCE = ("yes", "judge_url", "judge_key_env", "rounds")


def run_loop(recipe: LoopRecipe, *, argv: Sequence[str] = (), file: Path | None = None) -> Path:
    """Run the rounds that are left; the same call continues a loop that was killed and leaves a finished one as it is.

    With more ``rounds`` it goes on with a finished one, unless that was stopped, as if they had been asked for at once.
    Before a new loop begins, all its stages are tried on invented answers.

    Args:
        recipe: of the loop.
        argv: the command line after the command's name, for the record.
        file: the recipe's file, for the record.

    Returns:
        Folder of the model of the last round that no stop criterion refused, or the start's name if there is none.

    Raises:
        SimpoError: something that the user gave cannot be used, or a stage's own reason.
        InterruptedRun: a signal came; what was done is kept.
    """
    folder = Path(recipe.config.output_dir)
    with stoppable(), RunFolder(folder, command="loop") as run:
        options = _options(recipe)
        identity = _identity(recipe, options)
        _check_rounds(folder, recipe.settings.rounds)
        if run.finished:
            if _goes_on(folder, recipe.settings.rounds):
                run.reopen()
        elif not run.resuming:
            rehearse(recipe, options, run.log)
        if not run.finished:
            done = sum(1 for _ in folder.glob(f"round-*/{record.FILE_NAME}"))
            agree_to_rounds(recipe, options, recipe.settings.rounds - done, run.log)
        run.begin(
            identity,
            argv=argv,
            recipe=file,
            resolved=settings_of(*(getattr(recipe, part.name) for part in dataclasses.fields(recipe))),
        )
        rounds = Rounds(folder, recipe, options, run.fingerprint, run.log)
        if run.finished:
            run.log(f"{folder} holds this loop already, finished{_stopped(folder)}")
        else:
            found, last_good = _run_rounds(rounds)
            write_report(folder, found, fingerprint=run.fingerprint, last_good=last_good)
            run.finish()
    _, last = _outcome(folder)
    return rounds.model(last) if last else Path(recipe.model.model_name_or_path)


def _check_rounds(folder: Path, asked: int) -> None:
    """Raise :class:`SimpoError` if more rounds were begun than are asked for."""
    begun = sum(1 for path in folder.glob("round-*") if path.is_dir())
    if begun > asked:
        raise SimpoError(
            f"rounds: {folder} has {begun} already, more than the {asked} asked for; give {begun}, or name a new folder"
        )


def _outcome(folder: Path) -> tuple[int, int]:
    """How many rounds a finished loop has, and the last one that no stop criterion refused."""
    found = {metric.name: metric.value for metric in read_results(folder / FILE_NAME).metrics}
    return int(found["rounds"] or 0), int(found["last_good_round"] or 0)


def _goes_on(folder: Path, asked: int) -> bool:
    """Whether a finished loop has fewer rounds than are asked for, and was not stopped."""
    done, last_good = _outcome(folder)
    return done == last_good < asked


def _stopped(folder: Path) -> str:
    done, last_good = _outcome(folder)
    return f": it was stopped after round {done}" if last_good < done else ""


def _run_rounds(rounds: Rounds) -> tuple[dict[int, list[Metric]], int]:
    """Figures of every round, and the last one that no stop criterion refused."""
    found: dict[int, list[Metric]] = {}
    _say_shared(_rows(rounds.recipe.settings), rounds.log)
    rounds.answer_from_start()
    for number in range(1, rounds.recipe.settings.rounds + 1):
        folder = rounds.folder / f"round-{number}"
        done = (folder / record.FILE_NAME).exists()
        found[number] = read_results(folder / FILE_NAME).metrics if done else rounds.run(number)
        rate, moved = win_rate(found[number]), kl(found[number])
        rounds.log(f"round {number}: {_said(rate)}, KL {_said(moved)}")
        if reason := _stop(rounds.recipe.settings, rate, moved):
            rounds.log(f"stopped after round {number}: {reason}")
            return found, number - 1
    return found, len(found)


def _stop(settings: LoopSettings, rate: Metric, moved: Metric) -> str | None:
    """Why no further round follows; None if one may."""
    bounds = settings.stop_win_rate, settings.stop_kl
    if bounds[0] is not None and rate.value is not None and rate.value < bounds[0]:
        return f"{rate.name} {rate.value:.3g} is below stop_win_rate {bounds[0]:g}"
    if bounds[1] is not None and moved.value is not None and moved.value > bounds[1]:
        return f"KL {moved.value:.3g} is above stop_kl {bounds[1]:g}"
    return None


def _said(metric: Metric) -> str:
    value = "unknown" if metric.value is None else f"{metric.value:.3g}"
    return f"{metric.name} {value}" if metric.name != "kl" else value


def _rows(settings: LoopSettings) -> dict[str, Dataset]:
    """The data sets of both kinds of prompts."""
    return {
        name: load_rows(getattr(settings, name), split=getattr(settings, f"{name}_split"))
        for name in ("prompts", "eval_prompts")
    }


def _say_shared(rows: Mapping[str, Dataset], log: Log) -> None:
    """Say how many held-out prompts are trained on too."""
    asked, held_out = ({prompt.id for prompt in read_prompts(found)[0]} for found in rows.values())
    if shared := len(asked & held_out):
        log(f"note: {shared:,} of {len(held_out):,} eval_prompts are among prompts, which are trained on")


def _options(recipe: LoopRecipe) -> JudgeOptions:
    settings = recipe.settings
    client = None
    if settings.judge_url is not None and settings.judge_model is not None:
        endpoint = Endpoint(settings.judge_url, settings.judge_model, settings.judge_key_env)
        client = ChatClient(endpoint, default_cache())
    return JudgeOptions(client, trust_remote_code=recipe.model.trust_remote_code)


def _identity(recipe: LoopRecipe, options: JudgeOptions) -> Mapping[str, Any]:
    """What determines the result; everything that it looks at has to be there before a folder is begun."""
    settings = recipe.settings
    annotator = make_annotator(settings.annotator, options)
    for name in settings.judges or ():
        check_judges_anew(name)
    judges = make_judges(recipe.judges, options)
    parts = (settings, recipe.sampling, recipe.pairs)
    chosen = {key: value for part in parts for key, value in vars(part).items() if key not in _NO_INFLUENCE}
    return {
        **settings_identity(recipe.config),
        **chosen,
        **{name: found._fingerprint for name, found in _rows(settings).items()},
        **{f"annotator/{key}": value for key, value in annotator.identity.items()},
        **{f"judge {name}/{key}": value for name, judge in judges.items() for key, value in judge.identity.items()},
        "model": model_digest(recipe.model),
        "dtype": recipe.model.dtype,
        "lora": str(recipe.model.lora if recipe.model.use_peft else None),
    }
