"""Which of two models is better, by any judges.

examples:
  simpo compare outputs/simpo outputs/sft --prompts prompts.jsonl --judge exact --output_dir outputs/compared
  simpo compare answers-a.json answers-b.json --judge reward:org/reward-model --judge human:verdicts.jsonl \\
      --output_dir outputs/compared
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpo.cli._shared import refuse_several
from simpo.config import parse_settings
from simpo.data.settings import RenderSettings
from simpo.evaluation.compare import DIFFERENCES, VERDICTS, CompareArguments, SampledWith, compare
from simpo.generation.sample import EngineName
from simpo.generation.settings import SamplingSettings
from simpo.judging.registry import JUDGES
from simpo.judging.settings import JudgeSettings
from simpo.runs.results import Stage, print_results

_SIDE = "Model, file of answers, or folder of simpo sample"


@dataclass(kw_only=True)
class CompareSettings:
    """What is compared, and by which judges."""

    a: str = field(metadata={"help": f"{_SIDE}, whose win rate is measured.", "positional": "A"})
    b: str = field(metadata={"help": f"{_SIDE}, which it is compared with.", "positional": "B"})
    output_dir: Path = field(metadata={"help": "Folder of the run; the same one continues it."})
    judge: list[str] = field(metadata={"help": f"One or several of {JUDGES}.", "repeat": True})
    prompts: str | None = field(
        default=None, metadata={"help": "File, folder or hub id of the prompts that models answer."}
    )
    split: str = field(default="train", metadata={"help": "Split of the prompts."})
    sampling: SamplingSettings = field(default=SamplingSettings(temperature=0.0))
    engine: EngineName = field(default="transformers", metadata={"help": "What generates the answers."})
    rendering: RenderSettings
    judging: JudgeSettings


def main(argv: list[str]) -> int:
    """Compare, print the table of results and where the details are."""
    (settings,) = parse_settings(argv, (CompareSettings,), command="compare", about=__doc__)
    refuse_several("compare", "with several, sample both sides with simpo sample, and compare the folders")
    judging, folder = settings.judging, settings.output_dir
    sampled = SampledWith(
        settings.prompts,
        settings.split,
        settings.sampling,
        settings.engine,
        judging.dtype,
        judging.trust_remote_code,
        settings.rendering,
    )
    arguments = CompareArguments(
        settings.a, settings.b, sampled, settings.judge, judging.options(), judging.token_prices(), judging.yes
    )
    results = compare(arguments, folder, argv=argv)
    print("A win rate is the share of prompts on which A's answer is better than B's; ties count half.")
    headings: dict[Stage | None, str] = {"before": "B", "after": "A"}
    print_results(results, headings=headings)
    print(f"A: {settings.a}\nB: {settings.b}")
    print(f"verdicts: {folder / VERDICTS}\nread:     {folder / DIFFERENCES}")
    return 0
