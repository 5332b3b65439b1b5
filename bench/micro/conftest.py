"""The devices of the micro benchmarks, and how a call is timed by pytest-benchmark."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from bench.measure.timing import Timed, settle_allocator

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
MIN_ROUNDS, MAX_ROUNDS = 5, 500


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def settled() -> None:
    settle_allocator()


@pytest.fixture
def play(request: pytest.FixtureRequest, device: torch.device, benchmark) -> Callable[[Timed], None]:
    """Return a function that times a call for about --benchmark-max-time, and until the GPU is done with it.

    Gradients are cleared and inputs chosen before each run, outside of what is timed: hence `pedantic`, whose number of
    rounds follows from the time of one run.
    """
    turns = itertools.count()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def play(timed: Timed) -> None:
        def prepare() -> None:
            timed.prepare(next(turns))
            synchronize()

        def run() -> None:
            timed.run()
            synchronize()

        for _ in range(2):  # the first run may compile or allocate
            prepare()
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
        fitting = int(float(request.config.getoption("benchmark_max_time")) / seconds)
        benchmark.pedantic(run, setup=prepare, rounds=min(max(fitting, MIN_ROUNDS), MAX_ROUNDS))
        timed.finish()  # raises if an output or gradient is not finite, or zero

    return play
