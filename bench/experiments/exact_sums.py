"""The cost of a kernel's spectrum without float64: operators for a chunk of channels, time on one core of a CPU.

python -m bench.experiments.exact_sums
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normkernels.primitives.kernel_spectrum import eager

SIZE = (34, 34)


class Count(TorchDispatchMode):
    """Counts operators that compute: views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **kwargs or {})


def measure(call: Callable[[], Tensor]) -> tuple[int, float]:
    call()  # the first call makes tables
    start = time.process_time()
    call()
    seconds = time.process_time() - start
    with Count() as count:
        call()
    return count.operators, seconds


def main() -> None:
    torch.set_num_threads(1)
    print(f"3 x 3 kernels on planes of {SIZE}, without | with float64: operators for a chunk, CPU time in ms")
    for channels in (64, 256, 512):
        weight = torch.randn(channels, channels, 3, 3)
        grad = torch.randn(channels, *SIZE)
        chunks = len(list(eager.chunks(weight, SIZE)))
        calls = {
            "forward": partial(eager.kernel_spectrum, weight, SIZE, 1e-8, [1, 1]),
            "backward": partial(eager.kernel_spectrum_backward, grad, weight, 1e-8, [1, 1]),
        }
        for name, call in calls.items():
            row = []
            for value in ("1", "0"):
                os.environ["NORMKERNELS_NO_FLOAT64"] = value
                operators, seconds = measure(call)
                row.append(f"{operators / chunks:5.0f} {1e3 * seconds:7.1f}")
            print(f"{channels:4} channels, {name:8} {' | '.join(row)}")


if __name__ == "__main__":
    main()
