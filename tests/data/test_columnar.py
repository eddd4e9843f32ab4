"""Parquet and arrow files: values that Python cannot represent, and a few bytes that hold gigabytes."""

from __future__ import annotations

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from simpo.data.rows import rows_of
from simpo.data.sources import load_rows
from simpo.errors import SimpoError


def load(path):
    dataset = load_rows(str(path), split="train")
    return rows_of(dataset[:], range(len(dataset)), "unused")


TIMES = [
    (pa.timestamp("s"), 10**12),
    (pa.timestamp("us", tz="Mars/Phobos"), 5),
    (pa.date32(), 2**30),
    (pa.date64(), 2**60),
    (pa.duration("s"), -(2**62)),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "number"), TIMES)
def test_times_that_python_cannot_represent_are_rejected(kind, number, nested, tmp_path):
    """Also in a column that nothing needs; a time within the limits is read as text."""
    integer = pa.int32() if kind == pa.date32() else pa.int64()
    near = kind if kind.id != pa.timestamp("us").id else pa.timestamp(kind.unit)
    for name, type_, values in (("good", near, [1, None, 0]), ("bad", kind, [1, None, number])):
        column = pa.array(values, integer).view(type_)
        if nested:
            column = pa.array([[{"t": one}] for one in column], pa.list_(pa.struct([("t", type_)])))
        pq.write_table(pa.table({"prompt": ["a", "b", "c"], "when": column}), tmp_path / f"{name}.parquet")
    with pytest.raises(SimpoError, match=r"bad\.parquet: the column 'when' has a date or time"):
        load(tmp_path / "bad.parquet")
    rows = [row["when"] for row, _ in load(tmp_path / "good.parquet")]
    expected = str(pa.array([1], integer).view(near)[0].as_py())
    assert (rows[0][0]["t"] if nested else rows[0]) == expected


def write_arrow(path, table):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


LONG = pa.array(["x" * 10_000]).take(pa.array([0] * 7_000))
EXPANDING = [
    ("a.arrow", pa.table({"prompt": LONG.dictionary_encode()})),
    ("a.parquet", pa.table({"prompt": LONG})),  # stored once
    ("a.parquet", pa.table({"prompt": pa.ListArray.from_arrays([0, 7_000], LONG)})),
    ("a.parquet", pa.table({"prompt": pa.nulls(2_000_000, pa.string())})),
    ("a.arrow", pa.table({"prompt": pa.nulls(2_000_000)})),
    ("a.arrow", pa.table({"prompt": pa.ListArray.from_arrays([0, 10**7], pa.nulls(10**7))})),
]


@pytest.mark.parametrize(("name", "table"), EXPANDING)
def test_columnar_files_that_expand_are_rejected(name, table, tmp_path):
    path = tmp_path / name
    pq.write_table(table, path) if path.suffix == ".parquet" else write_arrow(path, table)
    assert path.stat().st_size < 100_000
    with pytest.raises(SimpoError, match=rf"{name}: its rows are over 300 times as large"):
        load_rows(str(path), split="train")


def test_saved_folders_that_expand_are_rejected(tmp_path):
    Dataset(pa.table({"prompt": pa.nulls(2_000_000)})).save_to_disk(tmp_path / "saved")
    with pytest.raises(SimpoError, match="300 times as large"):
        load_rows(str(tmp_path / "saved"), split="train")


def test_repeated_text_is_read(tmp_path):
    """It is stored once, but takes no more than 64 MiB."""
    price = pa.array([Decimal("1.5")] * 6_000).dictionary_encode()
    table = pa.table({"prompt": LONG[:6_000].dictionary_encode(), "id": range(6_000), "price": price})
    pq.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table)
    for name in ("a.parquet", "a.arrow"):
        rows = load_rows(str(tmp_path / name), split="train")
        assert len(rows) == 6_000 and rows[5_999]["prompt"] == "x" * 10_000 and rows[0]["price"] == Decimal("1.5")
