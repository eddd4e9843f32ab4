"""Every kind of damage is detected and reported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from simpo.errors import SimpoError
from simpo.runs.manifest import find_damage, is_intact, write_digest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "below" / "ü.txt").write_text("text")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_a_manifest_lists_all_files(folder):
    assert json.loads((folder / "manifest.json").read_text()) == {
        "schema": 1,
        "files": [
            {"path": "below/ü.txt", "bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()},
            {"path": "empty", "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
            {
                "path": "model.safetensors",
                "bytes": 2048,
                "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            },
        ],
    }
    assert find_damage(folder) is None


def test_excluded_files_are_not_listed(folder):
    for name in ("checkpoint-1/model.safetensors", "below/log.txt", "log.txt", ".lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    write_manifest(folder, exclude=("checkpoint-*", "log.txt", ".*"))
    listed = [file["path"] for file in json.loads((folder / "manifest.json").read_text())["files"]]
    assert listed == ["below/log.txt", "below/ü.txt", "empty", "model.safetensors"]


def _flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:512]), "512 bytes instead of 2,048"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of 2,048"),
        (lambda path: path.write_bytes(bytes(4096)), "4,096 bytes instead of 2,048"),
        (_flip, "contents changed (sha256)"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: (path.unlink(), path.mkdir()), "missing"),
    ],
)
def test_damage_is_reported(folder, damage, fault):
    damage(folder / "model.safetensors")
    assert find_damage(folder) == f"model.safetensors: {fault}"


def test_sizes_are_checked_before_hashes(folder):
    (folder / "below" / "ü.txt").write_text("TEXT")
    assert find_damage(folder) == "below/ü.txt: contents changed (sha256)"
    (folder / "model.safetensors").unlink()
    assert find_damage(folder) == "model.safetensors: missing"


@pytest.mark.parametrize(
    "text", ["", '{"schema": 1', "[]", '{"schema": 2, "files": []}', '{"schema": 1, "files": [3]}']
)
def test_an_unreadable_manifest_is_damage(folder, text):
    (folder / "manifest.json").write_text(text)
    assert find_damage(folder) == "manifest.json: not readable"


def test_a_missing_manifest_is_damage(folder):
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == "no manifest.json"


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "below/../../outside"])
def test_a_manifest_cannot_refer_outside_its_folder(folder, path):
    document = json.loads((folder / "manifest.json").read_text())
    document["files"].append({"path": path, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()})
    (folder / "manifest.json").write_text(json.dumps(document))
    assert find_damage(folder) == f"{path}: not in this folder"


def test_a_full_disk_leaves_the_earlier_manifest(small_disk):
    (small_disk / "file").touch()
    write_manifest(small_disk)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(SimpoError, match=r"manifest\.json: no space left on the disk"):
        write_manifest(small_disk)
    assert find_damage(small_disk) is None


@pytest.mark.parametrize("damage", [_flip, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("name", ["scores.json", ".scores.json.sha256"])
def test_a_file_that_differs_from_its_digest_is_damaged(tmp_path, name, damage, caplog):
    path = tmp_path / "scores.json"
    path.write_text('{"score": 0.25}')
    write_digest(path)
    assert is_intact(path) and not caplog.text
    damage(tmp_path / name)
    assert not is_intact(path)
    assert ("scores.json is damaged" in caplog.text) == path.exists()
