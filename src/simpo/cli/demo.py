"""``simpo demo``: preference alignment from start to finish on a built-in tiny world."""

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
# Sample from the models' own distribution: temperature 1 and no truncation.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48, "chunk_size": 128}
_SAMPLES, _ANSWERS = {"n": 6} | _SAMPLING, {"n": 4} | _SAMPLING
_PERCENTILES = (10, 50, 90)  # of the change in score; prompts at these are printed

_HEADINGS: dict[Stage | None, str] = {"before": "SFT", "after": "SimPO"}


@dataclass(frozen=True)
class DemoSettings:
    """Demo."""

    output_dir: Path | None = setting(
        None, "Output folder (default: the first runs/demo-N that does not exist or is unfinished)."
    )
    seed: int = setting(0, "Random seed for all steps.")


def demo(argv: list[str]) -> None:
    """Run preference alignment from start to finish on a built-in tiny world, in minutes and without downloads.

    examples:
      simpo demo
      simpo demo --seed 1 --output_dir runs/demo-seed-1
    """
    (arguments,) = parse_settings(argv, (DemoSettings,), command="demo", about=demo.__doc__)
    torch.set_num_threads(1)  # for a model this small, thread synchronization costs more than it saves
    identity = {"seed": arguments.seed}
    folder = _default_folder(identity) if arguments.output_dir is None else arguments.output_dir
    answers = folder / "simpo-answers/responses.jsonl", folder / "sft-answers/responses.jsonl"
    with RunFolder(folder, command="demo") as run:
        run.begin(identity, argv=argv)

        def align() -> list[Metric]:
            _align(folder, arguments.seed, run.log)
            comparisons = read_matched(*answers)
            metrics = compare_answers(comparisons, judge, {"correct": correct})
            _plot(folder, comparisons, metrics)
            return metrics

        run.complete(align)
    print(
        f"\nEach model gave {_ANSWERS['n']} answers to each of {_HELD_OUT} held-out prompts. The exact judge scores "
        "them from 0 to 10.\nAn answer is correct if every statement in it is right and nothing is missing."
    )
    print_results(folder / "results.json", headings=_HEADINGS)
    _print_examples(read_matched(*answers))
    print(f"\nplots: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print_report(folder)
    print(f"next:  simpo chat {shlex.quote(str(folder / 'simpo'))}")


def _default_folder(identity: dict[str, Any]) -> Path:
    """Return the first runs/demo-N that does not exist or holds an unfinished run of this demo."""
    for number in count(1):
        path = Path(f"runs/demo-{number}")
        if not path.exists():
            break
        with suppress(SimpoError, FileNotFoundError):
            record = RunRecord.read(path)
            if (record.command, record.identity, record.status) == ("demo", identity, "running"):
                break
    return path


def _align(folder: Path, seed: int, log: Callable[[str], None]) -> None:
    """Run all stages. Each is a run of its own, so an interrupted demo resumes where it stopped."""

    def run(
        command: Callable[[list[str]], None], output: str, options: dict[str, Any], positional: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run a command as if from the command line and return its metrics; its output only goes to its log."""
        options = {"output_dir": folder / output, "seed": seed} | options
        argv = [*positional, *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
        log(f"   simpo {command.__name__}: {folder / output}")
        with redirect_stdout(StringIO()):
            command(argv)
        metrics = read_results(folder / output / "results.json").metrics
        return {"/".join(filter(None, (metric.name, metric.stage))): metric.value for metric in metrics}

    if not (folder / "start").exists():  # written atomically
        write_model(folder / "start", seed)
    write_sft(folder / "sft.jsonl", _SFT_ROWS, seed)  # deterministic, so rewriting is harmless
    write_prompts(folder / "prompts.jsonl", _PROMPTS, seed)
    write_prompts(folder / "held-out.jsonl", _HELD_OUT, seed, held_out=True)
    log("Each command below leaves its options (recipe.yaml) and output (log.txt) in the folder shown next to it.")
    log(f"1. Create a small random model, and demonstrations and prompts from the tiny world, in {folder}")

    log("2. Fine-tune the model on the demonstrations, not all of which are good")
    data = {"dataset_name": folder / "sft.jsonl", "model_name_or_path": folder / "start", "save_strategy": "no"}
    metrics = run(sft, "sft", data | _SFT)
    steps, loss = metrics["train/steps"], metrics["train/loss"]
    log(f"   {steps:,.0f} steps on {_SFT_ROWS:,} demonstrations, mean loss {loss:.3f}")

    log("3. Sample answers to the training prompts, and to held-out prompts for evaluation")
    fine_tuned = str(folder / "sft")
    metrics = run(sample, "samples", _SAMPLES, [fine_tuned, str(folder / "prompts.jsonl")])
    run(sample, "sft-answers", _ANSWERS | {"seed": seed + 1}, [fine_tuned, str(folder / "held-out.jsonl")])
    count, length = metrics["sample/responses"], metrics["sample/tokens"]
    log(f"   {count:,.0f} answers to training prompts, {length:.1f} tokens on average")

    log("4. Score every answer with the world's exact judge, and pair each prompt's best answer with its worst")
    settings = PairSettings(keep_unfinished=True)  # the exact judge also scores cut-off answers correctly
    report = pair_responses(folder / "samples/responses.jsonl", judge, folder / "pairs.jsonl", settings)
    pair_responses(folder / "sft-answers/responses.jsonl", judge, folder / "held-out-pairs.jsonl", settings)
    for text in report.lines():
        log(f"   {text}")

    log("5. Train with SimPO on the pairs")
    data = {"dataset_name": folder / "pairs.jsonl", "eval_dataset_name": folder / "held-out-pairs.jsonl"}
    metrics = run(train, "simpo", data | {"model_name_or_path": fine_tuned, "save_strategy": "no"} | _SIMPO)
    before, after = (metrics[f"eval_rewards/accuracies/{stage}"] for stage in ("before", "after"))
    steps = metrics["train/steps"]
    log(f"   {steps:,.0f} steps; reward accuracy on held-out pairs: {before:.2f} before, {after:.2f} after")

    log("6. Sample the new model's answers to the held-out prompts, and compare them with the fine-tuned model's")
    run(sample, "simpo-answers", _ANSWERS | {"seed": seed + 1}, [str(folder / "simpo"), str(folder / "held-out.jsonl")])


def _plot(folder: Path, comparisons: Sequence[PromptAnswers], metrics: Sequence[Metric]) -> None:
    names = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
    start = {
        metric.name: metric.value
        for metric in read_results(folder / "simpo/results.json").metrics
        if metric.stage == "before"
    }
    logs = [{"step": 0} | start, *read_lines(folder / "simpo/metrics.jsonl")]
    plot_training(folder / "training.png", logs, names, "SimPO on pairs of the model's own answers")
    intervals = {(metric.name, metric.stage): metric.interval for metric in metrics}
    wins = intervals["win_rate", "after"]
    low, high = (None if bound is None else 1 - bound for bound in (wins.high, wins.low))
    rates = {
        "win rate": {"SFT": Interval(1 - wins.value, low, high, wins.n, wins.method), "SimPO": wins},
        "correct answers": {heading: intervals["correct", stage] for stage, heading in _HEADINGS.items()},
    }
    plot_rates(folder / "rates.png", rates, "Answers to held-out prompts", tie_line="win rate")
    sides = {"SFT": [one.b for one in comparisons], "SimPO": [one.a for one in comparisons]}
    lengths = {
        model: [len(ids) for record in records for ids in record["response_ids"]] for model, records in sides.items()
    }
    plot_lengths(folder / "lengths.png", lengths, "Length of answers to held-out prompts")


def _print_examples(comparisons: Sequence[PromptAnswers]) -> None:
    """Print the prompts at fixed percentiles of the change in score, with both models' first answers."""

    def score(comparison: PromptAnswers, record: Any) -> float:
        return judge(comparison.prompt, record["responses"][0])

    def change(comparison: PromptAnswers) -> float:
        return score(comparison, comparison.a) - score(comparison, comparison.b)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    ranked = sorted(comparisons, key=change)
    ordinals = ", ".join(f"{percentile}th" for percentile in _PERCENTILES)
    console.print("Examples: each model's first answer to the held-out prompts")
    console.print(f"at the {ordinals} percentile of the change in score:")
    for percentile in _PERCENTILES:
        comparison = ranked[round(percentile / 100 * (len(ranked) - 1))]
        title = f"  {printable(comparison.prompt)}   ({percentile}th percentile: {change(comparison):+.1f})"
        console.print(Text(title, style="bold"))
        for model, record in (("SFT", comparison.b), ("SimPO", comparison.a)):
            console.print(Text(f"    {model:<7} {score(comparison, record):4.1f}  {printable(record['responses'][0])}"))
