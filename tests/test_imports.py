"""Modules of the package import each other in one direction."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import normkernels

PACKAGE = Path(normkernels.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, names: set[str]) -> set[str]:
    """Return the package's modules that a module names in an import, also inside of functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in names}
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            assert node.module is not None and node.level == 0
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in names else node.module for name, full in inner.items() if name != "_C"}
    return found


def test_no_cycles() -> None:
    paths = modules()
    assert len(paths) > 60
    graph = {name: imported(path, set(paths)) - {name} for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
