from __future__ import annotations

import json

import pytest
from datasets import Dataset, concatenate_datasets

from simpo.data import tokenizing
from simpo.data.rows import rows_of
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_mixture, load_mixture_list
from simpo.data.tokenizing import prepare
from simpo.errors import SimpoError


def make(letter, count):
    return [{"prompt": f"{letter}{number}", "chosen": "c", "rejected": "r"} for number in range(count)]


@pytest.fixture
def folders(tmp_path):
    """Two datasets with a training and a test file each, one in JSON lines and one in parquet."""
    for letter, count in (("a", 10), ("b", 7)):
        (tmp_path / letter).mkdir()
        for split, rows in (("train", make(letter, count)), ("test", make(letter.upper(), count))):
            if letter == "a":
                (tmp_path / letter / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            else:
                Dataset.from_list(rows).to_parquet(tmp_path / letter / f"{split}.parquet")
    return str(tmp_path / "a"), str(tmp_path / "b")


def prompts(dataset):
    return [row["prompt"] for row, _ in rows_of(dataset[:], range(len(dataset)), "")]


def test_mixer_takes_the_first_rows_and_shuffles_like_the_handbook(folders):
    a, b = folders
    train, test = load_mixture({a: 0.55, b: 1.0}, ["train", "test"])
    parts = [Dataset.from_list(make("a", 10)).select(range(5)), Dataset.from_list(make("b", 7))]
    assert prompts(train) == concatenate_datasets(parts).shuffle(seed=42)["prompt"][:]
    whole = [Dataset.from_list(make("A", 10)), Dataset.from_list(make("B", 7))]
    assert prompts(test) == concatenate_datasets(whole).shuffle(seed=42)["prompt"][:]


def test_mixer_without_a_test_split(folders):
    train, test = load_mixture({folders[1]: 0.5}, ["train"])
    assert (sorted(prompts(train)), test) == (["b0", "b1", "b2"], None)


@pytest.mark.parametrize(
    ("fractions", "splits", "message"),
    [
        ((-0.1, 1), ["train"], "dataset_mixer: .*a: -0.1 is not a fraction between 0 and 1"),
        ((1.5, 1), ["train"], "dataset_mixer: .*a: 1.5 is not a fraction"),
        (("all", 1), ["train"], "dataset_mixer: .*a: 'all' is not a fraction"),
        ((1, 1), ["train", "dev"], "dataset_splits: 'dev' has neither 'train' nor 'test' in its name"),
        ((1, 1), ["test"], "dataset_splits: no split with 'train'"),
        ((0, 0), ["train"], "dataset_mixer: the fractions leave no training rows"),
    ],
)
def test_mixer_mistakes_are_reported(folders, fractions, splits, message):
    with pytest.raises(SimpoError, match=message):
        load_mixture(dict(zip(folders, fractions, strict=True)), splits)


def test_mixer_needs_one_configuration_per_dataset(folders):
    with pytest.raises(SimpoError, match="dataset_configs: 1 configurations for 2 datasets"):
        load_mixture(dict.fromkeys(folders, 1.0), ["train"], ["default"])
    with pytest.raises(SimpoError, match="dataset_mixer: not a mapping"):
        load_mixture({}, ["train"])


def test_one_file_cannot_be_used_for_training_and_evaluation(folders):
    name = f"{folders[0]}/train.jsonl"
    with pytest.raises(SimpoError, match=r"train\.jsonl is one file and cannot be both train and test"):
        load_mixture({name: 1.0}, ["train", "test"])
    assert len(load_mixture({name: 1.0}, ["train"])[0]) == 10


def test_mixture_list_matches_the_handbook(folders):
    a, b = folders
    mixture = {
        "datasets": [{"id": a, "weight": 0.5, "columns": ["prompt", "chosen"]}, {"id": b, "split": "test"}],
        "seed": 3,
        "test_split_size": 0.25,
    }
    train, test = load_mixture_list(mixture)
    parts = [
        Dataset.from_list(make("a", 10)).shuffle(seed=3).select(range(5)),
        Dataset.from_list(make("B", 7)).shuffle(seed=3),
    ]
    expected = concatenate_datasets([part.select_columns("prompt") for part in parts]).shuffle(seed=3)
    expected = expected.train_test_split(test_size=0.25, seed=3)
    assert (prompts(train), prompts(test)) == (expected["train"]["prompt"][:], expected["test"]["prompt"][:])
    columns = {row["prompt"][0]: set(row) for row, _ in rows_of(train[:], range(len(train)), "")}
    assert columns == {"a": {"prompt", "chosen"}, "B": {"prompt", "chosen", "rejected"}}


def test_a_mixture_list_has_no_held_out_rows_by_default(folders):
    train, test = load_mixture_list({"datasets": [{"id": folders[1], "columns": ["prompt"]}]})
    assert test is None and sorted(prompts(train)) == [row["prompt"] for row in make("b", 7)]
    assert set(train.column_names) == {"prompt", "_where"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "dataset_mixture: unknown key 'sed'; known are datasets, seed, test_split_size"),
        ({"datasets": []}, "dataset_mixture: 'datasets' is not a list"),
        ({"datasets": [{"name": "x"}]}, "dataset_mixture: .* is not a mapping with 'id'"),
        ({"datasets": [{"id": "x.json", "frac": 1}]}, "dataset_mixture: unknown key 'frac'"),
        ({"seed": "x"}, "dataset_mixture: seed 'x' is not a whole number"),
        ({"test_split_size": 99}, "dataset_mixture: test_split_size 99 is not valid for 10 rows"),
    ],
)
def test_mixture_list_mistakes_are_reported(folders, change, message):
    with pytest.raises(SimpoError, match=message):
        load_mixture_list({"datasets": [{"id": folders[0]}], **change})


@pytest.mark.parametrize("index", [0, 1])
def test_mixture_columns_must_exist(folders, index):
    with pytest.raises(SimpoError, match=r"dataset_mixture: .* has no column 'score'"):
        load_mixture_list({"datasets": [{"id": folders[index], "columns": ["prompt", "score"]}]})


def test_a_mixture_is_tokenized_once(folders, build_tokenizer, monkeypatch):
    """The cache is found although the mixture is rebuilt, from JSON rows and from columns."""
    tokenizer = build_tokenizer("chatml")
    first = prepare(load_mixture(dict.fromkeys(folders, 1.0), ["train"])[0], tokenizer, TokenizeSettings())
    monkeypatch.setattr(tokenizing.Tokenization, "__call__", None)
    second = prepare(load_mixture(dict.fromkeys(folders, 1.0), ["train"])[0], tokenizer, TokenizeSettings())
    assert second.dataset.to_list() == first.dataset.to_list()
    assert {row["where"].split(":")[0].split(" ")[0] for row in first.dataset} == {"train.jsonl", "train.parquet"}
