"""Mutation testing: are the tests able to fail? ``python -m benchmarks.mutants --count 100 --seed 0 [PACKAGE ...]``

Each mutant changes one operator, comparison, constant or condition in one file of ``src/simpo``. It is tested in a copy
of the repository with the tests of its package. A mutant that no test notices survives: it is either equivalent to the
original, or it shows a missing test. Results are appended to a file of JSON lines, so an interrupted run continues
where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The tests that are run for a mutant of a package, the quickest and closest first.
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
    """One change: where it is, and the two texts."""

    path: str
    line: int
    before: str
    after: str
    source: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file; docstrings, annotations and texts of messages are left alone."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]:
        for _ in _changes(node):  # each iteration changes the tree, and the next one restores it
            after = ast.unparse(node)
            yield Mutant(str(path.relative_to(ROOT)), node.lineno, "", after, ast.unparse(tree))


def _changes(statement: ast.stmt) -> Iterator[None]:
    """Apply each possible change to a statement's own expressions in turn; undo it when resumed."""
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
    """The expressions of a statement, without those of statements, annotations and error messages inside it."""
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


def test(mutant: Mutant, copy: Path, tests: list[str], timeout: float) -> str:
    """``killed``, ``timeout`` or ``survived``; the file is restored afterwards."""
    target = copy / mutant.path
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.source, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        found = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        target.write_text(original, encoding="utf-8")
    return "killed" if found.returncode else "survived"


def main() -> None:
    """Draw mutants, test those that the results do not have yet, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=100, help="mutants in all, spread over the packages by size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one mutant's tests")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    arguments = parser.parse_args()
    drawn: list[tuple[str, Mutant]] = []
    for package in arguments.packages:
        source = ROOT / "src/simpo" / package
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source.with_suffix(".py")]
        drawn += [(package, mutant) for path in files for mutant in mutants_of(path)]
    draw = random.Random(arguments.seed)  # noqa: S311 - no secret depends on it
    drawn = draw.sample(drawn, min(arguments.count, len(drawn)))
    done = [json.loads(line) for line in arguments.results.open(encoding="utf-8")] if arguments.results.exists() else []
    known = {(row["path"], row["line"], row["after"]) for row in done}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "simpo"
        ignored = shutil.ignore_patterns(".git", ".venv", "*.pyc", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for package, mutant in drawn:
            if (mutant.path, mutant.line, mutant.after) in known:
                continue
            row = asdict(mutant) | {"package": package, "result": test(mutant, copy, TESTS[package], arguments.timeout)}
            del row["source"]
            row["before"] = (ROOT / mutant.path).read_text(encoding="utf-8").splitlines()[mutant.line - 1].strip()
            done.append(row)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(done)} of {len(drawn)}: {row['result']} {row['path']}:{row['line']}", flush=True)
    survivors = [row for row in done if row["result"] == "survived"]
    print(f"{len(done) - len(survivors)} of {len(done)} mutants were detected")
    for row in survivors:
        print(f"{row['path']}:{row['line']}\n  - {row['before']}\n  + {row['after'].splitlines()[0]}")


if __name__ == "__main__":
    main()
