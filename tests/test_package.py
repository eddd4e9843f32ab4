"""The published packages are complete, and the wheel works without the rest of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_BUILD = "import sys, hatchling.build as build; build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", _BUILD, folder], cwd=_ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def _files(folder: Path) -> set[str]:
    """Return the paths, relative to the root, of all files that belong to the repository."""
    return {
        path.relative_to(_ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {f"src/{name}" for name in inside} == _files(_ROOT / "src/simpo")


def test_the_wheel_declares_its_command_and_requirements(wheel):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "simpo = simpo.cli:main" in wheel.read(entry_points).decode().splitlines()
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    fields = Parser().parsestr(wheel.read(metadata).decode())
    assert fields["Name"] == "simpo" and fields["Requires-Python"] == ">=3.11"
    assert any(need.startswith("torch") for need in fields.get_all("Requires-Dist"))


def test_the_sdist_has_everything_the_wheel_is_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert _files(_ROOT / "src/simpo") | {"pyproject.toml", "README.md", "LICENSE"} <= inside
    assert not {name for name in inside if name.startswith((".venv", "runs/", "outputs/"))}


def test_the_wheel_works_on_its_own(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import simpo, sys; print(simpo.__file__); from simpo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "recipe", "--objective", "simpo", "--setting", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    where, *recipe = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert recipe == (_ROOT / "recipes/tiny/simpo.yaml").read_text().splitlines()
