"""Batch renormalization against eq. 3, and the small mini-batches in tiny: what is compared, chosen and written."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from math import inf, nan
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("sklearn")  # before what imports it
pytest.importorskip("matplotlib")

from bench.experiments import small_batches
from bench.experiments.batch_renorm import BatchRenorm1d, BatchRenorm2d
from bench.experiments.small_batches import (
    CONVOLUTIONAL,
    DENSE,
    METHODS,
    QUICK,
    Epoch,
    Run,
    Summary,
    Trial,
    attempt,
    build,
    relax,
    search,
    summarize,
)
from tests.tolerances import assert_identity

SHAPES = {(12, 5): BatchRenorm1d, (4, 5, 6): BatchRenorm1d, (3, 5, 4, 2): BatchRenorm2d, (1, 5, 4, 4): BatchRenorm2d}


def layer_and_data(shape: tuple[int, ...]) -> tuple[BatchRenorm1d | BatchRenorm2d, Tensor, Tensor]:
    """Return a layer in float64 with statistics and parameters of its own, x, whose channels differ, and dy."""
    torch.manual_seed(len(shape))
    layer = SHAPES[shape](shape[1], dtype=torch.float64)
    with torch.no_grad():
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_std.uniform_(0.5, 2)
        layer.weight.normal_()
        layer.bias.normal_()
    per_channel = (1, 5, *(1 for _ in shape[2:]))
    scale, offset = torch.tensor([[0.1, 0.3, 1, 3, 10], [0, -2, 0, 4, -8]], dtype=torch.float64).view(2, *per_channel)
    x = scale * torch.randn(shape, dtype=torch.float64) + offset
    return layer, x.requires_grad_(), torch.randn(shape, dtype=torch.float64)


def equation_3(layer: BatchRenorm1d | BatchRenorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, then s and d before clipping, mu_H and sigma_H; s and d are constants."""
    dims = [i for i in range(x.dim()) if i != 1]
    mean = x.mean(dims, keepdim=True)
    std = ((x - mean).square().mean(dims, keepdim=True) + layer.eps).sqrt()
    mu, sigma, gamma, beta = (
        t.view_as(mean) for t in (layer.running_mean, layer.running_std, layer.weight, layer.bias)
    )
    s, d = (std / sigma).detach(), ((mean - mu) / sigma).detach()
    clipped_s = s.clamp(1 / layer.r_max, layer.r_max)
    y = gamma * ((x - mean) / std * clipped_s + d.clamp(-layer.d_max, layer.d_max)) + beta
    return y, s, d, mean, std


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("r_max", "d_max"), [(1e6, 1e6), (3.0, 5.0), (1.5, 1.0)])
def test_batch_renorm_is_equation_3(shape: tuple[int, ...], r_max: float, d_max: float) -> None:
    layer, x, dy = layer_and_data(shape)
    layer.r_max, layer.d_max = r_max, d_max
    exact, s, d, mean, std = equation_3(layer, x)
    if r_max == 1.5:  # each bound cuts something off, and not everything
        assert (s > r_max).any() and (s < 1 / r_max).any() and (d.abs() > d_max).any() and (d.abs() < d_max).any()
    expected = torch.autograd.grad(exact, (x, layer.weight, layer.bias), dy)
    running = [
        0.99 * old + 0.01 * new.flatten()
        for old, new in ((layer.running_mean.clone(), mean.detach()), (layer.running_std.clone(), std.detach()))
    ]
    y = layer(x)
    assert_identity(y, exact)
    for got, gradient in zip(torch.autograd.grad(y, (x, layer.weight, layer.bias), dy), expected, strict=True):
        assert_identity(got, gradient)
    assert_identity(layer.running_mean, running[0])
    assert_identity(layer.running_std, running[1])
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_renorm_gives_in_training_what_it_gives_in_evaluation(shape: tuple[int, ...]) -> None:
    """The two formulas of eq. 3 are equal where nothing is clipped; their gradients are not."""
    layer, x, dy = layer_and_data(shape)
    layer.r_max = layer.d_max = 1e6
    trained = layer.eval()(x), torch.autograd.grad(layer(x), x, dy)[0]
    y = layer.train()(x)
    assert_identity(y, trained[0])
    assert (torch.autograd.grad(y, x, dy)[0] - trained[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_renorm_without_room_is_batch_norm(shape: tuple[int, ...]) -> None:
    layer, x, dy = layer_and_data(shape)
    layer.r_max, layer.d_max = 1, 0
    exact = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    expected = torch.autograd.grad(exact, (x, layer.weight, layer.bias), dy)
    y = layer(x)
    assert_identity(y, exact)
    for got, gradient in zip(torch.autograd.grad(y, (x, layer.weight, layer.bias), dy), expected, strict=True):
        assert_identity(got, gradient)


def test_batch_renorm_refuses() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchRenorm1d(3)(torch.randn(1, 3))
    with pytest.raises(ValueError, match="r_max"):
        BatchRenorm1d(3, r_max=0.5)
    with pytest.raises(ValueError, match="d_max"):
        BatchRenorm2d(3, d_max=-1)
    with pytest.raises(ValueError, match="4D"):
        BatchRenorm2d(3)(torch.randn(2, 3))
    layer = BatchRenorm1d(3)
    layer(torch.full((2, 3), nan))
    assert layer.running_mean.eq(0).all() and layer.running_std.eq(1).all() and layer.num_batches_tracked == 0
    assert layer.eval()(torch.randn(1, 3)).isfinite().all()


@pytest.mark.parametrize(("network", "norms"), [(DENSE, 3), (CONVOLUTIONAL, 4)])
def test_networks_start_alike_and_differ_in_their_norms(network: str, norms: int) -> None:
    x = torch.randn(2, 1, 8, 8)
    weights: list[list[Tensor]] = []
    for method in METHODS:
        model = build(network, method, 0.1, seed=3)
        assert model(x).shape == (2, 10)
        layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
        weights.append([layer.weight for layer in layers])
        assert len(layers) == norms + 1 and all(not layer.bias.any() for layer in layers)
        places = [model[i + 1] for i, m in enumerate(model) if isinstance(m, nn.ReLU)]
        assert len(places) == norms and all(isinstance(m, nn.Identity) == (method in ("none", "BNP")) for m in places)
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_bnp_changes_the_training_and_repeats() -> None:
    runs = [Run(DENSE, method, 6, 0.1, 0, 1, 60) for method in ("none", "BNP", "BNP")]
    plain, first, second = (attempt(run) for run in runs)
    assert first == second and isinstance(first[0], Epoch) and isinstance(plain[0], Epoch)
    assert first[0].train_loss != plain[0].train_loss


def test_batch_renorm_is_relaxed_from_batch_norm() -> None:
    model = build(DENSE, "BatchRenorm", 0.1, seed=0)
    limits = []
    for epoch in (0, 1, 3, 30):
        relax(model, epoch)
        limits.append([(m.r_max, m.d_max) for m in model if isinstance(m, BatchRenorm1d)])
    assert [each[0] for each in limits] == [(1, 0), pytest.approx((5 / 3, 5 / 3)), (3, 5), (3, 5)]
    assert all(len(set(each)) == 1 for each in limits)


def test_a_network_that_diverges_is_recorded_to_its_end() -> None:
    epochs = attempt(Run(DENSE, "none", 6, 1e9, 0, 3, 60))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert not torch.tensor([epoch.train_loss for epoch in epochs]).isfinite().any()


def test_search_takes_the_smallest_finite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0.1: [3.0, 1.0], 0.2: [2.0, 1.5], 0.4: [0.1, nan]}

    def execute(runs: list[Run], *_: object) -> dict[Run, list[Epoch] | str]:
        return {
            run: "too few"
            if run.method == "BatchNorm"
            else [
                Epoch(run.network, run.method, run.batch_size, run.learning_rate, run.seed, epoch, loss, 0.5)
                for epoch, loss in enumerate(losses[run.learning_rate])
            ]
            for run in runs
        }

    monkeypatch.setattr(small_batches, "execute", execute)
    sizes = replace(QUICK, learning_rates=tuple(losses), networks=(DENSE,), epochs={2: 2}, tuning={2: 2})
    trials, rates, errors = search(sizes, None)
    assert errors == {(DENSE, "BatchNorm", 2): "too few"}
    assert rates == {(DENSE, method, 2): 0.2 for method in METHODS if method != "BatchNorm"}
    assert [t.train_loss for t in trials if t.method == "none"] == [2.0, 1.75, inf]


def test_summary_is_of_the_last_epoch() -> None:
    sizes = replace(QUICK, networks=(DENSE,), epochs={2: 2}, seeds=2)
    history = [
        Epoch(DENSE, method, 2, 0.1, seed, epoch, loss, right)
        for method in METHODS
        if method != "BatchNorm"
        for seed, epoch, loss, right in ((0, 1, 9.0, 0.1), (0, 2, 1.0, 0.75), (1, 1, 9.0, 0.1), (1, 2, 3.0, 0.5))
    ]
    rows = {row.method: row for row in summarize(history, {(DENSE, "BatchNorm", 2): "too few"}, sizes)}
    assert list(rows) == list(METHODS)
    assert rows["BNP"] == Summary(DENSE, "BNP", 2, 0.1, 2, 2, 2.0, 0.625, 0.5, 0.75)
    assert rows["BatchNorm"].error == "too few"


def test_quick_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    assert small_batches.main(["--quick", "--workers", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name, row_type in (("curves", Epoch), ("learning_rates", Trial), ("summary", Summary)):
        with (out / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == [field.name for field in fields(row_type)]
        assert {row["network"] for row in rows} == {DENSE, CONVOLUTIONAL}
    for name in ("error", "loss"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (out / "summary.csv").open(newline="") as file:
        cannot = {(row["method"], row["batch_size"]) for row in csv.DictReader(file) if row["error"]}
    assert cannot == {(method, "1") for method in ("BatchNorm", "BatchRenorm", "POP-Norm")}
    assert printed.count(" cannot train |") == 6
    with pytest.raises(SystemExit):
        small_batches.main(["--quick", "--workers", "0"])
    with pytest.raises(SystemExit):
        small_batches.main(["--quick", "--out", str(out / "summary.csv")])
