"""The script that redraws Figure 2: which layers, on which planes, what it writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.experiments.conv_spectrum import analyse, build, convolutions, main, resnet18
from normkernels.analysis import channel_condition, layer_spectral_norm


def small() -> nn.Module:
    return resnet18(width=2)


def edges() -> nn.Module:
    """Build a spectral zero in one of two depthwise filters, a zero filter, a 2 x 2 plane under a dilated kernel."""
    depthwise, zero = nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 2, bias=False)
    with torch.no_grad():
        depthwise.weight[1] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        zero.weight.zero_()
    return nn.Sequential(depthwise, zero, nn.AdaptiveAvgPool2d(2), nn.Conv2d(2, 3, (3, 1), padding=2, dilation=2))


def no_module() -> int:
    return 3


def test_layers_are_those_of_the_figure() -> None:
    """The layers are the stem and 16 convolutions, each on the plane that reaches it."""
    network = small().train()
    planes = [plane for _, _, plane in convolutions(network, 32)]
    assert len(planes) == 17 + 3 and network.training
    assert planes[0] == (32, 32) and planes[-1] == (4, 4)
    rows = analyse(network, 32)
    assert len(rows) == 17 and not any("shortcut" in row.name for row in rows)
    assert [row.plane for row in rows] == ["32x32"] * 6 + ["16x16"] * 4 + ["8x8"] * 4 + ["4x4"] * 3
    assert len(analyse(network, 32, skip="^$")) == 20
    for row in rows:
        assert abs(row.condition_convnorm - 1) < 1e-4 < row.condition - 1
        channels = int(row.weight.split("x")[0])
        assert row.spectral_norm_convnorm <= math.sqrt(channels) * (1 + 1e-5)


def test_figures_are_those_of_the_analysis() -> None:
    network = small()
    row = analyse(network, 32)[0]
    weight = network[0].weight
    assert row.condition == channel_condition(weight, 32).mean().item()
    assert row.spectral_norm == layer_spectral_norm(weight, 32).item()


def test_edges() -> None:
    depthwise, zero, dilated = analyse(edges(), 16)
    assert depthwise.condition == math.inf and zero.condition == math.inf
    assert depthwise.spectral_norm_convnorm == pytest.approx(1, rel=1e-4)
    assert zero.spectral_norm == zero.spectral_norm_convnorm == 0
    assert dilated.plane == "5x2" and dilated.condition_convnorm == pytest.approx(1, rel=1e-4)


def test_main_writes_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    network = small()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "checkpoint.pt")
    main([
        "--model", f"{__name__}:small", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--size", "16",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    with (tmp_path / "out" / "conv_spectrum.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17
    assert float(rows[0]["spectral_norm"]) == layer_spectral_norm(network[0].weight, 16).item()
    assert (tmp_path / "out" / "conv_spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "conv_spectrum.png" in capsys.readouterr().out
    main(["--model", f"{__name__}:edges", "--size", "16", "--out", str(tmp_path / "out")])  # some figures are infinite


def test_default_network_is_resnet18() -> None:
    with torch.device("meta"):
        network = build(None)
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # as in the 32 x 32 form with ten classes


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("bench", ValueError, r"--model: expected module:factory, got 'bench'"),
        (f"{__name__}:no_module", TypeError, r"--model: expected .* to make an nn.Module, got int"),
    ],
)
def test_bad_models(model: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(model)


def test_a_network_without_convolutions() -> None:
    with pytest.raises(ValueError, match=r"model: expected a network with Conv2d layers, got Linear"):
        analyse(nn.Linear(2, 3))
