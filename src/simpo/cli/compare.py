"""Which of two models is better, by any judges: simpo compare A B --prompts FILE --judge JUDGE --output_dir DIR"""

from __future__ import annotations

from pathlib import Path

from simpo.cli._processes import refuse_several
from simpo.cli._rendering import add_rendering_options, rendering
from simpo.cli._server import add_judge_options, judge_options, prices_of
from simpo.config.arguments import ArgumentParser
from simpo.evaluation.compare import DIFFERENCES, VERDICTS, CompareArguments, SampledWith, compare
from simpo.generation.settings import SamplingSettings
from simpo.judging.registry import JUDGES
from simpo.runs.results import Stage, print_results

_SAMPLING = {
    "n": (int, "answers of each model to every prompt (default 1)"),
    "temperature": (float, "divides the logits; 0, the default, takes the likeliest token every time"),
    "top_p": (float, "draw from the smallest set of tokens with this probability; 1 is off (default 0.95)"),
    "max_new_tokens": (int, "longest answer in tokens (default 2048, or half the model's context if that is less)"),
    "seed": (int, "of sampling and of the bootstrap (default 42)"),
    "chunk_size": (int, "answers generated and stored together (default 32 on a CPU, 64 on an accelerator)"),
}


def main(argv: list[str]) -> int:
    """Compare, print the table of results and where the details are."""
    arguments = _parser().parse_args(argv)
    refuse_several("compare", "with several, sample both sides with simpo sample, and compare the folders")
    given = {key: getattr(arguments, key) for key in _SAMPLING if getattr(arguments, key) is not None}
    settings = SamplingSettings(**{"temperature": 0.0} | given)
    folder = Path(arguments.output_dir).expanduser()
    results = compare(
        CompareArguments(
            arguments.a,
            arguments.b,
            SampledWith(
                arguments.prompts,
                arguments.split,
                settings,
                arguments.engine,
                arguments.dtype,
                arguments.trust_remote_code,
                rendering(arguments),
            ),
            arguments.judge,
            judge_options(arguments),
            prices_of(arguments),
            arguments.yes,
        ),
        folder,
        argv=argv,
    )
    print("A win rate is the share of prompts on which A's answer is better than B's, ties half.")
    headings: dict[Stage | None, str] = {"before": "B", "after": "A"}
    print_results(results, headings=headings)
    print(f"A: {arguments.a}\nB: {arguments.b}")
    print(f"verdicts: {folder / VERDICTS}\nread:     {folder / DIFFERENCES}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("compare", __doc__)
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="model, file of answers, or folder of simpo sample")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run; the same one continues")
    parser.add_argument("--judge", required=True, action="append", help=f"one or, repeated, several of {JUDGES}")
    parser.add_argument("--prompts", metavar="NAME", help="file, folder or hub id of what models are asked")
    parser.add_argument("--split", default="train", help="split of --prompts (default train)")
    for name, (kind, text) in _SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=text)
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what generates (transformers)"
    )
    add_rendering_options(parser)
    add_judge_options(parser)
    return parser
