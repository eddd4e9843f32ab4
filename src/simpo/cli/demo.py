"""simpo demo: preference alignment on a built-in tiny world."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from simpo.analysis.plots import plot_lengths, plot_rates, plot_training
from simpo.cli._shared import print_report
from simpo.cli.answers import sample
from simpo.cli.training import sft, train
from simpo.config import parse_settings, setting
from simpo.errors import SimpoError
from simpo.evaluation.compare import PromptAnswers, compare_answers, read_matched
from simpo.runs.files import read_lines
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.results import Metric, Stage, print_results, read_results
from simpo.runs.terminal import printable
from simpo.statistics import Interval
from simpo.workflows.pair import PairSettings, pair_responses
from simpo.world.pairs import write_model, write_prompts, write_sft
from simpo.world.questions import correct, judge

_SFT_ROWS, _PROMPTS, _HELD_OUT = 24_000, 1_000, 300
_SFT = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_length": 128, "logging_steps": 100}
_SIMPO = {
    "objective": "simpo",
    "beta": 2.0,
    "gamma_beta_ratio": 0.5,
    "learning_rate": 3e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "max_length": 128,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 20,
}
# Answers are samples from the models' own distribution, without temperature or truncation.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48, "chunk_size": 128}
_SAMPLES, _ANSWERS = {"n": 6} | _SAMPLING, {"n": 4} | _SAMPLING
_PERCENTILES = (10, 50, 90)  # of the change in score: the prompts that are shown

_HEADINGS: dict[Stage | None, str] = {"before": "SFT", "after": "SimPO"}


@dataclass(frozen=True)
class DemoSettings:
    """The demo."""

    output_dir: Path | None = setting(
        None, "Folder of the demo (default: the first runs/demo-N that is new or unfinished)."
    )
    seed: int = setting(0, "Seed of everything.")


def demo(argv: list[str]) -> None:
    """Preference alignment from start to finish on a built-in tiny world, in minutes and without a download.

    examples:
      simpo demo
      simpo demo --seed 1 --output_dir runs/demo-seed-1
    """
    (arguments,) = parse_settings(argv, (DemoSettings,), command="demo", about=demo.__doc__)
    torch.set_num_threads(1)  # a model this small loses more time to synchronization than threads save
    identity = {"seed": arguments.seed}
    folder = _own_folder(identity) if arguments.output_dir is None else arguments.output_dir
    answers = folder / "simpo-answers/responses.jsonl", folder / "sft-answers/responses.jsonl"
    with RunFolder(folder, command="demo") as run:
        run.begin(identity, argv=argv)

        def align() -> list[Metric]:
            _align(folder, arguments.seed, run.log)
            contests = read_matched(*answers)
            metrics = compare_answers(contests, judge, {"correct": correct})
            _plot(folder, contests, metrics)
            return metrics

        run.complete(align)
    print(
        f"\n{_ANSWERS['n']} answers of each model to each of {_HELD_OUT} held-out prompts. The exact judge's scores "
        "are between\n0 and 10. An answer is correct if every statement in it is right and nothing is missing."
    )
    print_results(folder / "results.json", headings=_HEADINGS)
    _show(read_matched(*answers))
    print(f"\nplots: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print_report(folder)
    print(f"next:  simpo chat {shlex.quote(str(folder / 'simpo'))}")


def _own_folder(identity: dict[str, Any]) -> Path:
    """The first of runs/demo-N that is new or holds this demo unfinished."""
    for number in count(1):
        path = Path(f"runs/demo-{number}")
        if not path.exists():
            break
        with suppress(SimpoError, FileNotFoundError):
            found = RunRecord.read(path)
            if (found.command, found.identity, found.status) == ("demo", identity, "running"):
                break
    return path


def _align(folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """All stages; each is its own run, so that a demo that was stopped continues where it was."""

    def run(
        command: Callable[[list[str]], None], output: str, options: dict[str, Any], positional: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run a command as from the command line and return its metrics; its output is kept in its folder's log."""
        options = {"output_dir": folder / output, "seed": seed} | options
        argv = [*positional, *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
        log(f"   simpo {command.__name__}: {folder / output}")
        with redirect_stdout(StringIO()):
            command(argv)
        metrics = read_results(folder / output / "results.json").metrics
        return {"/".join(filter(None, (metric.name, metric.stage))): metric.value for metric in metrics}

    if not (folder / "start").exists():  # complete or absent
        write_model(folder / "start", seed)
    write_sft(folder / "sft.jsonl", _SFT_ROWS, seed)  # writing them again changes nothing
    write_prompts(folder / "prompts.jsonl", _PROMPTS, seed)
    write_prompts(folder / "held-out.jsonl", _HELD_OUT, seed, held_out=True)
    log("Each command below keeps its options in recipe.yaml and its output in log.txt of the folder named with it.")
    log(f"1. Create a small random model, and demonstrations and prompts of the tiny world, in {folder}")

    log("2. Fine-tune the model on the demonstrations, not all of which are good")
    data = {"dataset_name": folder / "sft.jsonl", "model_name_or_path": folder / "start", "save_strategy": "no"}
    done = run(sft, "sft", data | _SFT)
    log(f"   {done['train/steps']:,.0f} steps on {_SFT_ROWS:,} demonstrations, mean loss {done['train/loss']:.3f}")

    log("3. Sample answers to training prompts, and to held-out prompts for the evaluation")
    fine_tuned = str(folder / "sft")
    done = run(sample, "samples", _SAMPLES, [fine_tuned, str(folder / "prompts.jsonl")])
    run(sample, "sft-answers", _ANSWERS | {"seed": seed + 1}, [fine_tuned, str(folder / "held-out.jsonl")])
    log(
        f"   {done['sample/responses']:,.0f} answers to training prompts, {done['sample/tokens']:.1f} tokens on average"
    )

    log("4. Score every answer with the world's exact judge, and pair the best with the worst answer to each prompt")
    keep_cut = PairSettings(keep_unfinished=True)  # the exact judge scores answers that were cut off correctly
    report = pair_responses(folder / "samples/responses.jsonl", judge, folder / "pairs.jsonl", keep_cut)
    pair_responses(folder / "sft-answers/responses.jsonl", judge, folder / "held-out-pairs.jsonl", keep_cut)
    for text in report.lines():
        log(f"   {text}")

    log("5. Train with SimPO on the pairs")
    data = {"dataset_name": folder / "pairs.jsonl", "eval_dataset_name": folder / "held-out-pairs.jsonl"}
    done = run(train, "simpo", data | {"model_name_or_path": fine_tuned, "save_strategy": "no"} | _SIMPO)
    before, after = (done[f"eval_rewards/accuracies/{stage}"] for stage in ("before", "after"))
    log(
        f"   {done['train/steps']:,.0f} steps; reward accuracy on held-out pairs {before:.2f} before, {after:.2f} after"
    )

    log("6. Sample the new model's answers to the held-out prompts, and compare them with the fine-tuned model's")
    run(sample, "simpo-answers", _ANSWERS | {"seed": seed + 1}, [str(folder / "simpo"), str(folder / "held-out.jsonl")])


def _plot(folder: Path, contests: Sequence[PromptAnswers], metrics: Sequence[Metric]) -> None:
    names = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
    start = {
        metric.name: metric.value
        for metric in read_results(folder / "simpo/results.json").metrics
        if metric.stage == "before"
    }
    logs = [{"step": 0} | start, *read_lines(folder / "simpo/metrics.jsonl")]
    plot_training(folder / "training.png", logs, names, "SimPO on pairs of the model's own answers")
    found = {(metric.name, metric.stage): metric.interval for metric in metrics}
    wins = found["win_rate", "after"]
    low, high = (None if bound is None else 1 - bound for bound in (wins.high, wins.low))
    rates = {
        "win rate": {"SFT": Interval(1 - wins.value, low, high, wins.n, wins.method), "SimPO": wins},
        "correct answers": {heading: found["correct", stage] for stage, heading in _HEADINGS.items()},
    }
    plot_rates(folder / "rates.png", rates, "Answers to held-out prompts", even="win rate")
    sides = {"SFT": [contest.b for contest in contests], "SimPO": [contest.a for contest in contests]}
    lengths = {
        model: [len(ids) for record in records for ids in record["response_ids"]] for model, records in sides.items()
    }
    plot_lengths(folder / "lengths.png", lengths, "Length of answers to held-out prompts")


def _show(contests: Sequence[PromptAnswers]) -> None:
    """The prompts at fixed percentiles of the change in score, with the answers that are compared."""

    def score(contest: PromptAnswers, record: Any) -> float:
        return judge(contest.prompt, record["responses"][0])

    def change(contest: PromptAnswers) -> float:
        return score(contest, contest.a) - score(contest, contest.b)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    ranked = sorted(contests, key=change)
    shares = ", ".join(f"{share}th" for share in _PERCENTILES)
    console.print("Examples: each model's first answer to the held-out prompts")
    console.print(f"at the {shares} percentile of the change in score:")
    for share in _PERCENTILES:
        contest = ranked[round(share / 100 * (len(ranked) - 1))]
        title = f"  {printable(contest.prompt)}   ({share}th percentile: {change(contest):+.1f})"
        console.print(Text(title, style="bold"))
        for model, record in (("SFT", contest.b), ("SimPO", contest.a)):
            console.print(Text(f"    {model:<7} {score(contest, record):4.1f}  {printable(record['responses'][0])}"))
