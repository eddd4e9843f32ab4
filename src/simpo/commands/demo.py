"""A first short SimPO run on built-in pairs and a tiny model; needs no download."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from simpo.arguments import ArgumentParser
from simpo.commands import train
from simpo.errors import SimpoError
from simpo.world.model import write_model
from simpo.world.pairs import make_pairs, write_rows

_TRAIN_PAIRS, _HELD_OUT_PAIRS = 768, 256


def main(argv: list[str]) -> int:
    """Make model and pairs, then do what ``simpo train`` does."""
    parser = ArgumentParser("demo", __doc__)
    parser.add_argument("--output_dir", help="folder of the demo (default: the first free one of runs/demo-N)")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, pairs and their order (default 0)")
    arguments = parser.parse_args(argv)
    folder = _free_folder() if arguments.output_dir is None else Path(arguments.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise SimpoError(f"output_dir: {folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    rows, held_out = make_pairs(_TRAIN_PAIRS, _HELD_OUT_PAIRS, seed)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", held_out)
    write_model(folder / "start", (text for row in rows for text in row.values()), seed)
    print(f"A tiny random model and {_TRAIN_PAIRS} built-in pairs are in {folder}; the run is:")
    recipe = {
        "model_name_or_path": folder / "start",
        "dataset_name": folder / "train.jsonl",
        "eval_dataset_name": folder / "test.jsonl",
        "output_dir": folder / "simpo",
        "beta": 2.0,
        "gamma_beta_ratio": 0.5,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "max_length": 256,
        "save_strategy": "no",
        "seed": seed,
    }
    options = [f"--{key}={value}" for key, value in recipe.items()]
    print("simpo train " + " ".join(options))
    return train.main(options)


def _free_folder() -> Path:
    return next(path for number in count(1) if not (path := Path(f"runs/demo-{number}")).exists())
