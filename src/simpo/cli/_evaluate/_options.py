"""Options that the benchmarks share, and how their results are shown."""

from __future__ import annotations

import dataclasses

from simpo.cli._rendering import add_rendering_options
from simpo.config.arguments import ArgumentParser
from simpo.evaluation.runner import run_benchmark, settings_type
from simpo.generation.settings import SamplingSettings


def add_run_options(parser: ArgumentParser) -> None:
    """Add the run's folder and the export."""
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run; the same one continues")
    parser.add_argument("--markdown", metavar="FILE", help="write the figures, and published ones, as Markdown too")


def add_sampling_options(parser: ArgumentParser, defaults: SamplingSettings, temperature: str | None = None) -> None:
    """Add how a model answers; ignored where answers are given in a file.

    Args:
        parser: gets the options.
        defaults: what they are if they are not given.
        temperature: in words, if its default is not one number.
    """
    add = parser.add_argument_group("answers of a model").add_argument
    longest = defaults.max_new_tokens or "2048, or half the model's context"
    usual = temperature or f"{defaults.temperature:g}"
    add("--temperature", type=float, metavar="X", help=f"0 is greedy (default {usual})")
    add("--top_p", type=float, metavar="X", help=f"of the likeliest tokens (default {defaults.top_p:g})")
    add("--max_new_tokens", type=int, metavar="N", help=f"longest answer (default {longest})")
    add("--seed", type=int, metavar="N", help=f"of sampling (default {defaults.seed})")
    add("--chunk_size", type=int, metavar="N", help="answers generated and stored together")
    add("--engine", choices=("transformers", "vllm"), default="transformers", help="what generates")
    add_model_options(parser)


def add_model_options(parser: ArgumentParser) -> None:
    """Add how a model is loaded."""
    parser.add_argument("--dtype", metavar="TYPE", help="type of the weights")
    parser.add_argument("--chat_template", metavar="TEMPLATE", help="template, file with one, or none")
    add_rendering_options(parser)
    parser.add_argument("--model_revision", default="main", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_remote_code()


def run(benchmark: str, parser: ArgumentParser, argv: list[str]) -> int:
    """Run a benchmark with the settings that the command line gives."""
    arguments = parser.parse_args(argv)
    cls = settings_type(benchmark)
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(cls)}
    settings = cls(**{key: value for key, value in given.items() if value is not None})
    run_benchmark(benchmark, settings, argv=[benchmark, *argv])
    return 0
