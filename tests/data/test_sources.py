from __future__ import annotations

import gzip
import json
import os
import time

import datasets
import numpy as np
import pandas as pd
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from simpo.data.rows import as_dataset, rows_of
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
def test_json_lines_with_differing_types_are_read(tmp_path, name):
    path = write_lines(tmp_path / name)
    assert load(path) == [(ROWS[0], f"{name}:1"), (ROWS[1], f"{name}:2")]


def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS[0]).encode() + b"\n\n{}\n")
    assert load(tmp_path / "a.jsonl") == [(ROWS[0], "a.jsonl:2"), ({}, "a.jsonl:4")]


def test_a_json_list_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert load(tmp_path / "a.json") == [(ROWS[0], "a.json[0]"), (ROWS[1], "a.json[1]")]


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_columnar_files_are_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "arrow":
        Dataset.from_list(FLAT).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        getattr(Dataset.from_list(FLAT), f"to_{kind}")(path)
    assert load(path) == [(FLAT[0], f"a.{kind} row 0"), (FLAT[1], f"a.{kind} row 1")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_changed_file_never_gives_old_rows(tmp_path, kind):
    """Not even if its size and modification time are unchanged."""
    path = tmp_path / f"a.{kind}"

    def write(rows):
        Dataset.from_list(rows).to_parquet(path) if kind == "parquet" else write_lines(path, rows)
        os.utime(path, (1, 1))

    write(FLAT)
    before, fingerprint = load(path), load_rows(str(path), split="train")._fingerprint
    write([{**FLAT[0], "chosen": "x"}, FLAT[1]])
    assert before[0][0]["chosen"] == "a" and load(path)[0][0]["chosen"] == "x"
    assert load_rows(str(path), split="train")._fingerprint != fingerprint


def test_an_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl")
    first = load(path)
    monkeypatch.setattr("simpo.data.sources._open_text", None)
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
def test_files_in_folders_are_found_by_split(tmp_path, names, split, expected):
    for name in names:
        write_lines(tmp_path / "d" / name, FLAT[:1])
    assert [where for _, where in load(tmp_path / "d", split)] == expected


def test_a_folder_can_mix_file_types(tmp_path):
    write_lines(tmp_path / "train.jsonl", FLAT[:1])
    Dataset.from_list(FLAT[1:]).to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path) == [(FLAT[0], "train.jsonl:1"), (FLAT[1], "train.parquet row 0")]


def test_folders_written_by_save_to_disk(tmp_path):
    dataset = Dataset.from_list(FLAT)
    dataset.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one") == [(FLAT[0], "one row 0"), (FLAT[1], "one row 1")]
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "two", "test") == [(FLAT[1], "two[test] row 0")]
    dataset.save_to_disk(tmp_path / "three" / "test")
    assert load(tmp_path / "three", "test") == [(FLAT[0], "test row 0"), (FLAT[1], "test row 1")]
    with pytest.raises(SimpoError, match="two: no split 'dev'; it has train, test"):
        load(tmp_path / "two", "dev")


BOMB = b'{"prompt": "' + b"a" * (1 << 27) + b'"}\n'
BROKEN = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON: .*one object per line"),
    ("a.jsonl", b'{"a": 1}\n3\n', r"a\.jsonl:2: not a JSON object"),
    ("a.jsonl", b"\xff\xfe{}", r"a\.jsonl: cannot be read: .*utf-8"),
    ("a.jsonl", b"\n", r"a\.jsonl: no rows"),
    ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read: "),
    ("a.jsonl.zst", b"plain text, not packed", r"a\.jsonl\.zst: cannot be read: "),
    ("a.jsonl.gz", gzip.compress(BOMB), r"a\.jsonl\.gz: .*300 times as large"),
    ("a.json.gz", gzip.compress(b"[" + BOMB + b"]"), r"a\.json\.gz: .*300 times as large"),
    ("a.jsonl.zst", zstandard.compress(BOMB), r"a\.jsonl\.zst: .*300 times as large"),
    ("a.jsonl", BOMB, r"a\.jsonl:1: .*134,217,728 characters"),
    ("a.json", b'[{"a": 1},\n}', r"a\.json:2: not JSON: "),
    ("a.json", b"[1]", r"a\.json\[0\]: not a JSON object"),
    ("a.parquet", b"plain", r"a\.parquet: not a readable parquet file: "),
    ("a.arrow", b"plain", r"a\.arrow: not a readable arrow file: "),
    ("a.csv", b"", r"a\.csv: not a readable csv file: "),
    ("a.xlsx", b"", r"a\.xlsx: unsupported file type; supported are "),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_give_a_one_line_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SimpoError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_unicode_is_rejected(tmp_path):
    write_lines(tmp_path / "folder" / "train-\udcff.jsonl")
    for name in (tmp_path / "folder", tmp_path / "folder" / "train-\udcff.jsonl"):
        with pytest.raises(SimpoError, match="not UTF-8; rename the file"):
            load(name)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing", "a/b/c", "data/train.json.gz"])
