"""Runs the suites under pytest-benchmark: `pytest bench/bench_*.py`, or with a report `python -m bench`.

A suite file names its function in `SUITE`; its test gets one (comparison, provider) pair at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.measure.comparison import Comparison, Settings
from bench.report.page import write_report
from bench.suites.run import CLOCK, Session

SESSION = pytest.StashKey[Session]()
Replay = Callable[[Comparison, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normkernels benchmarks")
    group.addoption("--bench-quick", action="store_true", help="few rounds")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
    group.addoption("--bench-vgg-batch", type=int, default=None, help="batch of the VGG step; the paper's is 256")
    group.addoption("--bench-out", default=None, help="folder of the report; without it only the table is printed")
    group.addoption("--bench-add", action="store_true", help="add to the CSV files there, and write no report")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--bench-device"))
    settings = Settings(device, config.getoption("--bench-quick"), config.getoption("--bench-vgg-batch"))
    out = config.getoption("--bench-out")
    config.stash[SESSION] = Session.start(settings, Path(out) if out else None, config.getoption("--bench-add"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comparison" not in metafunc.fixturenames:
        return
    comparisons = metafunc.module.SUITE(metafunc.config.stash[SESSION].settings)
    pairs = [
        pytest.param(comparison, name, id=f"{comparison.key}-{name}")
        for comparison in comparisons
        for name in comparison.names
    ]
    metafunc.parametrize(("comparison", "provider"), pairs)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture
def replay(session: Session, benchmark) -> Replay:
    """Measure the whole comparison when its first provider comes, then play one provider's samples back."""

    def run(comparison: Comparison, provider: str) -> None:
        measurement = session.measure(comparison)
        if provider in measurement.failures:
            pytest.fail(f"{provider}: {measurement.failures[provider]}", pytrace=False)
        seconds = measurement.seconds(provider)
        benchmark.group = comparison.key
        counted = comparison.counted_bytes(provider)
        if counted:
            benchmark.extra_info["bytes"] = counted
            benchmark.extra_info["gbytes_per_s"] = counted / measurement.quantiles(provider).p50 / 1e9
        benchmark.pedantic(CLOCK.player(seconds), rounds=len(seconds), iterations=1, warmup_rounds=0)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[SESSION]
    if run.out is None or session.config.getoption("--bench-add"):
        return
    if run.results.records or run.results.failures:
        write_report(run.results, run.out)
