"""Which of torch's float32 matrix products is fastest for the operand orders of the eager backend.

    python -m bench.experiments.products

The measurement behind `products` in normkernels/ops/_products.py. For a tile of 2**19 elements, C channels in groups of
d: the mix A X and the cross product Y X^T, with positions innermost ("planes") and with channels innermost
("rows"), through the BLAS (torch.bmm), oneDNN's linear layer, and a 1x1 convolution or its weight gradient.
Prints GFLOP/s, median of interleaved rounds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from normkernels.ops import _products

ELEMENTS = 2**19
CASES = ((64, 4), (64, 16), (256, 16), (64, 32), (64, 64), (256, 64), (512, 64), (128, 128), (512, 128), (512, 512))
ROUNDS = 25


def candidates(channels: int, d: int) -> dict[str, Callable[[], object]]:
    """Products that apply, by name; each is checked against float64 first."""
    g, k = channels // d, ELEMENTS // channels
    a = torch.randn(g, d, d)
    planes, rows = torch.randn(g, d, k), torch.randn(k, g, d).permute(1, 2, 0)

    def linear(u: Tensor, v: Tensor) -> Tensor:
        return torch.stack([_products._linear(p, q) for p, q in zip(u, v, strict=True)])

    products: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
        "mix planes bmm": (torch.bmm, a, planes),
        "mix planes linear": (linear, a, planes),
        "mix rows bmm": (torch.bmm, a, rows),
        "mix rows conv": (_products._convolution, a, rows),
        "cross planes bmm": (torch.bmm, planes, planes.mT),
        "cross planes linear": (linear, planes, planes.mT),
        "cross rows bmm": (torch.bmm, rows, rows.mT),
    }
    if g == 1:
        products["cross rows conv"] = (_products._convolution_weight, rows, rows.mT)
    for name, (function, u, v) in products.items():
        exact = u.double() @ v.double()
        error = ((function(u, v) - exact).abs().max() / exact.abs().max()).item()
        if error > 1e-5:
            raise RuntimeError(f"{name}: expected a relative error below 1e-5, got {error:.1e}")
    return {name: functools.partial(function, u, v) for name, (function, u, v) in products.items()}


def main() -> None:
    if not _products._onednn:
        raise SystemExit("expected a CPU with AVX-512 and a torch with oneDNN: elsewhere every product is torch.bmm")
    names = sorted(candidates(64, 64))  # one group has all of them
    table: list[list[str]] = []
    for channels, d in tqdm(CASES, desc="cases", leave=False):
        functions = candidates(channels, d)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(ROUNDS):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        flops = 2 * d * ELEMENTS
        rates = {name: f"{flops / statistics.median(values) / 1e9:.0f}" for name, values in seconds.items()}
        table.append([str(channels), str(d), *(rates.get(name, "-") for name in names)])
    header = ["C", "d", *names]
    for row in (header, ["---"] * len(header), *table):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
