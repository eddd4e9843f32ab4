"""The claims of the SimPO paper in miniature, each with its interval and a verdict by rule.

examples:
  simpo reproduce ablation gamma --output_dir runs/reproduce
  simpo reproduce 1 --setting llama3-base
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from simpo.cli._shared import require_single_process
from simpo.config import check_values, parse_settings, setting
from simpo.config.command_line import split_options
from simpo.workflows.reproduction.run import PAGE, plan, reproduce
from simpo.workflows.reproduction.study import read_studies


@dataclass(kw_only=True)
class ReproduceSettings:
    """Which studies, and where."""

    studies: list[str] = setting([], "Names or numbers of studies (default: all); they may also come first.")
    output_dir: Path = setting(Path("runs/reproduce"), "Folder of the run; the same one continues it and adds studies.")
    processes: int = setting(min(2, os.cpu_count() or 1), "Trials that run at the same time.", least=1)
    setting: str | None = setting(None, "Print the plan for a setting of the paper instead, e.g. llama3-base.")

    def __post_init__(self) -> None:
        check_values(self)


def main(argv: list[str]) -> int:
    """Run the studies, or print the plan; then print the verdicts."""
    plain, _ = split_options(argv)
    named = ["--studies", *(name for _, name in plain)] if plain else []
    settings_argv = [*named, *argv[len(plain) :]]
    (settings,) = parse_settings(settings_argv, (ReproduceSettings,), command="reproduce", about=__doc__)
    require_single_process("reproduce", "start it without torchrun")
    studies = read_studies(settings.studies)
    if settings.setting is not None:
        print("\n".join(plan(studies, settings.setting)))
        return 0
    outcomes = reproduce(studies, settings.output_dir, processes=settings.processes, argv=argv)
    for outcome in outcomes:
        print(f"{outcome.verdict:<19} {outcome.claim.claim}")
    counts = Counter(outcome.verdict for outcome in outcomes)
    print("claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    print(f"read:   {settings.output_dir / PAGE}")
    return 0
