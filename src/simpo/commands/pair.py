"""Make preference pairs of scored responses: simpo pair ANNOTATED --output_dir DIR"""

from __future__ import annotations

import shlex
from pathlib import Path

from simpo.arguments import ArgumentParser
from simpo.results import print_results
from simpo.sampling.pairing import FILE_NAME, pair_annotated
from simpo.sampling.pairs import KINDS, PairSettings


def main(argv: list[str]) -> int:
    """Pair, print the table of results and what to do next."""
    arguments = _parser().parse_args(argv)
    folder = Path(arguments.output_dir).expanduser()
    settings = PairSettings(arguments.pairs, arguments.min_gap, arguments.max_length_ratio, arguments.seed)
    print_results(pair_annotated(Path(arguments.annotated).expanduser(), settings, folder, argv=argv))
    following = "reward" if arguments.pairs == "ranking" else "train"
    print(f"pairs: {folder / FILE_NAME}")
    print(f"next:  simpo {following} --dataset_name {shlex.quote(str(folder / FILE_NAME))} ...")
    return 0


def _parser() -> ArgumentParser:
    default = PairSettings()
    parser = ArgumentParser("pair", __doc__)
    parser.add_argument("annotated", metavar="ANNOTATED", help="annotated.jsonl of simpo annotate, or its folder")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--pairs", choices=KINDS, default=default.pairs, help=f"which answers are compared (default {default.pairs})"
    )
    parser.add_argument(
        "--min_gap", type=float, default=default.min_gap, metavar="X", help="least difference of scores (default: any)"
    )
    parser.add_argument(
        "--max_length_ratio", type=float, metavar="X", help="most characters of the longer answer over the shorter's"
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of best_random (default 42)")
    return parser