def test_missing_files_are_reported(name):
    with pytest.raises(SimpoError, match=f"^{name}: file not found"):
        load(name)


def test_folders_without_the_split_are_reported(tmp_path):
    write_lines(tmp_path / "some" / "train.jsonl")
    with pytest.raises(SimpoError, match=r"some: no file for split 'test' in this folder; it has train\.jsonl"):
        load(tmp_path / "some", "test")
    (tmp_path / "none").mkdir()
    with pytest.raises(SimpoError, match="none: no data files in this folder"):
        load(tmp_path / "none")


def test_hub_errors_are_reworded(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SimpoError, match=r"^org/SimPO-v0\.2: neither a local file .* nor a hub dataset") as caught:
        load("org/SimPO-v0.2")
    assert "\n" not in str(caught.value)


def test_hub_rows_name_their_split(monkeypatch):
    monkeypatch.setattr("simpo.data.sources.load_dataset", lambda name, config, split: Dataset.from_list(FLAT))
    assert [where for _, where in load("org/name", "train_prefs")][1] == "org/name[train_prefs] row 1"


def test_the_home_of_an_unknown_user_is_a_missing_file():
    with pytest.raises(SimpoError, match="file not found"):
        load_rows("~nobody-of-this-name/rows.jsonl", split="train")


# ---- paths, splits and damaged files ----


def prompts(path, split="train", **options):
    rows = load_rows(str(path), split=split, **options)
    return [row["prompt"] for row, _ in rows_of(rows[:], range(len(rows)), "")]


def write_kind(path, text):
    row = {"prompt": text, "chosen": "a", "rejected": "b"}
    if path.suffix == ".arrow":
        Dataset.from_list([row]).save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif path.suffix in (".jsonl", ".json"):
        write_lines(path, [row])
    else:
        getattr(Dataset.from_list([row]), f"to_{path.suffix[1:]}")(path)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "jsonl"])
@pytest.mark.parametrize(
    ("name", "other"), [("data[1]", "data1"), ("y*", "yz"), ("a?", "ab"), ("{a,b}", "a"), ("**", "c")]
)
def test_a_path_is_not_a_pattern(kind, name, other, tmp_path):
    write_kind(tmp_path / f"{name}.{kind}", "RIGHT")
    write_kind(tmp_path / f"{other}.{kind}", "WRONG")
    assert prompts(tmp_path / f"{name}.{kind}") == ["RIGHT"]
    folder = tmp_path / f"[{name}]"
    folder.mkdir()
    write_kind(folder / f"{name}.{kind}", "IN")
    assert prompts(folder) == prompts(folder / f"{name}.{kind}") == ["IN"]


@pytest.mark.parametrize("name", ["y*.csv", "a?.parquet", "x[12].jsonl"])
def test_a_pattern_is_not_a_path(name, tmp_path):
    for suffix in ("csv", "parquet", "jsonl"):
        write_kind(tmp_path / f"y1.{suffix}", "WRONG")
    with pytest.raises(SimpoError, match="file not found; a path is taken literally"):
        prompts(tmp_path / name)


SLICES = ["train[:3]", "train[7:]", "train[-2:]", "train[:25%]", "train[25%:]", "train[2:5]", "train[:2]+train[8:]"]


