"""Score sampled responses: simpo annotate RESPONSES --annotator ANNOTATOR --output_dir DIR"""

from __future__ import annotations

import shlex
from pathlib import Path

from simpo.cli._processes import refuse_several
from simpo.cli._server import add_judge_options, judge_options, prices_of
from simpo.config.arguments import ArgumentParser
from simpo.judging.annotate import BEST, FILE_NAME, AnnotateArguments, annotate
from simpo.judging.registry import ANNOTATORS
from simpo.runs.results import print_results


def main(argv: list[str]) -> int:
    """Annotate, print the table of results and what to do next."""
    arguments = _parser().parse_args(argv)
    refuse_several("annotate", "start it without torchrun")
    folder = Path(arguments.output_dir).expanduser()
    given = AnnotateArguments(
        Path(arguments.responses).expanduser(),
        arguments.annotator,
        judge_options(arguments),
        prices_of(arguments),
        arguments.yes,
    )
    print_results(annotate(given, folder, argv=argv))
    print(f"annotated: {folder / FILE_NAME}\nbest of N: {folder / BEST}")
    print(f"next:      simpo pair {shlex.quote(str(folder))} --output_dir DIR")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("annotate", __doc__)
    parser.add_argument("responses", metavar="RESPONSES", help="responses.jsonl of simpo sample, or its folder")
    parser.add_argument("--annotator", required=True, help=f"one of {ANNOTATORS}")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run; the same one continues")
    add_judge_options(parser)
    return parser
