"""Fixtures of every test: one seed, poisoned allocations, hypothesis without randomness."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from tests import backends

# Triton's kernels are tested everywhere: without a GPU its interpreter runs them. Triton reads this on import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hypothesis
except ImportError:  # without hypothesis, as on a machine for the GPU tests only, property tests alone are skipped
    hypothesis = sys.modules["hypothesis"] = MagicMock(__spec__=ModuleSpec("hypothesis", None))
    hypothesis.given = lambda *_, **__: pytest.mark.skip(reason="needs hypothesis")
    hypothesis.settings = MagicMock(return_value=lambda test: test)

# Derandomized and without a database: a failure in CI is a failure on every machine. A CPU without
# a warm cache may need seconds for an example, so there is no deadline.
hypothesis.settings.register_profile(
    "normkernels",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("normkernels")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.interpreter import behave_as_gpus_do

    behave_as_gpus_do()


def cannot_run(item: pytest.Item) -> bool:
    """Return whether a test cannot run here.

    Tests marked gpu need a CUDA device, and Triton kernels on a CPU need the interpreter. The kernels do not serve
    float64, and a test of the fallback has nothing to add; tiles of other sizes are the eager backend's. With --simt,
    only what runs on the SIMT runtime is run; without it, everything else.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    backend = str(parameters.get("backend", ""))
    return (
        (item.get_closest_marker("gpu") is not None and not torch.cuda.is_available())
        or (backend == "triton" and (not INTERPRETED or item.get_closest_marker("large") is not None))
        or (backend.startswith(("triton", "simt", "cuda")) and torch.float64 in parameters.values())
        or (backend not in ("", "eager") and "tiny_tiles" in getattr(item, "fixturenames", ()))
        or (backend.endswith("-cuda") and item.get_closest_marker("on_cpu") is not None)
        or (item.get_closest_marker("simt") is not None) != (item.config.getoption("--simt") != "off")
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="k/n: only every n-th test, from the k-th on")
    parser.addoption(
        "--simt",
        nargs="?",
        const="plain",
        default="off",
        choices=["off", "plain", "sanitized"],
        help="only the CUDA kernels, compiled for the CPU (see tests/simt), with or without sanitizers",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare --simt: put sanitizers into the process, and build the kernels, once for all workers."""
    from tests.simt import build

    mode = config.getoption("--simt")
    if mode == "off" or build.missing() or hasattr(config, "workerinput"):
        return
    if mode == "sanitized" and not build.sanitizing():
        # AddressSanitizer must be there when the process starts: begin again, with the output where it was.
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        command = [sys.executable, "-m", "pytest", *map(str, config.invocation_params.args)]
        os.execve(sys.executable, command, build.sanitized_environment())
    try:
        os.environ["NORMKERNELS_SIMT_LIBRARY"] = str(build.build(sanitize=mode == "sanitized"))
    except build.BuildError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests of the Triton backend as gpu where there is one; deselect what cannot run or is in another part."""
    for item in items:
        if torch.cuda.is_available() and item.path.name.startswith("test_triton"):
            item.add_marker(pytest.mark.gpu)
    part, parts = map(int, config.getoption("--part").split("/"))
    left_out = {item for i, item in enumerate(items) if cannot_run(item) or i % parts != part - 1}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=backends.ALL)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test once for every backend, on a CPU (Triton's kernels interpreted, CUDA's as C++) and on a GPU."""
    from normkernels import use_backend
    from normkernels.ops import _library
    from tests.oracles import run
    from tests.simt import build

    name, _, device = request.param.partition("-")
    if name == "simt":
        if reason := build.missing():
            pytest.skip(reason)
        build.install(Path(os.environ["NORMKERNELS_SIMT_LIBRARY"]))
        name = "cuda"
    if request.param == "cuda-cuda" and not _library.availability(name)[0]:
        pytest.skip(_library.availability(name)[1])
    monkeypatch.setattr(run, "device", torch.device(device, 0) if device else torch.device("cpu"))
    with use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """Make torch.empty give NaN (or the largest integer): reading uninitialized memory shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=[72, 480], ids=["positions-cut", "samples-cut"])
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set tile budgets so small that the inputs of oracles/inputs.py are cut, and unevenly.

    With 8 channels, 72 elements are 9 columns: 15 positions become 8 + 7. 480 elements are four samples of 15
    positions: 6 samples become 4 + 2. The budget is per thread, so there is one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("normkernels.ops._tiles.TILE_ELEMENTS", request.param)
    yield
    torch.set_num_threads(threads)
