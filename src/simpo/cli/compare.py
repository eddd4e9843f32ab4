"""Which of two models is better, by any judges.

examples:
  simpo compare outputs/simpo outputs/sft --prompts prompts.jsonl --judge exact --output_dir outputs/compared
  simpo compare answers-a.json answers-b.json --judge reward:org/reward-model --judge human:verdicts.jsonl \\
      --output_dir outputs/compared
"""

from __future__ import annotations

from simpo.cli._shared import print_report, require_single_process
from simpo.config import parse_settings
from simpo.evaluation.compare import VERDICTS, CompareSettings, compare
from simpo.runs.results import Stage, print_results


def main(argv: list[str]) -> int:
    """Compare, print the table of results and where the details are."""
    (settings,) = parse_settings(argv, (CompareSettings,), command="compare", about=__doc__)
    require_single_process("compare", "with several, sample both sides with simpo sample, and compare the folders")
    results = compare(settings, argv=argv)
    print("A win rate is the share of prompts on which A's answer is better than B's; ties count half.")
    headings: dict[Stage | None, str] = {"before": "B", "after": "A"}
    print_results(results, headings=headings)
    print(f"A: {settings.a}\nB: {settings.b}")
    print(f"verdicts: {settings.output_dir / VERDICTS}")
    print_report(settings.output_dir)
    return 0