@pytest.mark.parametrize("split", [*SLICES, "train[:50%]+train[9:]"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "saved", "folder"])
def test_slices_of_local_files_match_datasets(kind, split, tmp_path):
    rows = Dataset.from_list([{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(10)])
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_csv(tmp_path / "a.csv")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    rows.to_json(tmp_path / "folder" / "train.jsonl")
    expected = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split=split)["prompt"][:]
    path = tmp_path / (kind if kind in ("saved", "folder") else f"a.{kind}")
    assert prompts(path, split) == [str(n) for n in expected]


def test_slices_of_several_splits_of_a_folder(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}"} for n in range(3)])
    assert prompts(tmp_path, "train[:1]+test[2:]") == ["train0", "test2"]
    with pytest.raises(SimpoError, match=r"no file for split 'dev'.* it has test\.jsonl, train\.jsonl"):
        prompts(tmp_path, "dev[:1]")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "no split 'test'; a single file has only the split 'train'"),
        ("validation[:1]", "no split 'validation'"),
        ("train[", r"split 'train\[': "),
        ("train[3]", r"split 'train\[3\]': "),
        ("train[a:b]", r"split 'train\[a:b\]': "),
        ("train[5:]", r"split 'train\[5:\]' has no rows \(there are 2 in train\)"),
        ("train[2:1]", "has no rows"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_missing_splits_are_reported(split, message, saved, tmp_path):
    """A file is never used as a whole in place of a split it does not have."""
    path = write_lines(tmp_path / "rows.jsonl", FLAT)
    if saved:
        path = tmp_path / "saved"
        Dataset.from_list(FLAT).save_to_disk(path)
    with pytest.raises(SimpoError, match=message):
        load(path, split)
    assert len(load(path, "train")) == 2 == len(load_rows(str(path), split="test", any_split=True))


def test_a_file_is_the_split_its_name_says(tmp_path):
    assert len(load(write_lines(tmp_path / "hh_test.jsonl", FLAT), "test")) == 2


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("level", [1, 19])
def test_a_truncated_zst_file_is_rejected(kept, level, tmp_path):
    lines = "".join(json.dumps({"prompt": f"{n:0100}"}) + "\n" for n in range(500)).encode()
    packed = zstandard.compress(lines, level)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed + packed)  # two frames; both are read
    assert len(load_rows(str(path), split="train")) == 1000
    for start in (b"", packed):
        path.write_bytes(start + packed[: int(len(packed) * kept)])
        with pytest.raises(SimpoError, match=r"a\.jsonl\.zst: cannot be read: the file ends within compressed data"):
            load(path)


