"""Figure 2 of the ConvNorm paper for a network of your choice, as it is and as ConvNorm would make it.

    python -m bench.experiments.conv_spectrum [--model module:factory] [--checkpoint FILE] [--size 32] [--out DIR]

For each Conv2d of the network, on the plane that it gets from a --size image: the condition number of an output
channel's operator, averaged over the channels (left), and the layer's spectral norm (right). "ConvNorm" divides each
channel's spectrum by its root mean square over the inputs, v = (sum |a^|^2 + eps)^(-1/2), eps being 1e-8 of the
channel's mean power. Planes smaller than the kernel count as large as the kernel; stride is left out, as in the paper.
Skip connections are, too: convolutions with "shortcut" or "downsample" in their name, or --skip.

Without --model it is ResNet-18 for 32 x 32 images, with a fresh initialization: a trained network needs --checkpoint,
a state_dict or a dict holding one. --model runs the function it names. Writes conv_spectrum.csv and .png.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels.analysis import channel_condition, layer_spectral_norm

EPS = 1e-8  # the default of nk.ConvNorm2d
SKIP = "shortcut|downsample"


class Block(nn.Module):
    """Two 3x3 convolutions beside a skip connection."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """Build ResNet-18 for small images: a 3x3 stem, no pooling before the blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for block in range(2):
            c_out = width * 2**stage
            layers.append(Block(channels, c_out, 2 if stage and not block else 1))
            channels = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@dataclass(frozen=True)
class Layer:
    """One convolution. Conditions are means over output channels, infinite if a channel has a spectral zero."""

    name: str
    weight: str
    plane: str
    condition: float
    spectral_norm: float
    condition_convnorm: float
    spectral_norm_convnorm: float


def convolutions(model: nn.Module, size: int) -> list[tuple[str, nn.Conv2d, tuple[int, int]]]:
    """Return every Conv2d that runs, in the order in which they first do, with its name and its input plane."""
    found: dict[str, tuple[nn.Conv2d, tuple[int, int]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def hook(conv: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                assert isinstance(conv, nn.Conv2d)
                found.setdefault(name, (conv, (inputs[0].shape[-2], inputs[0].shape[-1])))

            handles.append(module.register_forward_pre_hook(hook))
    if not handles:
        raise ValueError(f"model: expected a network with Conv2d layers, got {type(model).__name__} without any")
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(first.weight.new_zeros(1, first.in_channels, size, size))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [(name, conv, plane) for name, (conv, plane) in found.items()]


def convnorm_spectrum(weight: Tensor, plane: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Return v (C_O, H, W) in float64, filter by filter: the padded spectra of a whole layer are gigabytes."""
    rows, columns = (slice(0, (k - 1) * d + 1, d) for k, d in zip(weight.shape[2:], dilation, strict=True))
    spread = weight.new_zeros(weight.shape[1], *plane, dtype=torch.float64)
    powers = []
    for filters in weight:
        spread[:, rows, columns] = filters.double()
        powers.append(torch.fft.fft2(spread).abs().square().sum(0))
    power = torch.stack(powers)
    power += EPS * power.mean((1, 2), keepdim=True)
    return torch.where(power > 0, power.rsqrt(), 1.0)  # a zero filter stays zero


def analyse(model: nn.Module, size: int = 32, skip: str = SKIP) -> list[Layer]:
    """Return one row for each convolution whose name does not match ``skip``."""
    rows = []
    for name, conv, plane in convolutions(model, size):
        if re.search(skip, name):
            continue
        weight, dilation = conv.weight.detach(), (conv.dilation[0], conv.dilation[1])
        reach = [(k - 1) * d + 1 for k, d in zip(conv.kernel_size, dilation, strict=True)]
        plane = (max(plane[0], reach[0]), max(plane[1], reach[1]))
        figures = []
        for spectrum in (None, convnorm_spectrum(weight, plane, dilation)):
            condition = channel_condition(weight, plane, dilation=dilation, spectrum=spectrum).mean()
            norm = layer_spectral_norm(weight, plane, groups=conv.groups, dilation=dilation, spectrum=spectrum)
            figures += [condition.item(), norm.item()]
        rows.append(Layer(name, "x".join(map(str, weight.shape)), f"{plane[0]}x{plane[1]}", *figures))
    return rows


def write(rows: Sequence[Layer], out: Path) -> tuple[Path, Path]:
    """Write the table and the figure, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    table, figure_path = out / "conv_spectrum.csv", out / "conv_spectrum.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Layer)])
        writer.writerows(astuple(row) for row in rows)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    index = range(1, len(rows) + 1)
    lines = {"as it is": ("", "#4d4d4d", "^"), "with ConvNorm": ("_convnorm", "#1f6fb4", "o")}
    for axes, what, title in (
        (left, "condition", "Condition number, mean over channels"),
        (right, "spectral_norm", "Spectral norm of the layer"),
    ):
        for label, (suffix, colour, marker) in lines.items():
            values = [getattr(row, what + suffix) for row in rows]
            shown = [value if math.isfinite(value) else math.nan for value in values]  # a gap for a spectral zero
            axes.plot(index, shown, label=label, color=colour, marker=marker, markersize=4)
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("convolution, in order")
        axes.grid(color="#e6e6e6", linewidth=0.8)
    left.legend(frameon=False)
    figure.savefig(figure_path, dpi=150, facecolor="white")
    plt.close(figure)
    return table, figure_path


def build(model: str | None) -> nn.Module:
    """Build the network that ``module:factory`` makes, ResNet-18 for None."""
    if model is None:
        return resnet18()
    module, colon, factory = model.partition(":")
    if not colon:
        raise ValueError(f"--model: expected module:factory, got {model!r}")
    network = getattr(importlib.import_module(module), factory)()
    if not isinstance(network, nn.Module):
        raise TypeError(f"--model: expected {model} to make an nn.Module, got {type(network).__name__}")
    return network


def load(network: nn.Module, checkpoint: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    network.load_state_dict(state)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="module:factory, a function without arguments (default: ResNet-18)")
    parser.add_argument("--checkpoint", type=Path, help="weights to load")
    parser.add_argument("--size", type=int, default=32, help="height and width of the image (default: %(default)s)")
    parser.add_argument("--skip", default=SKIP, help="leave out names that match (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = build(options.model)
    if options.checkpoint is not None:
        load(network, options.checkpoint)
    rows = analyse(network, options.size, options.skip)
    header = [field.name for field in fields(Layer)]
    for cells in (header, ["---"] * len(header)):
        print("| " + " | ".join(cells) + " |")
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else v for v in astuple(row)) + " |")
    for path in write(rows, options.out):
        print(path)


if __name__ == "__main__":
    main()
