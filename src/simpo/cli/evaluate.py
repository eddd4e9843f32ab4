"""Evaluate a model on a benchmark.

examples:
  simpo evaluate alpaca_eval outputs/simpo --judge_url https://api.openai.com/v1 --judge_model gpt-4-1106-preview \\
      --output_dir outputs/alpaca_eval
  simpo evaluate gsm8k outputs/simpo --against outputs/sft --output_dir outputs/gsm8k
"""

from __future__ import annotations

import inspect

from simpo.cli._shared import print_report, require_single_process
from simpo.config import parse_settings
from simpo.config.coercion import nearest
from simpo.errors import SimpoError
from simpo.evaluation.runner import BENCHMARKS, run_benchmark, settings_type


def main(argv: list[str]) -> int:
    """Run the benchmark that is named first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: simpo evaluate BENCHMARK ...   (simpo evaluate BENCHMARK --help lists its settings)\n\n{__doc__}"
        )
        print("\n".join(["benchmarks:", *(f"  {name:<12} {entry.summary}" for name, entry in BENCHMARKS.items())]))
        return 0
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
    return 0
