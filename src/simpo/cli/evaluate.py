"""Evaluate a model on a benchmark: simpo evaluate alpaca_eval|arena_hard|mt_bench|academic|gsm8k ..."""

from __future__ import annotations

import importlib
import pkgutil

from simpo.cli import _evaluate
from simpo.cli._shared import refuse_several
from simpo.errors import SimpoError
from simpo.runs.signals import stoppable


def benchmark_names() -> list[str]:
    """Names of the benchmarks: the public modules of :mod:`simpo.cli._evaluate`."""
    names = (module.name for module in pkgutil.iter_modules(_evaluate.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def main(argv: list[str]) -> int:
    """Run the benchmark that is named first; Ctrl-C and SIGTERM end it in one line."""
    names = benchmark_names()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: simpo evaluate BENCHMARK [ARGUMENT ...]   (simpo evaluate BENCHMARK --help says more)\n")
        for name in names:
            module = importlib.import_module(f"simpo.cli._evaluate.{name}")
            print(f"  {name:<12} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if argv[0] not in names:
        raise SimpoError(f"unknown benchmark {argv[0]!r}; the benchmarks are {', '.join(names)}")
    refuse_several("evaluate", "start it without torchrun")
    with stoppable():
        return importlib.import_module(f"simpo.cli._evaluate.{argv[0]}").main(argv[1:])
