"""Limits on text files and YAML."""

from __future__ import annotations

import pytest
import yaml

from simpo.config.text import load_yaml, read_text_file
from simpo.errors import SimpoError


def test_text_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("ä\r\nb\rc".encode())
    assert read_text_file(path, max_bytes=7) == "ä\nb\nc"
    with pytest.raises(SimpoError, match="text: larger than"):
        read_text_file(path, max_bytes=6)


def test_endless_files_are_rejected():
    with pytest.raises(SimpoError, match="/dev/zero: larger than"):
        read_text_file("/dev/zero")


def test_yaml_is_loaded_as_pyyaml_does():
    text = "a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 4}\nc: [*a, *a]\nd: 2020-01-01\n"
    assert load_yaml(text, "here") == yaml.safe_load(text)
    assert load_yaml("# nothing", "here") is None


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_exponential_aliases_are_rejected(form):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{k}: &a{k} " + form.format(", ".join([f"*a{k - 1}"] * 10)) for k in range(1, 8)]
    with pytest.raises(SimpoError, match="here: aliases"):
        load_yaml("\n".join(lines), "here")
    with pytest.raises(SimpoError, match="here: aliases"):
        load_yaml("a: &a [*a]", "here")
