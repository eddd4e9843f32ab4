"""Score sampled responses.

examples:
  simpo annotate outputs/answers --annotator reward:org/reward-model --output_dir outputs/scores
  simpo annotate answers.jsonl --annotator api --judge_url https://api.openai.com/v1 --judge_model gpt-4.1 \\
      --prices 2 8 --output_dir outputs/scores
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from simpo.cli._shared import require_single_process
from simpo.config import parse_settings, required, setting_of
from simpo.judging.annotate import BEST, FILE_NAME, AnnotateArguments, annotate
from simpo.judging.settings import Annotator, AnnotatorArguments, JudgeSettings, Normalization
from simpo.runs.results import print_results


@dataclass(kw_only=True)
class AnnotateSettings:
    """The responses to score and the annotator."""

    responses: Path = required("responses.jsonl of simpo sample, or its folder.", positional="RESPONSES")
    annotator: Annotator = setting_of(AnnotatorArguments, "annotator")
    annotator_normalization: Normalization | None = setting_of(AnnotatorArguments, "annotator_normalization")
    output_dir: Path = required("Folder of the run; the same one continues it.")
    judge: JudgeSettings


def main(argv: list[str]) -> int:
    """Annotate, print the table of results and what to do next."""
    (settings,) = parse_settings(argv, (AnnotateSettings,), command="annotate", about=__doc__)
    require_single_process("annotate", "start it without torchrun")
    judge, folder = settings.judge, settings.output_dir
    given = AnnotateArguments(
        settings.responses,
        settings.annotator,
        judge.options(),
        settings.annotator_normalization,
        judge.token_prices(),
        judge.yes,
    )
    print_results(annotate(given, folder, argv=argv))
    print(f"annotated: {folder / FILE_NAME}\nbest of N: {folder / BEST}")
    print(f"next:      simpo pair {shlex.quote(str(folder))} --output_dir DIR")
    return 0
