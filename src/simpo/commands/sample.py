"""Sample answers to prompts from a model: simpo sample MODEL PROMPTS --n K --output_dir DIR"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from simpo.arguments import ArgumentParser
from simpo.results import print_results
from simpo.sampling.run import FILE_NAME, PromptArguments, sample_responses
from simpo.sampling.settings import SamplingSettings
from simpo.training.models import ModelArguments

_HELP = {
    "n": "answers to every prompt (default 1)",
    "temperature": "divides the logits; 0 takes the likeliest token every time (default 0.8)",
    "top_p": "draw from the smallest set of tokens with this probability; 1 is off (default 0.95)",
    "top_k": "draw from this many likeliest tokens; 0 is off (default 0)",
    "max_new_tokens": "longest answer in tokens (default 2048, or half the model's context if that is less)",
    "seed": "with prompts and settings, determines every answer (default 42)",
    "chunk_size": "answers generated and stored together (default 32 on a CPU, 64 on an accelerator, 1024 with vLLM)",
}
_FLOATS = ("temperature", "top_p")


def main(argv: list[str]) -> int:
    """Sample, print the table of results and what to do next."""
    arguments = _parser().parse_args(argv)
    given = {key: getattr(arguments, key) for key in _HELP if getattr(arguments, key) is not None}
    folder = Path(arguments.output_dir).expanduser()
    results = sample_responses(
        ModelArguments(arguments.model, model_revision=arguments.model_revision, dtype=arguments.dtype),
        PromptArguments(arguments.prompts, arguments.split, arguments.chat_template),
        SamplingSettings(**given),
        folder,
        engine=arguments.engine,
        argv=argv,
    )
    if results is None:  # one of several processes; the main one prints
        return 0
    print_results(results)
    print(f"responses: {folder / FILE_NAME}")
    print(
        f"next:      python -m json.tool --json-lines --no-ensure-ascii {shlex.quote(str(folder / FILE_NAME))} | less"
    )
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("sample", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of the model")
    parser.add_argument("prompts", metavar="PROMPTS", help="file, folder or hub id of rows with prompts")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run; the same one continues")
    parser.add_argument("--split", default="train", help="split of PROMPTS (default train)")
    for field in dataclasses.fields(SamplingSettings):
        kind = float if field.name in _FLOATS else int
        parser.add_argument(f"--{field.name}", type=kind, metavar="X" if kind is float else "N", help=_HELP[field.name])
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what generates (default: transformers)",
    )
    parser.add_argument(
        "--dtype", metavar="TYPE", help="type of the weights (default bfloat16 on an accelerator, float32 on a CPU)"
    )
    parser.add_argument("--chat_template", metavar="TEMPLATE", help="template, file with one, or none")
    parser.add_argument("--model_revision", default="main", metavar="REV", help="branch, tag or commit on the hub")
    return parser
