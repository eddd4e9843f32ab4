"""Arena-Hard v0.1 and v2: MODEL or a file of its answers in two games a prompt against the baseline."""

from __future__ import annotations

from simpo.cli._evaluate._options import add_run_options, add_sampling_options, run
from simpo.cli._server import add_server_options
from simpo.config.arguments import ArgumentParser
from simpo.generation.settings import SamplingSettings

_DEFAULTS = SamplingSettings(temperature=0.0, top_p=1.0)


def main(argv: list[str]) -> int:
    """Answer, judge and count."""
    return run("arena_hard", _parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("evaluate arena_hard", __doc__)
    parser.add_argument("model", metavar="MODEL_OR_ANSWERS", help="model, or file of its answers")
    add_run_options(parser)
    add = parser.add_argument
    add("--version", choices=("v0.1", "v2"), default="v0.1", help="of the benchmark (default v0.1, the paper's)")
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add("--baseline", required=True, action="append", metavar="FILE", help="the baseline's answers; v2 has two files")
    add("--judge_prompt", metavar="FILE", help="YAML with system_prompt and prompt_template (default: ours)")
    add_server_options(parser, timeout=600.0)  # judgments are long
    add_sampling_options(parser, _DEFAULTS)
    return parser
