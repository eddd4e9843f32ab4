"""Mutation testing: can the tests fail? ``python -m benchmarks.mutants --count 200 --seed 0 [PACKAGE ...]``

Each mutant changes one operator, comparison, constant or condition inside a function in ``src/simpo``. All tests are
collected once. Each mutant then runs in a fork of this process: its code replaces the original, and the tests of its
package that are not marked slow run until one fails, those that import its file first. A mutant that no test detects
survives: either it is equivalent to the original or a test is missing. A test that never ends also detects its mutant.
Module and class constants and parameter defaults are evaluated at import time, so they are not mutated. Results are
appended to a JSON lines file, and an interrupted run continues from there.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The tests of each package, the fastest and most specific first.
TESTS = {
    "objectives": ["tests/objectives", "tests/training/test_objectives.py", "tests/compat"],
    "packing": ["tests/packing", "tests/training/test_steps.py", "tests/training/test_trainer.py"],
    "data": ["tests/data", "tests/cli/test_inspect.py"],
    "training": ["tests/training"],
    "statistics": ["tests/test_statistics.py", "tests/evaluation"],
    "evaluation": ["tests/evaluation", "tests/cli/test_evaluate.py", "tests/cli/test_compare.py"],
}

_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change in a function: its location, the statement before and after, and the whole mutated file."""

    package: str
    path: str
    line: int
    before: str
    after: str
    source: str

    @property
    def module(self) -> str:
        """The dotted module name."""
        return ".".join(Path(self.path).with_suffix("").parts[1:])

    def row(self) -> dict[str, str | int]:
        """Return the fields stored in the results."""
        return {key: getattr(self, key) for key in ("package", "path", "line", "before", "after")}


def mutants_of(path: Path, package: str) -> Iterator[Mutant]:
    """Yield every mutant of a file, leaving docstrings, annotations and message texts alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = [node for function in functions for statement in function.body for node in ast.walk(statement)]
    for node in {id(node): node for node in inside if isinstance(node, ast.stmt)}.values():
        before = ast.unparse(node)
        for _ in _changes(node):  # each iteration mutates the tree and the next one restores it
            where = str(path.relative_to(ROOT)), node.lineno
            yield Mutant(package, *where, before, ast.unparse(node), ast.unparse(tree))


def _changes(statement: ast.stmt) -> Iterator[None]:
    """Apply each possible change to a statement's own expressions in turn, and undo it when resumed."""
    for node in _expressions(statement):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
            yield from _swap(node.ops, 0, _COMPARISONS[type(node.ops[0])]())
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and not _is_text(node):
            yield from _swap(node.__dict__, "op", _OPERATORS[type(node.op)]())
        elif isinstance(node, ast.BoolOp):
            yield from _swap(node.__dict__, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield from _swap(node.__dict__, "op", ast.UAdd())
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield from _swap(node.__dict__, "value", node.value + 1)
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield from _swap(node.__dict__, "value", not node.value)


def _swap(container: list | dict, key: int | str, value: object) -> Iterator[None]:
    original = container[key]
    container[key] = value
    yield
    container[key] = original


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(side, (ast.JoinedStr, ast.List)) or getattr(side, "value", None).__class__ is str
               for side in (node.left, node.right))  # fmt: skip


def _expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield a statement's expressions, excluding nested statements, annotations and error messages."""
    if isinstance(statement, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
        return
    queue = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        queue = list(getattr(getattr(statement, "args", None), "defaults", []))
    elif isinstance(statement, ast.AnnAssign):
        queue = [statement.value] if statement.value is not None else []
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, ast.JoinedStr):
            queue += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def package_tests(mutant: Mutant) -> tuple[set[Path], set[Path]]:
    """Return the package's test files, and those of them that import the mutant's module or names from its package."""
    files = [file for path in map(ROOT.joinpath, TESTS[mutant.package]) for file in [path, *path.rglob("test_*.py")]]
    parent, _, name = mutant.module.rpartition(".")
    names = rf"[^\n]*\b{name}\b" if parent == "simpo" else ""
    imports = re.compile(rf"{re.escape(mutant.module)}\b|from {re.escape(parent)} import {names}")
    close = {file for file in files if file.is_file() and imports.search(file.read_text(encoding="utf-8"))}
    return set(files), close


