from __future__ import annotations

import gzip
import json
import os

import datasets
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from simpo.data.rows import rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError

ROWS = [
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": [{"role": "user", "content": "é"}], "chosen": "c", "rejected": "d", "score": 1},
]
FLAT = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]


def load(path, split="train"):
    dataset = load_rows(str(path), split=split)
    return rows_of(dataset[:], range(len(dataset)), "unused")


def write_lines(path, rows=ROWS):
    text = "\n".join(json.dumps(row) for row in rows).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packers.get(path.suffix, bytes)(text))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz"])
def test_json_lines_of_differing_types(tmp_path, name):
    path = write_lines(tmp_path / name)
    assert load(path) == [(ROWS[0], f"{name}:1"), (ROWS[1], f"{name}:2")]


def test_blank_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS[0]).encode() + b"\n\n{}\n")
    assert load(tmp_path / "a.jsonl") == [(ROWS[0], "a.jsonl:2"), ({}, "a.jsonl:4")]


def test_json_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert load(tmp_path / "a.json") == [(ROWS[0], "a.json[0]"), (ROWS[1], "a.json[1]")]


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_columnar_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "arrow":
        Dataset.from_list(FLAT).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        getattr(Dataset.from_list(FLAT), f"to_{kind}")(path)
    assert load(path) == [(FLAT[0], f"a.{kind} row 0"), (FLAT[1], f"a.{kind} row 1")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_changed_file_never_gives_old_rows(tmp_path, kind):
    """Not even if its size and time of change are the same."""
    path = tmp_path / f"a.{kind}"

    def write(rows):
        Dataset.from_list(rows).to_parquet(path) if kind == "parquet" else write_lines(path, rows)
        os.utime(path, (1, 1))

    write(FLAT)
    before, fingerprint = load(path), load_rows(str(path), split="train")._fingerprint
    write([{**FLAT[0], "chosen": "x"}, FLAT[1]])
    assert before[0][0]["chosen"] == "a" and load(path)[0][0]["chosen"] == "x"
    assert load_rows(str(path), split="train")._fingerprint != fingerprint


def test_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl")
    first = load(path)
    monkeypatch.setattr("simpo.data.files._open_text", None)
    assert load(path) == first


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl:1"]),
        (
            ["train-00000.jsonl", "train-00001.jsonl.gz"],
            "train",
            ["train-00000.jsonl:1", "train-00001.jsonl.gz:1"],
        ),
        (["hh_train.jsonl", "hh_test.jsonl"], "train", ["hh_train.jsonl:1"]),
        (["train/a.jsonl", "test/a.jsonl"], "test", ["a.jsonl:1"]),
        (["test/eval.jsonl", "train/a.jsonl"], "test", ["eval.jsonl:1"]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train_prefs", ["train_prefs.jsonl:1"]),
        (["part-0.jsonl", "part-1.jsonl"], "train", ["part-0.jsonl:1", "part-1.jsonl:1"]),
    ],
)
def test_folders(tmp_path, names, split, expected):
    for name in names:
        write_lines(tmp_path / "d" / name, FLAT[:1])
    assert [where for _, where in load(tmp_path / "d", split)] == expected


def test_folder_of_files_of_both_kinds(tmp_path):
    write_lines(tmp_path / "train.jsonl", FLAT[:1])
    Dataset.from_list(FLAT[1:]).to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path) == [(FLAT[0], "train.jsonl:1"), (FLAT[1], "train.parquet row 0")]


def test_saved_folders(tmp_path):
    dataset = Dataset.from_list(FLAT)
    dataset.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one") == [(FLAT[0], "one row 0"), (FLAT[1], "one row 1")]
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "two", "test") == [(FLAT[1], "two[test] row 0")]
    dataset.save_to_disk(tmp_path / "three" / "test")
    assert load(tmp_path / "three", "test") == [(FLAT[0], "test row 0"), (FLAT[1], "test row 1")]
    with pytest.raises(SimpoError, match="two: no split 'dev'; it has train, test"):
        load(tmp_path / "two", "dev")


BROKEN = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON: .*one object a line"),
    ("a.jsonl", b'{"a": 1}\n3\n', r"a\.jsonl:2: not a JSON object"),
    ("a.jsonl", b"\xff\xfe{}", r"a\.jsonl: cannot be read: .*utf-8"),
    ("a.jsonl", b"\n", r"a\.jsonl: no rows"),
    ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read: "),
    ("a.jsonl.zst", b"plain text, not packed", r"a\.jsonl\.zst: cannot be read: "),
    ("a.json", b'[{"a": 1},\n}', r"a\.json:2: not JSON: "),
    ("a.json", b"[1]", r"a\.json\[0\]: not a JSON object"),
    ("a.parquet", b"plain", r"a\.parquet: not a readable parquet file: "),
    ("a.arrow", b"plain", r"a\.arrow: not a readable arrow file: "),
    ("a.csv", b"", r"a\.csv: not a readable csv file: "),
    ("a.xlsx", b"", r"a\.xlsx: unknown kind of file; known are "),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_end_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimpoError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing", "a/b/c", "data/train.json.gz"])
def test_missing_files(name):
    with pytest.raises(SimpoError, match=f"^{name}: file not found"):
        load(name)


def test_folders_without_the_split(tmp_path):
    write_lines(tmp_path / "some" / "train.jsonl")
    with pytest.raises(SimpoError, match=r"some: no file of split 'test' in this folder; it has train\.jsonl"):
        load(tmp_path / "some", "test")
    (tmp_path / "none").mkdir()
    with pytest.raises(SimpoError, match="none: no data files in this folder"):
        load(tmp_path / "none")


def test_hub_errors_are_reworded(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SimpoError, match=r"^org/SimPO-v0\.2: neither a file .* nor a hub data set") as caught:
        load("org/SimPO-v0.2")
    assert "\n" not in str(caught.value)


def test_hub_rows_say_their_split(monkeypatch):
    monkeypatch.setattr("simpo.data.sources.load_dataset", lambda name, config, split: Dataset.from_list(FLAT))
    assert [where for _, where in load("org/name", "train_prefs")][1] == "org/name[train_prefs] row 1"


def test_a_home_that_nobody_has_is_a_missing_file():
    with pytest.raises(SimpoError, match="file not found"):
        load_rows("~nobody-of-this-name/rows.jsonl", split="train")
