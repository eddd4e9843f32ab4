"""The whole of preference alignment on a built-in tiny world, in minutes and without a download."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from simpo.analysis.plots import plot_lengths, plot_rates, plot_training
from simpo.cli import sample, sft, train
from simpo.config.arguments import ArgumentParser
from simpo.errors import SimpoError
from simpo.evaluation.compare import PromptAnswers, compare_answers, read_matched
from simpo.runs.folder import RunFolder, RunRecord
from simpo.runs.lines import read_lines
from simpo.runs.results import Metric, Stage, print_results
from simpo.runs.terminal import printable
from simpo.statistics import Interval
from simpo.workflows.pair import PairSettings, pair_responses
from simpo.world.judge import correct, judge
from simpo.world.pairs import write_model, write_prompts, write_sft

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
}
# The world is judged as it is sampled: from the model's own distribution.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48, "chunk_size": 128}
_SAMPLES, _ANSWERS = {"n": 6} | _SAMPLING, {"n": 4} | _SAMPLING
_SHOWN = 3

_HEADINGS: dict[Stage | None, str] = {"before": "SFT", "after": "SimPO"}


def main(argv: list[str]) -> int:
    """Fine-tune, sample, pair, train and compare, each by the command or function that anybody would use."""
    parser = ArgumentParser("demo", __doc__)
    parser.add_argument(
        "--output_dir", help="folder of the demo (default: the first of runs/demo-N that is free or was not finished)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # for a model this small, threads wait for one another longer than they work
    identity = {"seed": arguments.seed}
    folder = _own_folder(identity) if arguments.output_dir is None else Path(arguments.output_dir).expanduser()
    with RunFolder(folder, command="demo") as run:
        run.begin(identity, argv=argv)

        def align() -> list[Metric]:
            _align(folder, arguments.seed, run.log)
            contests = read_matched(folder / "simpo-answers/responses.jsonl", folder / "sft-answers/responses.jsonl")
            metrics = compare_answers(contests, judge, {"correct": correct})
            _plot(folder, contests, metrics)
            return metrics

        run.complete(align)
    print(
        f"Fresh answers to {_HELD_OUT} held-out prompts, {_ANSWERS['n']} of each model to a prompt. The exact judge's "
        "score goes from 0 to 10; an answer is correct if all that it says is right and nothing is missing."
    )
    print_results(folder / "results.json", headings=_HEADINGS)
    _show(read_matched(folder / "simpo-answers/responses.jsonl", folder / "sft-answers/responses.jsonl"))
    print(f"\nplots: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print(f"next:  simpo chat {shlex.quote(str(folder / 'simpo'))}")
    return 0


def _own_folder(identity: dict[str, Any]) -> Path:
    """The first of runs/demo-N that is free, or holds this demo unfinished."""
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
    """All stages; each is its own run, so that a demo that was stopped goes on where it was."""
    if not (folder / "start").exists():  # whole or absent
        write_model(folder / "start", seed)
    write_sft(folder / "sft.jsonl", _SFT_ROWS, seed)  # always the same, so that writing them again changes nothing
    write_prompts(folder / "prompts.jsonl", _PROMPTS, seed)
    write_prompts(folder / "held-out.jsonl", _HELD_OUT, seed, held_out=True)
    log(f"1. A small random model and the tiny world's demonstrations and prompts are in {folder}")
    log("2. It learns to answer from demonstrations, not all of which are good:")
    data = {"dataset_name": folder / "sft.jsonl", "model_name_or_path": folder / "start"}
    _command(log, sft, data | {"output_dir": folder / "sft", "seed": seed, "save_strategy": "no"} | _SFT)
    log("3. It answers training prompts, several times each:")
    _sample(log, folder, "sft", "prompts.jsonl", "samples", _SAMPLES | {"seed": seed})
    log("4. The world's exact judge scores every answer; the best and the worst of a prompt make a pair:")
    cut_too = PairSettings(keep_unfinished=True)  # an exact judge knows them for what they are
    report = pair_responses(folder / "samples/responses.jsonl", judge, folder / "pairs.jsonl", cut_too)
    for line in report.lines():
        log(f"   {line}")
    log("5. SimPO learns from the pairs:")
    data = {"dataset_name": folder / "pairs.jsonl", "model_name_or_path": folder / "sft"}
    _command(log, train, data | {"output_dir": folder / "simpo", "seed": seed, "save_strategy": "no"} | _SIMPO)
    log("6. Both models answer prompts that neither has seen:")
    for model in ("sft", "simpo"):
        _sample(log, folder, model, "held-out.jsonl", f"{model}-answers", _ANSWERS | {"seed": seed + 1})
    held_out = folder / "held-out-pairs.jsonl"  # for other recipes
    pair_responses(folder / "sft-answers/responses.jsonl", judge, held_out, cut_too)


def _sample(
    log: Callable[[str], None], folder: Path, model: str, prompts: str, output: str, options: dict[str, Any]
) -> None:
    _command(log, sample, {"output_dir": folder / output} | options, [str(folder / model), str(folder / prompts)])


def _command(log: Callable[[str], None], command: Any, options: dict[str, Any], positional: Sequence[str] = ()) -> None:
    """Run one of simpo's commands as from the command line."""
    argv = [*positional, *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
    log(f"   simpo {command.__name__.rpartition('.')[2]} {shlex.join(argv)}")
    code = command.main(argv)
    assert code == 0, code


def _plot(folder: Path, contests: Sequence[PromptAnswers], metrics: Sequence[Metric]) -> None:
    names = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}
    plot_training(folder / "training.png", read_lines(folder / "simpo/metrics.jsonl"), names, "SimPO on its own pairs")
    found = {(metric.name, metric.stage): metric for metric in metrics}
    wins = found["win_rate", "after"].interval
    rates = {"win rate": {"SFT": _opposite(wins), "SimPO": wins}}
    for name, label in (("correct", "correct"), ("end_of_turn_rate", "ended")):
        rates[label] = {_HEADINGS[stage]: found[name, stage].interval for stage in ("before", "after")}
    plot_rates(folder / "rates.png", rates, "Answers to held-out prompts", even="win rate")
    sides = {"SFT": [contest.b for contest in contests], "SimPO": [contest.a for contest in contests]}
    lengths = {
        model: [len(ids) for record in records for ids in record["response_ids"]] for model, records in sides.items()
    }
    plot_lengths(folder / "lengths.png", lengths, "Length of answers to held-out prompts")


def _opposite(share: Interval) -> Interval:
    low, high = (None if bound is None else 1 - bound for bound in (share.high, share.low))
    return Interval(1 - share.value, low, high, share.n, share.method)


def _show(contests: Sequence[PromptAnswers]) -> None:
    """The first prompts of the file with both models' first answers."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(Text(f"The first {_SHOWN} held-out prompts with the first answer of each model:"))
    for contest in contests[:_SHOWN]:
        console.print(Text(f"\n  prompt  {printable(contest.prompt)}", style="bold"))
        for model, record in (("SFT", contest.b), ("SimPO", contest.a)):
            answer = record["responses"][0]
            console.print(Text(f"  {model:<7} {printable(answer)}   ({judge(contest.prompt, answer):.1f} of 10)"))
