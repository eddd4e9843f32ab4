"""Options that the benchmarks share, and how their results are shown."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from simpo.cli._rendering import add_rendering_options, rendering
from simpo.cli._server import client_of, prices_of
from simpo.config.arguments import ArgumentParser
from simpo.errors import SimpoError
from simpo.evaluation.answers import Answerer, ApiJudge, is_outputs_file, published_table, write_markdown
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.runs.results import print_results, print_whole

_SAMPLING_KEYS = ("temperature", "top_p", "max_new_tokens", "seed", "chunk_size")


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


def answerer(model: str, arguments: argparse.Namespace, defaults: SamplingSettings) -> Answerer:
    """A model that answers as the options say."""
    given = {key: getattr(arguments, key) for key in _SAMPLING_KEYS if getattr(arguments, key) is not None}
    return Answerer(
        ModelArguments(
            model,
            model_revision=arguments.model_revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        ),
        dataclasses.replace(defaults, **given),
        arguments.chat_template,
        arguments.engine,
        rendering(arguments),
    )


def answers(arguments: argparse.Namespace, defaults: SamplingSettings) -> Answerer | Path:
    """The model or the file of answers that was given.

    Raises:
        SimpoError: there is no such file.
    """
    if not is_outputs_file(arguments.model):
        return answerer(arguments.model, arguments, defaults)
    path = Path(arguments.model).expanduser()
    if not path.is_file():
        raise SimpoError(f"{path}: there is no such file of answers")
    return path


def api_judge(arguments: argparse.Namespace) -> ApiJudge:
    """The judge that was named.

    Raises:
        SimpoError: none was, or it cannot be used.
    """
    client = client_of(arguments)
    if client is None:
        raise SimpoError("this benchmark needs a judge: name it with --judge_url and --judge_model")
    client.endpoint.api_key()  # that it is missing is said before answers are sampled
    longest = arguments.judge_max_tokens
    if longest is not None and longest < 1:
        raise SimpoError(f"judge_max_tokens: must be at least 1, not {longest}")
    return ApiJudge(client, prices_of(arguments), arguments.yes, arguments.strip_thinking, longest)


def existing(path: str | None, option: str) -> Path | None:
    """A file that an option names.

    Raises:
        SimpoError: there is no such file.
    """
    if path is None:
        return None
    found = Path(path).expanduser()
    if not found.is_file():
        raise SimpoError(f"{option}: {path}: there is no such file")
    return found


def show(results: Path, benchmark: str, arguments: argparse.Namespace) -> None:
    """Print the figures and the published ones, and export them if that was asked for."""
    print_results(results)
    table = published_table(benchmark)
    if table is not None:
        print_whole(Console(), table)
    if arguments.markdown is not None:
        path = Path(arguments.markdown).expanduser()
        write_markdown(results, benchmark, arguments.model or "existing annotations", path)
        print(f"markdown: {path}")
    print(f"results:  {results}")