def test_an_arrow_stream_truncated_between_batches_is_rejected(tmp_path):
    rows = Dataset.from_list([{"prompt": f"{n}"} for n in range(3000)])
    rows.save_to_disk(tmp_path / "saved")
    whole = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    for end in (len(whole) - 8, len(whole) - 9, len(whole) // 2):
        (tmp_path / "a.arrow").write_bytes(whole[:end])
        with pytest.raises(SimpoError, match=r"a\.arrow: not a readable arrow file: "):
            load(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["_where", "_row"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_columns_with_internal_names(name, kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    row = {**FLAT[0], name: "x"}
    write_lines(path, [row]) if kind == "jsonl" else getattr(Dataset.from_list([row]), f"to_{kind}")(path)
    if kind != "parquet":
        assert load(path)[0][0] == row
        return
    with pytest.raises(SimpoError, match=f"a.parquet: the column name '{name}' is reserved"):
        load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 5000 + "1" + "}" * 5000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_cannot_read_is_rejected(text, name, tmp_path):
    (tmp_path / name).write_text(text if text.startswith("{") else '{"a": 1}\n' + text)
    with pytest.raises(SimpoError, match=rf"{name}:\d: "):
        load(tmp_path / name)


def test_a_name_that_is_too_long_is_rejected():
    with pytest.raises(SimpoError, match="cannot be looked up: File name too long"):
        load("x" * 300)


# ---- rows passed in Python ----


def test_rows_can_be_passed_in_python():
    """Every column of every row is kept, even if the first row lacks it or it has a different type."""
    rows = [{"a": 1, "tools": [{"x": None}]}, {"a": "one", "system": "s", "scores": np.array([1.0, 2.0])}]
    found = as_dataset(rows, "train_dataset")
    expected = [rows[0], rows[1] | {"scores": [1.0, 2.0]}]
    assert rows_of(found[:], range(2), "") == list(zip(expected, ["train_dataset[0]", "train_dataset[1]"], strict=True))
    whole = Dataset.from_list(FLAT)
    assert as_dataset(whole, "train_dataset") is whole
    tokenized = [{"prompt_ids": [1], "response_ids": [[2], [3]]}]
    assert as_dataset(tokenized, "train_dataset")[:] == Dataset.from_list(tokenized)[:]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DatasetDict(train=Dataset.from_list(FLAT)), "train_dataset: a DatasetDict with the splits 'train'; pass one"),
        (Dataset.from_list(FLAT).to_iterable_dataset(), "train_dataset: a streaming dataset; load "),
        ({"prompt": ["p"]}, "train_dataset: a dict; pass a datasets.Dataset"),
        ("train.jsonl", "train_dataset: a str; pass a datasets.Dataset"),
        ([1, 2], "train_dataset: a list; pass a datasets.Dataset"),
        (pd.DataFrame(FLAT), "train_dataset: a DataFrame; pass a datasets.Dataset"),
    ],
)
def test_values_that_are_not_data_sets_are_rejected(rows, message):
    with pytest.raises(SimpoError, match=message):
        as_dataset(rows, "train_dataset")


def test_hidden_files_are_ignored(tmp_path):
    write_lines(tmp_path / "train.jsonl", FLAT)
    write_lines(tmp_path / "._train.jsonl", FLAT)
    assert len(load(tmp_path)) == len(FLAT)


def test_a_clone_of_a_hub_repository_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 2), ("test", 1)):
        pd.DataFrame(FLAT[:1] * count).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert (len(load(tmp_path)), len(load(tmp_path, "test"))) == (2, 1)
    with pytest.raises(SimpoError, match="data: no file for split 'dev' in this folder"):
        load(tmp_path, "dev")


def test_the_error_lists_a_folders_subfolders(tmp_path):
    (tmp_path / "train").mkdir()
    write_lines(tmp_path / "train" / "a.jsonl", FLAT)
    with pytest.raises(SimpoError, match="no data files in this folder for split 'dev'; it has the folders train"):
        load(tmp_path, "dev")


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    pd.DataFrame({"prompt": pd.Series([], dtype=str)}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SimpoError, match=r"a\.parquet: no rows"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "pattern"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
def test_duplicate_keys_in_an_object_are_rejected(name, pattern, tmp_path):
    (tmp_path / name).write_text(pattern.replace("{}", '{"chosen": "a", "chosen": "b"}'))
    with pytest.raises(SimpoError, match=r"a\.jsonl?.*: an object has the key 'chosen' twice"):
        load(tmp_path / name)


def test_many_names_are_compared_in_linear_time(tmp_path):
    """30,000 columns in CSV, and 60,000 keys of which the last two are the same in JSON."""
    names = [f"c{n}" for n in range(60_000)]
    (tmp_path / "a.csv").write_text(",".join(names[:30_000]) + "\n" + ",".join("1" * 30_000) + "\n")
    pairs = ", ".join(f'"{name}": 1' for name in [*names, names[-1]])
    (tmp_path / "a.jsonl").write_text("{" + pairs + "}\n")
    start = time.process_time()
    assert len(load(tmp_path / "a.csv")[0][0]) == 30_000
    with pytest.raises(SimpoError, match="has the key 'c59999' twice"):
        load(tmp_path / "a.jsonl")
    assert time.process_time() - start < 5  # comparing each with all others takes far over 10 s


def test_what_is_neither_a_file_nor_a_folder_is_rejected(tmp_path):
    """Reading a pipe or a device would never end."""
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "train.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "train.jsonl", tmp_path / "zero", "/dev/zero"):
        with pytest.raises(SimpoError, match="neither a regular file nor a folder"):
            load(path)
