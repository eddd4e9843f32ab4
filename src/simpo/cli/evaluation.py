"""Commands that measure whether a model is better: simpo compare, evaluate and label."""

from __future__ import annotations

import inspect
import shlex

from simpo.cli._shared import print_report, read_settings, require_single_process
from simpo.config import parse_settings
from simpo.config.fields import nearest
from simpo.errors import SimpoError
from simpo.evaluation import compare as comparison
from simpo.evaluation.runner import BENCHMARKS, run_benchmark, settings_type
from simpo.labeling import run as labeling
from simpo.runs.results import Stage, print_results, read_results


def compare(argv: list[str]) -> None:
    """Compare two models' answers with one or more judges.

    examples:
      simpo compare outputs/simpo outputs/sft --prompts prompts.jsonl --judge exact --output_dir outputs/compared
      simpo compare answers-a.json answers-b.json --judge reward:org/reward-model --judge human:verdicts.jsonl \\
          --output_dir outputs/compared
    """
    remedy = "to use several, run simpo sample for both sides and compare the folders"
    settings = read_settings(compare, comparison.CompareSettings, argv, remedy=remedy)
    results = comparison.compare(settings, argv=argv)
    print("The win rate is the share of prompts on which A's answer is better than B's; a tie counts as half a win.")
    headings: dict[Stage | None, str] = {"before": "B", "after": "A"}
    print_results(results, headings=headings)
    print(f"A: {settings.a}\nB: {settings.b}")
    print(f"verdicts: {settings.output_dir / comparison.VERDICTS}")
    print_report(settings.output_dir)


def evaluate(argv: list[str]) -> None:
    """Evaluate a model on a benchmark.

    examples:
      simpo evaluate alpaca_eval outputs/simpo --judge_url https://api.openai.com/v1 --judge_model gpt-4-1106-preview \\
          --output_dir outputs/alpaca_eval
      simpo evaluate gsm8k outputs/simpo --against outputs/sft --output_dir outputs/gsm8k
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: simpo evaluate BENCHMARK ...   (run simpo evaluate BENCHMARK --help for its settings)\n")
        print(f"{inspect.getdoc(evaluate)}\n\nbenchmarks:")
        print("\n".join(f"  {name:<12} {entry.summary}" for name, entry in BENCHMARKS.items()))
        return
    name, *arguments = argv
    if name not in BENCHMARKS:
        raise SimpoError(
            f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}; the benchmarks are {', '.join(BENCHMARKS)}"
        )
    kind = settings_type(name)
    (settings,) = parse_settings(arguments, (kind,), command=f"evaluate {name}", about=inspect.getdoc(kind))
    require_single_process("evaluate", "start it without torchrun")
    run_benchmark(name, settings, argv=argv)
    print_report(settings.output_dir.expanduser())


def label(argv: list[str]) -> None:
    """Collect human judgments on a local web page, and export them.

    examples:
      simpo label outputs/simpo-answers --against outputs/sft-answers --overlap 0.3 --output_dir outputs/labels
      simpo label --export outputs/labels
    """
    settings = read_settings(label, labeling.LabelSettings, argv)
    if settings.export is None:
        judged = labeling.label(settings, argv=argv)
        print(f"\njudged: {judged:,} items so far; run the same command to continue")
        print(f"next:   simpo label --export {shlex.quote(str(settings.output_dir))}")
        return
    folder = settings.export
    preferences = folder / labeling.PREFERENCES
    results = labeling.export_run(folder)
    print_results(results)
    print(f"preferences: {preferences}\nverdicts:    {folder / labeling.VERDICTS}")
    print(f"judgments:   {folder / labeling.JUDGMENTS}")
    if any(metric.value for metric in read_results(results).metrics if metric.name == labeling.PREFERENCE_COUNT):
        print(f"next:        simpo reward --dataset_name {shlex.quote(str(preferences))} ...")
    else:
        print("next:        judge more items; there are no preferences to train on yet")
