"""Fixtures of every test: one seed, poisoned allocations, hypothesis without randomness."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu leave the run where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer for integers): reading uninitialized memory shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=[72, 480], ids=["positions-cut", "samples-cut"])
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tile budgets so small that the inputs of oracles/inputs.py are cut, and unevenly.

    With 8 channels, 72 elements are 9 columns: 15 positions become 8 + 7. 480 elements are four samples of 15
    positions: 6 samples become 4 + 2. The budget is per thread, so there is one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("normkernels.ops._tiles.TILE_ELEMENTS", request.param)
    yield
    torch.set_num_threads(threads)
