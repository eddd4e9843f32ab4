"""MT-Bench: both turns of MODEL or of a file of its answers rated from 1 to 10."""

from __future__ import annotations

from simpo.cli._evaluate._options import add_run_options, add_sampling_options, run
from simpo.cli._server import add_server_options
from simpo.config.arguments import ArgumentParser
from simpo.generation.settings import SamplingSettings

_DEFAULTS = SamplingSettings(temperature=0.7, top_p=1.0, max_new_tokens=1024)


def main(argv: list[str]) -> int:
    """Answer, rate and average."""
    return run("mt_bench", _parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("evaluate mt_bench", __doc__)
    parser.add_argument("model", metavar="MODEL_OR_ANSWERS", help="model, or file of its answers")
    add_run_options(parser)
    add = parser.add_argument
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add("--references", metavar="FILE", help="reference answers, instead of those in the questions")
    add("--judge_prompt", metavar="FILE", help="judge_prompts.jsonl (default: ours)")
    add_server_options(parser)
    add_sampling_options(parser, _DEFAULTS, "0, 0.1 or 0.7 by category, as the benchmark")
    return parser