def apply(mutant: Mutant) -> None:
    """Replace the code of the module's functions with the mutant's, wherever they are referenced."""
    module = importlib.import_module(mutant.module)
    codes = {code.co_qualname: code for code in _codes(compile(mutant.source, str(module.__file__), "exec"))}
    gc.unfreeze()
    for function in [found for found in gc.get_objects() if isinstance(found, FunctionType)]:
        code = codes.get(function.__code__.co_qualname)
        if function.__globals__ is vars(module) and code and code.co_freevars == function.__code__.co_freevars:
            function.__code__ = code


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


class Trial:
    """A pytest plugin that runs the collected tests on each mutant instead of once."""

    def __init__(self, mutants: list[Mutant], results: Path, timeout: float) -> None:
        self.mutants, self.results, self.timeout = mutants, results, timeout

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Test every mutant; pytest calls this after collection."""
        for number, mutant in enumerate(self.mutants, start=1):
            fast = [item for item in session.items if not item.get_closest_marker("slow")]
            files, close = package_tests(mutant)
            items = sorted((item for item in fast if item.path in files), key=lambda item: item.path not in close)
            fork = multiprocessing.get_context("fork")
            ended = fork.Value("i", 0)  # number of tests that ended
            process = fork.Process(target=_run, args=(mutant, session, items, ended))
            process.start()
            before = -1
            while process.is_alive() and ended.value > before:
                before = ended.value
                process.join(self.timeout)
            if late := process.is_alive():
                process.kill()
                process.join()
            result = "timeout" if late else {0: "survived", 1: "killed"}[process.exitcode]
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(mutant.row() | {"result": result}) + "\n")
            print(f"{number} of {len(self.mutants)}: {result} {mutant.path}:{mutant.line}", flush=True)
        return True


def _run(mutant: Mutant, session: pytest.Session, items: list[pytest.Item], ended: Any) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    apply(mutant)
    for item, following in pairwise([*items, None]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        ended.value += 1
        if session.testsfailed:
            break
    os._exit(bool(session.testsfailed))


def main() -> None:
    """Sample mutants, test those without a stored result, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=list(TESTS), help=f"choose from {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=100, help="total number of mutants, sampled uniformly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds allowed for each test")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    arguments = parser.parse_args()
    mutants: list[Mutant] = []
    for package in arguments.packages:
        source = ROOT / "src/simpo" / package
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source.with_suffix(".py")]
        mutants += [mutant for path in files for mutant in mutants_of(path, package)]
    draw = random.Random(arguments.seed)  # noqa: S311 - no secret depends on it
    mutants = draw.sample(mutants, min(arguments.count, len(mutants)))
    known = (
        [json.loads(line) for line in arguments.results.open(encoding="utf-8")] if arguments.results.exists() else []
    )
    left = [m for m in mutants if not any(row.items() >= m.row().items() for row in known)]
    paths = sorted({str(ROOT / path) for package in arguments.packages for path in TESTS[package]})
    code = pytest.main(
        ["-q", "-s", "-n", "0", "-p", "no:cacheprovider", *paths],
        plugins=[Trial(left, arguments.results, arguments.timeout)],
    )
    done = list(map(json.loads, arguments.results.read_text().splitlines()))
    survivors = [row for row in done if row["result"] == "survived"]
    print(f"{len(done) - len(survivors)} of {len(done)} mutants were detected")
    for row in survivors:
        print(f"{row['path']}:{row['line']}\n  - {row['before'].splitlines()[0]}\n  + {row['after'].splitlines()[0]}")
    sys.exit(code)


if __name__ == "__main__":
    main()
