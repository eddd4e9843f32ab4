"""Appended records survive every kind of ending, and torn records are dropped."""

from __future__ import annotations

import json

import pytest

from simpo.errors import SimpoError
from simpo.runs.files import JsonLines, read_lines

RECORDS = [
    {"step": 1, "loss": 0.5},
    {"step": 2, "text": "zwei, 二\n\u2028\ud83d"},
    {"nested": [{"a": None}], "b": True},
]


def write(path, records=RECORDS):
    lines = JsonLines(path)
    lines.append(records)
    return lines


def test_appended_records_are_read_back(tmp_path):
    lines = write(tmp_path / "new" / "metrics.jsonl")
    lines.append(iter(RECORDS[:1]))
    assert len(lines) == 4
    assert list(lines) == [*RECORDS, RECORDS[0]]
    again = JsonLines(lines.path)
    assert (len(again), list(again)) == (4, list(lines))


def test_each_record_is_one_line_of_plain_json(tmp_path):
    path = write(tmp_path / "x").path
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == RECORDS
    assert "二" in path.read_text(encoding="utf-8")


def test_non_finite_numbers_become_null(tmp_path):
    lines = write(tmp_path / "x", [{"loss": float("nan"), "deep": [{"a": (float("inf"), 1.0)}], "n": 3}])
    assert list(lines) == [{"loss": None, "deep": [{"a": [None, 1.0]}], "n": 3}]


def test_a_value_that_is_not_json_changes_nothing(tmp_path):
    lines = write(tmp_path / "x")
    with pytest.raises(TypeError):
        lines.append([{"ok": 1}, {"bad": object()}])
    assert list(lines) == list(JsonLines(tmp_path / "x")) == RECORDS


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path, caplog):
    path = write(tmp_path / "x").path
    whole = path.read_bytes()
    start = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        caplog.clear()
        lines = JsonLines(path)
        assert (len(lines), "dropped 1 damaged line" in caplog.text) == (2, end > start)
        lines.append(RECORDS[2:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\x00" * 100, b"\xff\xfe\n", b"[1]\n", b'{"a": 1}', b"\n", b'{"a": \n'])
def test_a_last_line_that_is_not_a_record_is_dropped(tmp_path, tail, caplog):
    path = write(tmp_path / "x").path
    with path.open("ab") as file:
        file.write(tail)
    assert list(JsonLines(path)) == RECORDS
    assert caplog.text.count("dropped 1 damaged line") == 1
    assert list(JsonLines(path)) == RECORDS
    assert caplog.text.count("dropped 1 damaged line") == 1


@pytest.mark.parametrize("line", [b'{"a": \n', b"\n", b"3\n", b"\x00\n"])
def test_a_damaged_line_in_the_middle_is_dropped_or_reported(tmp_path, line, caplog):
    path = write(tmp_path / "x").path
    parts = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(parts[0] + line + parts[2])
    damaged = path.read_bytes()
    with pytest.raises(SimpoError) as caught:
        read_lines(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert path.read_bytes() == damaged
    assert list(JsonLines(path)) == [RECORDS[0], RECORDS[2]] == list(JsonLines(path))
    assert caplog.text.count("dropped 1 damaged") == 1


def test_keep_drops_later_records(tmp_path):
    lines = write(tmp_path / "x")
    lines.keep(3)
    assert list(lines) == RECORDS
    lines.keep(1)
    assert list(lines) == list(JsonLines(tmp_path / "x")) == RECORDS[:1]
    lines.append(RECORDS[1:])
    assert list(lines) == RECORDS
    lines.keep(0)
    assert (len(lines), lines.path.read_bytes()) == (0, b"")
    with pytest.raises(ValueError, match="cannot keep 1 of 0"):
        lines.keep(1)


APPENDING = """
import sys
from simpo.runs.files import JsonLines, read_lines
lines = JsonLines(sys.argv[1])
print(len(lines), flush=True)
while True:
    lines.append([{"i": len(lines) + j, "text": "x" * 2000} for j in range(50)])
"""


def test_a_kill_loses_no_complete_record(tmp_path, start, kill_after):
    path = tmp_path / "x"
    before = 0
    for attempt in range(4):
        process = start(APPENDING, path)
        assert int(process.first_line) == before
        kill_after(process, 0.05 + 0.013 * attempt)
        lines = JsonLines(path)
        assert [record["i"] for record in lines] == list(range(len(lines)))
        assert len(lines) > before
        before = len(lines)


def test_a_full_disk_leaves_the_earlier_records(small_disk):
    lines = JsonLines(small_disk / "x")
    record = {"text": "x" * 10_000}
    with pytest.raises(SimpoError, match="x: no space left on the disk"):
        while True:
            lines.append([record] * 3)
    assert len(lines) > 3
    assert list(lines) == [record] * len(lines)
    assert len(JsonLines(lines.path)) == len(lines)
    lines.keep(1)
    lines.append([record])  # there is space again
    assert list(lines) == [record] * 2


@pytest.mark.parametrize("place", [0, 5, 30, 60, -2])
def test_a_checksummed_file_drops_the_line_with_a_changed_byte(tmp_path, caplog, place):
    records = [{"chunk": number, "logp": -1.25 * number, "text": "é"} for number in range(3)]
    file = JsonLines(tmp_path / "parts.jsonl", checked=True)
    file.append(records)
    assert list(JsonLines(file.path, checked=True)) == records
    contents = bytearray(file.path.read_bytes())
    start = contents.index(b"\n") + 1
    line_end = contents.index(b"\n", start)
    contents[(start if place >= 0 else line_end) + place] ^= 1
    file.path.write_bytes(contents)
    again = JsonLines(file.path, checked=True)
    assert list(again) == [records[0], records[2]] and "dropped 1 damaged" in caplog.text
    again.append([records[1]])
    assert list(JsonLines(file.path, checked=True)) == [records[0], records[2], records[1]]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", f"-1{'9' * 400}.0"])
def test_non_finite_numbers_are_rejected(tmp_path, number):
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"logps": [-1.5]}}\n{{"logps": [{number}]}}\n')
    with pytest.raises(SimpoError, match=rf"answers\.jsonl:2: {number[:20]} is not a finite number"):
        read_lines(path)
