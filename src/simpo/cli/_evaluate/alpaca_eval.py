"""AlpacaEval 2: MODEL or model_outputs.json against gpt4_1106_preview, raw and length-controlled."""

from __future__ import annotations

from simpo.cli._evaluate._options import add_run_options, add_sampling_options, run
from simpo.cli._server import add_server_options
from simpo.config.arguments import ArgumentParser
from simpo.generation.settings import SamplingSettings

_DEFAULTS = SamplingSettings(temperature=0.7, top_p=1.0)


def main(argv: list[str]) -> int:
    """Answer, judge and count, or count what was judged."""
    return run("alpaca_eval", _parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("evaluate alpaca_eval", __doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL_OR_OUTPUTS", help="model, or file of outputs")
    add_run_options(parser)
    add = parser.add_argument
    add("--annotations", metavar="FILE", help="annotations.json to take figures from, instead of a model and a judge")
    add("--reference_outputs", metavar="FILE", help="instructions and the baseline's outputs (default: the hub's)")
    add("--gamed", metavar="FILE", help="df_gamed.csv: the gamed baselines (default: the hub's)")
    add("--difficulty", metavar="FILE", help="instruction_difficulty.csv (default: what the gamed baselines have)")
    add("--plain", action="store_true", help="a judge without log-probabilities: it names the better answer")
    add("--judge_prompt", metavar="FILE", help="the judge's prompt, e.g. the benchmark's own (default: ours)")
    add_server_options(parser)
    add_sampling_options(parser, _DEFAULTS)
    return parser
