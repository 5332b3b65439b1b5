"""Fixtures of every test: one seed, poisoned allocations, hypothesis without randomness."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import backends
from tests.pairwise import pairwise

# Triton's kernels are tested everywhere: without a GPU its interpreter runs them. Triton reads this on import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomized and without a database: a failure in CI is a failure on every machine. A CPU without a warm cache may
# need seconds for an example, so there is no deadline. A machine that runs the GPU tests alone has no hypothesis.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "normkernels",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=25,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("normkernels")


if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import behave_as_gpus_do

    behave_as_gpus_do()


def has_no_backend(item: pytest.Item) -> bool:
    return parameters(item).get("backend") == backends.NONE


def lacks_a_gpu(item: pytest.Item) -> bool:
    return marked(item, "gpu") and not torch.cuda.is_available()


def has_float64_for_kernels(item: pytest.Item) -> bool:
    """Return whether kernels would be asked for float64, which eager serves: that is tested with eager."""
    return parameters(item).get("backend") in backends.KERNELS and torch.float64 in parameters(item).values()


def is_of_the_other_run(item: pytest.Item) -> bool:
    """Return whether a test belongs to the runs with --simt and this is none, or the other way round."""
    return marked(item, "simt") != simulated(item.config)


LEFT_OUT = (has_no_backend, lacks_a_gpu, has_float64_for_kernels, is_of_the_other_run)


def repeats_pairs(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the cases of tests marked ``pairwise`` that slow backends leave out: others have all pairs of values."""
    tests = defaultdict(list)
    for item in items:
        if marked(item, "pairwise") and parameters(item).get("backend") in backends.SLOW:
            tests[item.parent, item.originalname, parameters(item)["backend"]].append(item)
    found: set[pytest.Item] = set()
    for cases in tests.values():
        found |= set(cases) - {cases[i] for i in pairwise([values(case) for case in cases])}
    return found


def values(item: pytest.Item) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return what stands for the values of a case's parameters; those that one mark gives together are one value.

    They need not be hashable, and those of two cases are the same object where they are the same parameter.
    """
    together: dict[str, tuple[str, ...]] = {}
    for mark in item.iter_markers("parametrize"):
        names = tuple(mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
        together |= dict.fromkeys(names, names)
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for name, value in parameters(item).items():
        if name != "backend":
            key = together.get(name, (name,))
            found[key] = (*found.get(key, ()), id(value))
    return found


def marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def simulated(config: pytest.Config) -> bool:
    return config.getoption("--simt") != "off"


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


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test that uses the fixture ``backend`` once for each backend that it can run with here."""
    if "backend" in metafunc.fixturenames and not any(
        mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize")
    ):
        found = backends.parameters(metafunc.definition, metafunc.fixturenames, simulated(metafunc.config))
        metafunc.parametrize("backend", found, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark tests of the Triton backend as gpu where there is one; leave out what cannot run or is in another part.

    Parts are of what -m and -k have chosen, so that each has as much to run.
    """
    for item in items:
        if torch.cuda.is_available() and item.path.name.startswith("test_triton"):
            item.add_marker(pytest.mark.gpu)
    leave_out(config, items, [any(rule(item) for rule in LEFT_OUT) for item in items])
    repeated = repeats_pairs(items)
    leave_out(config, items, [item in repeated for item in items])
    yield
    part, parts = map(int, config.getoption("--part").split("/"))
    leave_out(config, items, [i % parts != part - 1 for i in range(len(items))])


def leave_out(config: pytest.Config, items: list[pytest.Item], chosen: list[bool]) -> None:
    left_out = [item for item, leave in zip(items, chosen, strict=True) if leave]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, leave in zip(items, chosen, strict=True) if not leave]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test once for every backend, on a CPU (Triton's kernels interpreted, CUDA's as C++) and on a GPU."""
    from normkernels import use_backend
    from normkernels.dispatch import choose
    from tests.oracles import run
    from tests.simt import build

    name, _, device = request.param.partition("-")
    if name == "simt":
        if reason := build.missing():
            pytest.skip(reason)
        build.install(Path(os.environ["NORMKERNELS_SIMT_LIBRARY"]))
        name = "cuda"
    if request.param == "cuda-cuda" and not choose.availability(name)[0]:
        pytest.skip(choose.availability(name)[1])
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
    monkeypatch.setattr("normkernels.eager.tiles.TILE_ELEMENTS", request.param)
    yield
    torch.set_num_threads(threads)
