"""Ways in which torch can multiply tiles of activations on a CPU: the comparison behind the eager backend's choices.

    python -m bench.experiments.products [--channels 64 128] [--group-size 64] [--positions 1024] [--samples 16]

GFLOP/s of every way to form the Gram matrix of a tile, and to mix its channels with a (d, d) matrix per group, float32,
one CPU. Quoted in normkernels/eager/tiles.py, moments/eager.py and whiten/eager.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

from bench.measure.timing import settle_allocator

ROUNDS = 25


def candidates(x: Tensor, d: int) -> dict[str, Callable[[], object]]:
    """Return the ways to multiply x (n, C, l).

    Each candidate starts from the layout it wants; only the product is timed.
    """
    n, c, positions = x.shape
    g = c // d
    matrix = torch.randn(g, d, d)
    kernel = matrix.view(c, d, 1, 1)
    image = x.unsqueeze(2)
    last = image.contiguous(memory_format=torch.channels_last)
    rows = x.transpose(0, 1).reshape(g, d, -1)
    pixels = last.permute(0, 2, 3, 1).reshape(-1, c)
    linear = torch.ops.mkldnn._linear_pointwise
    found: dict[str, Callable[[], object]] = {
        "Gram, NCHW: conv2d_weight": lambda: conv2d_weight(image, kernel.shape, image, groups=g),
        "Gram, NCHW: rows, BLAS": lambda: torch.bmm(rows, rows.mT),
        "Gram, NCHW: rows, oneDNN linear": lambda: [linear(r, r, None, "none", [], "") for r in rows],
        "Gram, channels_last: conv2d_weight": lambda: conv2d_weight(last, kernel.shape, last, groups=g),
        "mix, NCHW: conv1x1": lambda: conv2d(image, kernel, groups=g),
        "mix, NCHW: BLAS per sample": lambda: torch.matmul(matrix, x.view(n, g, d, positions)),
        "mix, channels_last: conv1x1": lambda: conv2d(last, kernel, groups=g),
    }
    if g == 1:
        found["mix, NCHW: conv of height d"] = lambda: conv2d(x.unsqueeze(1), matrix.view(d, 1, d, 1))
        found["Gram, channels_last: BLAS"] = lambda: pixels.t() @ pixels
        found["mix, channels_last: BLAS"] = lambda: pixels @ matrix[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--group-size", type=int, default=None, help="default: one group")
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    settle_allocator()  # otherwise every result is made of pages to fault in, and that is what would be measured
    for c in options.channels:
        x = torch.randn(options.samples, c, options.positions)
        d = options.group_size or c
        found = candidates(x, d)
        times: dict[str, list[float]] = {name: [] for name in found}
        for run in found.values():
            run()
        for _ in range(ROUNDS):
            for name, run in found.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        flops = 2 * x.numel() * d
        print(f"\nC={c} d={d} l={options.positions} n={options.samples}, {torch.get_num_threads()} threads")
        for name, seconds in times.items():
            print(f"  {name:36s} {flops / median(seconds) / 1e9:5.0f} GFLOP/s")


if __name__ == "__main__":
    main()
