"""The dataset cache: damaged files are rebuilt, and an unusable cache is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from simpo.data import verification as cache
from simpo.data.settings import TokenizeSettings
from simpo.data.sources import load_rows
from simpo.data.tokenizing import prepare

ROWS = [{"prompt": f"prompt {n}", "chosen": f"chosen {n}", "rejected": f"rejected {n}"} for n in range(5)]


@pytest.fixture
def prepared(tmp_path, build_tokenizer, monkeypatch):
    """Return a function that loads and tokenizes the rows from scratch."""
    monkeypatch.setattr(cache, "_temporary_cache", [])
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return lambda: prepare(load_rows(str(path), split="train"), build_tokenizer("chatml"), TokenizeSettings()).dataset


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("number", [0, 1])  # the rows as loaded, and their tokens
def test_damaged_files_are_rebuilt(prepared, own_cache, caplog, damage, number):
    expected = prepared()[:]
    assert not caplog.text
    path = sorted(own_cache.rglob("*.arrow"), key=lambda path: path.name.startswith("cache-"))[number]
    content = path.read_bytes()
    places = [place for place in range(len(content)) if content[place : place + 6] in (b"chosen", b"prompt")]
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = places[0] if places else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert prepared()[:] == expected
    assert str(path.parent) in caplog.text or str(own_cache) in caplog.text


def test_damaged_files_that_cannot_be_removed_are_not_used(prepared, own_cache, monkeypatch, caplog):
    expected = prepared()[:]
    path = next(path for path in own_cache.rglob("*.arrow") if not path.name.startswith("cache-"))
    path.write_bytes(path.read_bytes().replace(b"chosen 3", b"chosen 4"))
    monkeypatch.setattr(cache, "_remove", lambda path: None)  # as if the file belonged to another user
    assert prepared()[:] == expected
    assert "is damaged and cannot be replaced" in caplog.text
    assert Path(datasets.config.HF_DATASETS_CACHE) == cache._temporary_cache[0] != own_cache


def test_a_cache_that_cannot_be_written_is_replaced(prepared, tmp_path, monkeypatch, caplog):
    expected = prepared()[:]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert prepared()[:] == expected
    assert "file: the dataset cache cannot be used" in caplog.text
    assert Path(datasets.config.HF_DATASETS_CACHE) == cache._temporary_cache[0]
