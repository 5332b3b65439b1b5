"""Norms, gaps of batch normalization, and their record over training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkernels.analysis import Tracker, batch_norm_gaps, weight_norms
from tests.tolerances import assert_identity

D = torch.float64


def test_weight_norms() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2), "norm": nn.BatchNorm2d(3), "head": nn.Linear(4, 4)})
    net["head"].weight = nn.Parameter(torch.full((4, 4), 3e38))  # their sum of squares is no float32
    net["tied"] = nn.Linear(4, 4, bias=False)
    net["tied"].weight = net["head"].weight
    norms = weight_norms(net)
    assert set(norms) == {"conv.weight", "head.weight"} and all(type(norm) is float for norm in norms.values())
    assert_identity(norms["conv.weight"], net["conv"].weight.detach().double().square().sum().sqrt())
    assert_identity(norms["head.weight"], 4 * net["head"].weight[0, 0].item())
    assert weight_norms(nn.ReLU()) == {}


def test_norms_grow_under_gradient_descent() -> None:
    """Lemma 3: |W'|^2 = |W|^2 + eta^2 |grad|^2 for weights before a normalization."""
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, eps=1e-30), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 5, dtype=D), torch.randint(3, (20,))
    F.cross_entropy(net(x), y).backward()
    before, gradient = weight_norms(net)["0.weight"], net[0].weight.grad.norm().item()
    torch.optim.SGD(net.parameters(), lr=2.0).step()
    assert_identity(weight_norms(net)["0.weight"] ** 2, before**2 + 4 * gradient**2)


def test_batch_norm_gaps() -> None:
    """The gaps are |gamma^2 - sigma^2| and |beta - mu|, of layers that have all four."""
    net = nn.ModuleDict(
        {
            "norm": nn.BatchNorm2d(2),
            "sync": nn.SyncBatchNorm(2),
            "no parameters": nn.BatchNorm1d(2, affine=False),
            "no statistics": nn.BatchNorm1d(2, track_running_stats=False),
            "instance": nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
        }
    )
    with torch.no_grad():
        for value, tensor in (
            ([2.0, -3.0], net["norm"].weight),
            ([1.0, 1.0], net["norm"].bias),
            ([4.0, 10.0], net["norm"].running_var),
            ([3.0, -1.0], net["norm"].running_mean),
        ):
            tensor.copy_(torch.tensor(value))
    gaps = batch_norm_gaps(net)
    assert set(gaps) == {"norm", "sync"}
    assert gaps["norm"].gamma_gap.tolist() == [0.0, 1.0] and gaps["norm"].beta_gap.tolist() == [2.0, 2.0]
    assert not gaps["norm"].gamma_gap.requires_grad


def test_tracker(tmp_path: Path) -> None:
    layer = nn.Linear(2, 1, bias=False)
    tracker = Tracker(layer, {"norm": weight_norms, "mean": lambda model: {"weight": model.weight.mean().item()}})
    for step, value in ((0, 1.0), (10, 0.1)):
        nn.init.constant_(layer.weight, value)
        tracker.record(step)
    tenth = layer.weight[0, 0].item()
    assert [(row["step"], row["measure"], row["name"]) for row in tracker.rows] == [
        (step, measure, "weight") for step in (0, 10) for measure in ("norm", "mean")
    ]
    path = tmp_path / "norms.csv"
    tracker.write_csv(path)
    assert path.read_text().splitlines()[0] == "step,measure,name,value"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in tracker.rows]
    assert tracker.rows[3]["value"] == tenth and rows[3] == {
        "step": "10", "measure": "mean", "name": "weight", "value": repr(tenth),
    }  # fmt: skip


def test_tracker_of_tensors_and_tuples(tmp_path: Path) -> None:
    """Each field has a row, with the mean of several values, and so it is in the CSV file."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([2.0, 3.0]))
        net[1].bias.copy_(torch.tensor([0.5, -1.0]))
    measures: dict[str, Any] = {
        "gap": batch_norm_gaps,
        "gamma": lambda net: {"1": net[1].weight, "1.max": net[1].weight.max()},
    }
    tracker = Tracker(net, measures)
    tracker.record(7)
    expected = [  # |4 - 1| and |9 - 1|; |0.5| and |-1|
        ("gap", "1.gamma_gap", 5.5), ("gap", "1.beta_gap", 0.75), ("gamma", "1", 2.5), ("gamma", "1.max", 3.0),
    ]  # fmt: skip
    assert [(row["measure"], row["name"], row["value"]) for row in tracker.rows] == expected
    assert all(type(row["value"]) is float and row["step"] == 7 for row in tracker.rows)
    tracker.write_csv(tmp_path / "gaps.csv")
    with (tmp_path / "gaps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["measure"], row["name"], float(row["value"])) for row in rows] == expected


@pytest.mark.parametrize(
    ("measure", "error", "message"),
    [
        (3, TypeError, r"measures\['bad'\]: expected a function or a module, got int"),
        (lambda net: 1.0, TypeError, r"measures\['bad'\]: expected a mapping as result, got float"),
        (lambda net: {"a": "1.0"}, TypeError, "a: expected a number, a real tensor or a NamedTuple of them, got str"),
        (lambda net: {"a": (1.0, 2.0)}, TypeError, "a: expected a number, a real tensor .*, got tuple"),
        (lambda net: {"a": torch.ones(2) * 1j}, TypeError, "a: expected a number, a real tensor"),
        (lambda net: {"a": torch.ones(0)}, ValueError, r"a: expected at least one value, got shape \(0,\)"),
    ],
)
def test_bad_measures(measure: Any, error: type[Exception], message: str) -> None:
    tracker = Tracker(nn.Linear(2, 2), {"norm": weight_norms, "bad": measure})
    with pytest.raises(error, match=message):
        tracker.record(0)
    assert tracker.rows == []


def test_no_module() -> None:
    for function in (weight_norms, batch_norm_gaps):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
            function(3)  # type: ignore[arg-type]
