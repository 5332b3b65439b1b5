"""The cost model of synchronized whitening: its formulas, the simulation beside them, and the run that measures."""

from __future__ import annotations

import argparse
import csv
from math import inf
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench.experiments import sync_cost
from bench.experiments.collectives import (
    ALL_REDUCES,
    NETWORKS,
    Cluster,
    Link,
    backward_bytes,
    batchnorm_seconds,
    fit,
    forward_bytes,
    gradient_seconds,
    messages,
    ring,
    simulate,
    whitening_seconds,
)
from bench.experiments.sync_cost import parse_link, simulated_step
from tests.tolerances import assert_identity

LINK = Link(latency=5e-6, bandwidth=4e10)
FAST = Link(latency=1e-6, bandwidth=2e11)


def test_bytes_of_a_layer() -> None:
    """64 channels have 2,080 entries of a triangle or, in groups of 16, four times 136."""
    assert forward_bytes(64, 64) == 8 * (1 + 64 + 2080)
    assert forward_bytes(64, 16) == 8 * (1 + 64 + 4 * 136)
    assert forward_bytes(8, 64) == forward_bytes(8, 8)
    assert backward_bytes(64, 64) == 4 * (64 + 2080)
    assert backward_bytes(64, 1, itemsize=8) == 8 * 128


def test_networks_are_the_published_ones() -> None:
    small, large = NETWORKS["ResNet-18"], NETWORKS["ResNet-50"]
    assert (len(small.channels), small.parameters) == (20, 11_689_512)
    assert (len(large.channels), large.parameters, sum(large.channels)) == (53, 25_557_032, 26_560)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64, 1024])
@pytest.mark.parametrize("algorithm", ALL_REDUCES)
def test_simulation_is_the_formula_on_equal_links(algorithm: str, ranks: int) -> None:
    for size in (8.0, 1e5, 1e8):
        ends = simulate(algorithm, size, torch.zeros(ranks), Cluster(LINK, LINK))
        assert_identity(ends, torch.full_like(ends, ALL_REDUCES[algorithm](size, ranks, LINK)))


@pytest.mark.parametrize(
    ("algorithm", "ranks"), [*(("ring", n) for n in (2, 6, 8)), *(("halving-doubling", n) for n in (2, 8, 32))]
)
def test_messages_bring_everything_everywhere(algorithm: str, ranks: int) -> None:
    """2 (n - 1) / n of the bytes go through each rank, the least that an all-reduce can do."""
    known, sent = torch.eye(ranks, dtype=torch.bool), 0.0
    for sender, part in messages(algorithm, 1.0, ranks):
        assert sorted(sender.tolist()) == list(range(ranks))  # each rank sends to one rank
        known |= known[sender]
        sent += part
    assert known.all()
    assert sent == pytest.approx(2 * (ranks - 1) / ranks)


def test_halving_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two for halving-doubling, got 6"):
        simulate("halving-doubling", 8.0, torch.zeros(6), Cluster(LINK, LINK))


@pytest.mark.parametrize("algorithm", ALL_REDUCES)
def test_all_wait_for_a_late_rank(algorithm: str) -> None:
    start = torch.zeros(8)
    start[3] = 1.0
    late = simulate(algorithm, 1e5, start, Cluster(LINK, LINK))
    whole = ALL_REDUCES[algorithm](1e5, 8, LINK)
    assert (late > 1.0).all() and late.max().item() <= 1.0 + whole * (1 + 1e-9)


def test_nodes() -> None:
    """The bytes of a ring go through its slowest link; halving-doubling leaves the node for some of its steps only."""
    mixed, start = Cluster(FAST, LINK, per_node=8), torch.zeros(64)
    large, small = (simulate("ring", size, start, mixed).max().item() for size in (1e10, 8.0))
    assert large == pytest.approx(ring(1e10, 64, LINK), rel=0.01)
    assert ring(8.0, 64, FAST) < small < ring(8.0, 64, LINK)
    halving = ALL_REDUCES["halving-doubling"]
    end = simulate("halving-doubling", 1e5, start, mixed).max().item()
    assert halving(1e5, 8, FAST) < end < halving(1e5, 64, LINK)
    assert simulate("ring", 1e5, torch.zeros(8), mixed).max().item() == pytest.approx(ring(1e5, 8, FAST))


def test_a_step_is_the_sum_of_its_collectives() -> None:
    net = NETWORKS["ResNet-18"]
    for all_reduce in ALL_REDUCES.values():
        free = Link(1e-6, inf)
        assert whitening_seconds(net, 64, 8, free, all_reduce) == pytest.approx(40 * all_reduce(0, 8, free))
        assert gradient_seconds(net, 8, free, all_reduce) == pytest.approx(all_reduce(0, 8, free))
    assert batchnorm_seconds(net, 8, Link(1e-6, inf), ring) == pytest.approx(20 * (7 + 14) * 1e-6)
    sent = sum(forward_bytes(c, 16) + backward_bytes(c, 16) for c in net.channels)
    assert whitening_seconds(net, 16, 8, Link(0, 1e9), ring) == pytest.approx(2 * 7 / 8 * sent / 1e9)
    simulated = simulated_step(net.channels, 16, 8, Cluster(LINK, LINK))
    ways = [
        sum(min(f(s, 8, LINK) for f in ALL_REDUCES.values()) for s in (forward_bytes(c, 16), backward_bytes(c, 16)))
        for c in net.channels
    ]
    assert simulated == pytest.approx(sum(ways))


def test_fit() -> None:
    sizes = [8.0, 1e3, 1e5, 1e7]
    for ranks in (2, 4):
        found = fit(sizes, [ring(size, ranks, LINK) for size in sizes], ranks)
        assert (found.latency, found.bandwidth) == (pytest.approx(LINK.latency), pytest.approx(LINK.bandwidth))
    noise = fit([64, 4096], [0.02, 0.01], 2)  # a busy machine: smaller was slower
    assert noise.bandwidth == inf and noise.latency > 0


@pytest.mark.parametrize("text", ["", "NVLink", "NVLink:3", "a:b:c", "a:0:1", "a:1:-1", "a:nan:1"])
def test_links_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        parse_link(text)


def test_links_of_the_command_line() -> None:
    assert parse_link("x:2:10") == ("x", Link(2e-6, 1e10))


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_quick_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes are those of the model, which the run checks itself, too. Times are not looked at."""
    out = tmp_path / "new"
    assert sync_cost.main(["--quick", "--link", "mine:2:10", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {}
    for name in ("all_reduce", "links", "layers", "model"):
        with (out / f"{name}.csv").open(newline="") as file:
            rows[name] = list(csv.DictReader(file))
    assert [row["bytes"] for row in rows["layers"]] == [row["model_bytes"] for row in rows["layers"]]
    assert int(rows["layers"][0]["bytes"]) == forward_bytes(16, 8) + backward_bytes(16, 8)
    assert {(row["ranks"], row["bytes"]) for row in rows["all_reduce"]} == {
        (n, s) for n in ("2", "4") for s in ("64", "4096", "262144")
    }
    assert {row["link"] for row in rows["model"]} == {"mine", sync_cost.MEASURED}
    assert (out / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "C = 16, d = 8" in printed and "mine, ms" in printed
