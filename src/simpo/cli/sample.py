"""Sample answers to prompts from a model: simpo sample MODEL PROMPTS --n K --output_dir DIR"""

from __future__ import annotations

import dataclasses
import json
import shlex
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from simpo.cli._processes import refuse_several
from simpo.cli._rendering import add_rendering_options, rendering
from simpo.client import Endpoint
from simpo.config.arguments import ArgumentParser, mapping
from simpo.errors import SimpoError
from simpo.generation.sample import FILE_NAME, PromptArguments, sample_responses
from simpo.generation.server import sample_from_server
from simpo.generation.settings import SamplingSettings
from simpo.judging.presentation import as_text
from simpo.models.settings import ModelArguments
from simpo.runs.results import print_results
from simpo.runs.terminal import printable

_FLOATS = ("temperature", "top_p")
_SHOWN, _LONGEST = 3, 600  # answers at the end, and characters of each
_OF_VLLM = {"max_model_len": int, "gpu_memory_utilization": float, "tensor_parallel_size": int}
# Options that some engines would ignore, with those that use them.
_USED_BY = {
    **dict.fromkeys(("base_url", "api_key_env", "concurrency", "timeout"), ("server",)),
    **dict.fromkeys(("dtype", "model_revision", "chunk_size", "trust_remote_code"), ("transformers", "vllm")),
    **dict.fromkeys(("engine_args", *_OF_VLLM), ("vllm",)),
}


def main(argv: list[str]) -> int:
    """Sample, print the table of results and what to do next."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_used(arguments, parser)
    keys = [field.name for field in dataclasses.fields(SamplingSettings)]
    given = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    folder = Path(arguments.output_dir).expanduser()
    asked = PromptArguments(
        arguments.prompts, arguments.split, arguments.chat_template, arguments.column_mapping, rendering(arguments)
    )
    settings = SamplingSettings(**given)
    if arguments.engine == "server":
        refuse_several("sample --engine server", "start it without torchrun")
        endpoint = _endpoint(arguments)
        results: Path | None = sample_from_server(endpoint, asked, settings, folder, yes=arguments.yes, argv=argv)
    else:
        model = ModelArguments(
            arguments.model,
            model_revision=arguments.model_revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
        results = sample_responses(
            model, asked, settings, folder, engine=arguments.engine, engine_args=_engine_args(arguments), argv=argv
        )
    if results is None:  # one of several processes; the main one prints
        return 0
    print_results(results)
    _show(folder / FILE_NAME)
    print(f"responses: {folder / FILE_NAME}")
    print(
        f"next:      python -m json.tool --json-lines --no-ensure-ascii {shlex.quote(str(folder / FILE_NAME))} | less"
    )
    return 0


def _show(path: Path) -> None:
    """The first prompts of the file, each with its first answer."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, _SHOWN)]
    for record in records:
        for title, text in (("prompt", as_text(record["prompt"])), ("answer", record["responses"][0])):
            cut = f" [... {len(text) - _LONGEST:,} more characters]" if len(text) > _LONGEST else ""
            print(f"--- {title} {record['id']}\n{printable(text[:_LONGEST].strip())}{cut}")
    print()


def _check_used(arguments: Namespace, parser: ArgumentParser) -> None:
    """Raise :class:`SimpoError` for an option that says nothing to the chosen engine."""
    for key, engines in _USED_BY.items():
        if arguments.engine not in engines and getattr(arguments, key) != parser.get_default(key):
            raise SimpoError(f"--{key}: engine {arguments.engine} does not use it; leave it out")


def _engine_args(arguments: Namespace) -> dict[str, Any]:
    """vLLM's arguments: a JSON object, ``KEY=VALUE`` with values as in YAML, or the options of their own.

    Raises:
        SimpoError: something else, or one that was given twice.
    """
    found: dict[str, Any] = {}
    own = {key: getattr(arguments, key) for key in _OF_VLLM if getattr(arguments, key) is not None}
    for text in arguments.engine_args or ():
        key, equals, value = text.partition("=")
        try:
            given = yaml.safe_load(text) if text.startswith("{") else {key: yaml.safe_load(value)}
        except yaml.YAMLError:
            given = None
        if not isinstance(given, dict) or not (equals or text.startswith("{")):
            raise SimpoError(f"--engine_args: {text!r}: expected KEY=VALUE or a JSON object")
        if twice := (found | own).keys() & given.keys():
            raise SimpoError(f"--engine_args: {min(twice)} is given twice")
        found |= given
    return found | own


def _endpoint(arguments: Namespace) -> Endpoint:
    if arguments.base_url is None:
        raise SimpoError("engine server: name the server with --base_url")
    return Endpoint(
        arguments.base_url, arguments.model, arguments.api_key_env, arguments.concurrency, arguments.timeout
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser("sample", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of the model, or its name on the server")
    parser.add_argument("prompts", metavar="PROMPTS", help="file, folder or hub id of rows with prompts")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run; the same one continues")
    parser.add_argument("--split", default="train", help="split of PROMPTS (default train)")
    parser.add_argument("--column_mapping", type=mapping, metavar="JSON", help='columns to rename, {"old": "new"}')
    for field in dataclasses.fields(SamplingSettings):
        kind = float if field.name in _FLOATS else int
        default = "" if field.default is None else f" (default {field.default})"
        said = f"{field.metadata['help'].removesuffix('.')}{default}"
        parser.add_argument(f"--{field.name}", type=kind, metavar="X" if kind is float else "N", help=said)
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm", "server"),
        default="transformers",
        help="what generates (default: transformers)",
    )
    parser.add_argument(
        "--dtype", metavar="TYPE", help="type of the weights (default bfloat16 on an accelerator, float32 on a CPU)"
    )
    parser.add_argument("--chat_template", metavar="TEMPLATE", help="template, file with one, or none")
    add_rendering_options(parser)
    parser.add_argument("--model_revision", default="main", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_remote_code()
    for name, number in _OF_VLLM.items():
        parser.add_argument(f"--{name}", type=number, metavar="N" if number is int else "X", help="of engine vllm")
    parser.add_argument(
        "--engine_args",
        nargs="+",
        metavar="KEY=VALUE",
        help="other arguments of vLLM's engine, or a JSON object of them",
    )
    parser.add_argument("--base_url", metavar="URL", help="of the engine 'server', e.g. http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--api_key_env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with its key (default OPENAI_API_KEY); a server on this machine needs none",
    )
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests to it at a time (default 8)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a reply (default 600)")
    parser.add_argument("--yes", action="store_true", help="send the requests without asking")
    return parser
