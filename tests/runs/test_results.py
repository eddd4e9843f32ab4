from __future__ import annotations

import hashlib
import io
import json
import stat
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from simpo.errors import SimpoError
from simpo.runs.results import Metric, fingerprint, print_results, read_results, write_results
from simpo.statistics import proportion_interval

METRICS = [
    Metric("win_rate", stage="before", **asdict(proportion_interval(50, 200))),
    Metric("win_rate", stage="after", **asdict(proportion_interval(90, 200))),
    Metric("pairs", 4000),
]


def write(folder, metrics=METRICS):
    return write_results(folder, command="train", fingerprint="f00d", metrics=metrics)


def printed(path, width=100):
    stream = io.StringIO()
    print_results(path, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_file_has_the_fixed_schema(tmp_path):
    path = write(tmp_path, [Metric("accuracy", 0.5, "after", n=2, low=0.1, high=0.9, method="m"), Metric("x", 1)])
    assert path == tmp_path / "results.json"
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "command": "train",
        "fingerprint": "f00d",
        "metrics": [
            {
                "name": "accuracy",
                "stage": "after",
                "value": 0.5,
                "n": 2,
                "low": 0.1,
                "high": 0.9,
                "method": "m",
            },
            {"name": "x", "stage": None, "value": 1.0, "n": None, "low": None, "high": None, "method": None},
        ],
    }


def test_results_are_read_back_unchanged(tmp_path):
    read = read_results(write(tmp_path))
    assert (read.command, read.fingerprint, read.metrics) == ("train", "f00d", METRICS)


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    path = write(tmp_path, [Metric("a", np.float32(0.5), n=np.int64(3), low=np.float64(0.25))])
    assert read_results(path).metrics == [Metric("a", 0.5, n=3, low=0.25)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_non_finite_values_become_null(tmp_path, value):
    path = write(tmp_path, [Metric("loss", value, low=value, high=1.0)])
    assert read_results(path).metrics == [Metric("loss", None, low=None, high=1.0)]
    assert "NaN" not in path.read_text()


def test_writing_creates_the_folder_and_leaves_one_readable_file(tmp_path):
    path = write(tmp_path / "a" / "b")
    write(tmp_path / "a" / "b")
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    old = write(tmp_path).read_text()

    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [Metric("other", 1)])
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == old


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SimpoError, match=r"file/results\.json: cannot be written"):
        write(tmp_path / "file")


def test_duplicate_metrics_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"duplicate metric pairs \(value\)"):
        write(tmp_path, [Metric("pairs", 1), Metric("loss", 2, "after"), Metric("pairs", 3)])


@pytest.mark.parametrize("text", ['{\n"schema": 1,\n}', "[]", "{}", '{"schema": 2}', '{"schema": 1, "metrics": [3]}'])
def test_a_file_that_is_not_a_results_file_is_reported(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SimpoError) as caught:
        read_results(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(SimpoError, match=r"results\.json: .*No such file"):
        read_results(tmp_path / "results.json")


def test_stages_are_shown_side_by_side_with_intervals(tmp_path):
    lines = printed(write(tmp_path)).splitlines()
    heading = next(line for line in lines if "before" in line)
    assert heading.index("metric") < heading.index("before") < heading.index("after")
    row = next(line for line in lines if "win_rate" in line)
    assert row.index("0.25 [0.195, 0.314]") < row.index("0.45 [0.383, 0.519]")
    assert any("methods: Wilson 95%; n = 200" in line for line in lines)
    assert any("pairs" in line and "4000" in line for line in lines)


def test_without_stages_the_table_is_plain(tmp_path):
    text = printed(write(tmp_path, [Metric("[bold]odd[/bold] name", None), Metric("loss", 0.69314718)]))
    assert "before" not in text
    assert "after" not in text
    assert "[bold]odd[/bold] name" in text
    assert "0.6931" in text


def test_different_counts_are_both_shown(tmp_path):
    text = printed(write(tmp_path, [Metric("a", 1, "before", n=500), Metric("a", 2, "after", n=480)]))
    assert "500 / 480" in text


def test_the_fingerprint_hashes_canonical_json():
    expected = hashlib.sha256(b'[{"a":1,"b":[0.5,"x",null]},"seed"]').hexdigest()
    assert fingerprint({"b": (0.5, "x", None), "a": 1}, "seed") == expected


def test_the_fingerprint_tells_parts_apart():
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc"), fingerprint(["ab", "c"])}) == 4


def test_the_fingerprint_is_stable_across_processes():
    code = "from simpo.runs.results import fingerprint; print(fingerprint({'z': 1, 'a': {'y': 2, 'x': 'ü'}}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint({"a": {"x": "ü", "y": 2}, "z": 1})


@pytest.mark.parametrize("part", [object(), {1, 2}, float("nan")])
def test_the_fingerprint_rejects_values_without_a_canonical_form(part):
    with pytest.raises((TypeError, ValueError)):
        fingerprint(part)


def test_stages_can_have_custom_headings(tmp_path):
    metrics = [
        Metric("win_rate", 0.7, "after", 10),
        Metric("correct", 0.4, "before", 10),
        Metric("correct", 0.6, "after", 10),
    ]
    path = write_results(tmp_path, command="demo", fingerprint="0", metrics=metrics)
    console = Console(file=io.StringIO(), width=100)
    print_results(path, console, headings={"before": "SFT", "after": "SimPO"})
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["metric", "SFT", "SimPO"] in lines
    assert ["correct", "0.4", "0.6"] in lines
    assert ["win_rate", "0.7"] in lines


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_number_is_cropped(width, tmp_path):
    metrics = [
        Metric("eval_rewards/accuracies", -0.09551, stage, 10, -0.2751, -0.08123) for stage in ("before", "after")
    ]
    path = write_results(tmp_path, command="train", fingerprint="0", metrics=metrics)
    console = Console(file=io.StringIO(), width=width)
    print_results(path, console)
    assert console.file.getvalue().count("-0.09551 [-0.275, -0.0812]") == 2
    assert "eval_rewards/accuracies" in console.file.getvalue()
