"""Merge an adapter into its base model: simpo merge ADAPTER --output_dir DIR"""

from __future__ import annotations

import shlex
from pathlib import Path

from simpo.cli._processes import refuse_several
from simpo.config.arguments import ArgumentParser
from simpo.models.merging import write_merged
from simpo.models.settings import ModelArguments


def main(argv: list[str]) -> int:
    """Merge, and print what to do next."""
    parser = ArgumentParser("merge", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="hub name or folder of the adapter")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="new folder of the merged model")
    parser.add_argument("--model_revision", default="main", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--save_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the saved weights (default: that of the base model's files)",
    )
    parser.add_remote_code()
    arguments = parser.parse_args(argv)
    refuse_several("merge", "start it without torchrun")
    folder = Path(arguments.output_dir).expanduser()
    model = ModelArguments(
        arguments.adapter,
        model_revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
        save_dtype=arguments.save_dtype,
    )
    write_merged(model, folder)
    print(f"saved: {folder}\nnext:  simpo chat {shlex.quote(str(folder))}")
    return 0
