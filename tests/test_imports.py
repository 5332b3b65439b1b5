"""Modules import each other in one direction, in the package and in bench, and private names of torch in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import bench
import normkernels

# The folders of bench, each of which imports from itself and from those before it.
FOLDERS = ("measure", "providers", "networks", "suites", "report", "micro", "gpu", "builds", "experiments", "figures")


def modules(package: ModuleType = normkernels) -> dict[str, Path]:
    found = {}
    root = Path(str(package.__file__)).parent
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
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


@pytest.mark.parametrize("package", [normkernels, bench], ids=lambda package: package.__name__)
def test_no_cycles(package: ModuleType) -> None:
    paths = modules(package)
    assert len(paths) > 60
    graph = {name: imported(path, set(paths)) - {name} for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_folders_of_bench_import_in_one_direction() -> None:
    paths = modules(bench)
    assert set(FOLDERS) == {path.parent.name for path in Path(str(bench.__file__)).parent.glob("*/__init__.py")}
    programs = len(FOLDERS)  # __main__ and demo are above all folders
    height = {
        name: FOLDERS.index(folder) if (folder := name.split(".")[1]) in FOLDERS else programs
        for name in paths if name != "bench"
    }  # fmt: skip
    upward = [
        f"{name} imports {other}"
        for name, below in height.items()
        for other in imported(paths[name], set(height))
        if height[other] > below
    ]
    assert upward == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> list[str]:
    """Return the private names of torch that a module imports, or finds by way of torch, nn or dist."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if private(name)]
        elif isinstance(node, ast.Attribute) and private(node.attr):
            whole = ast.unparse(node)
            found += [whole] if whole.partition(".")[0] in ("torch", "nn", "dist") else []
    return found


def test_private_names_of_torch_are_in_one_file() -> None:
    found = {name: private_names(path) for name, path in modules().items()}
    assert found.pop("normkernels._torch")
    assert {name: names for name, names in found.items() if names} == {}


def test_the_package_imports_neither_triton_nor_dynamo() -> None:
    """Importing them takes seconds, and those without a GPU never need the first."""
    program = "import sys, normkernels; print([name for name in ('triton', 'torch._dynamo') if name in sys.modules])"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    assert done.stdout.strip() == "[]"
