"""GSM8K by exact match: a quick check of what alignment did to arithmetic, before and after."""

from __future__ import annotations

from simpo.cli._evaluate._options import add_run_options, add_sampling_options, run
from simpo.config.arguments import ArgumentParser
from simpo.generation.settings import SamplingSettings

_DEFAULTS = SamplingSettings(temperature=0.0, top_p=1.0)


def main(argv: list[str]) -> int:
    """Answer and count."""
    return run("gsm8k", _parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("evaluate gsm8k", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of the model")
    add_run_options(parser)
    add = parser.add_argument
    add("--against", metavar="START", help="the model that it was made from, for the difference")
    add("--data", default="openai/gsm8k", metavar="FILE", help="rows of question and answer (default openai/gsm8k)")
    add("--split", default="test", help="of a hub data set (default test)")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add_sampling_options(parser, _DEFAULTS)
    return parser
