"""torch.fft against the real DFT as products, size by size: the rule of the eager spectral_filter.

    python -m bench.experiments.transforms [--sizes 16 34 58]

Times the whole filter with a crop of one on each side, both ways, interleaved, on about 5 MB of planes.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import normkernels as nk
from bench.measure.timing import settle_allocator
from normkernels.primitives.spectral_filter import eager

SIZES = (7, 9, 16, 18, 32, 34, 58, 64, 66, 98, 114, 128, 130, 194, 226, 256, 258, 514)
CHANNELS, ROUNDS = 16, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    settle_allocator()
    rule = eager.by_products
    print(f"{torch.get_num_threads()} threads, float32; the rule's choice is marked")
    for n in options.sizes:
        samples = max(1, 1024 * 1156 // (n * n) // CHANNELS)
        z, v = torch.randn(samples, CHANNELS, n, n), torch.rand(CHANNELS, n, n)
        kept = (slice(1, n - 1),) * 2
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(ROUNDS + 3):
            for products, seconds in times.items():
                eager.by_products = lambda *_, choice=products: choice
                start = time.perf_counter()
                nk.ops.spectral_filter(z, v, kept)
                if turn >= 3:
                    seconds.append(time.perf_counter() - start)
        eager.by_products = rule
        by_products, by_fft = (median(times[choice]) * 1e3 for choice in (True, False))
        marks = ("*", " ") if rule(z, n, n) else (" ", "*")
        ratio = by_products / by_fft
        print(f"{n:4d}  products {by_products:6.2f} ms{marks[0]}  torch.fft {by_fft:6.2f} ms{marks[1]}  {ratio:.2f}")


if __name__ == "__main__":
    main()
