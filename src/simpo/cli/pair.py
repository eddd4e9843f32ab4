"""Make preference pairs of scored responses: simpo pair ANNOTATED --output_dir DIR"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from simpo.cli._processes import refuse_several
from simpo.config.arguments import ArgumentParser
from simpo.runs.results import print_results
from simpo.workflows.pair import FILE_NAME, KINDS, PairSettings, pair_annotated


def main(argv: list[str]) -> int:
    """Pair, print the table of results and what to do next."""
    arguments = _parser().parse_args(argv)
    refuse_several("pair", "start it without torchrun")
    folder = Path(arguments.output_dir).expanduser()
    keys = [field.name for field in dataclasses.fields(PairSettings)]
    settings = PairSettings(**{key: getattr(arguments, key) for key in keys})
    print_results(pair_annotated(Path(arguments.annotated).expanduser(), settings, folder, argv=argv))
    following = "reward" if arguments.pairs == "ranking" else "train"
    print(f"pairs: {folder / FILE_NAME}")
    print(f"next:  simpo {following} --dataset_name {shlex.quote(str(folder / FILE_NAME))} ...")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pair", __doc__)
    parser.add_argument("annotated", metavar="ANNOTATED", help="annotated.jsonl of simpo annotate, or its folder")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run")
    for field in dataclasses.fields(PairSettings):
        said = field.metadata["help"].removesuffix(".")
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true", help=said)
            continue
        kind = {"pairs": str, "seed": int}.get(field.name, float)
        choices = KINDS if field.name == "pairs" else None
        said += "" if field.default is None else f" (default {field.default})"
        parser.add_argument(f"--{field.name}", type=kind, choices=choices, default=field.default, help=said)
    return parser
