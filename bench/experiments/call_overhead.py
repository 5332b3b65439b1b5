"""The time that a call costs the host on its way to the GPU, by backend, measured without a GPU.

    TRITON_INTERPRET=0 python -m bench.experiments.call_overhead

The CUDA backend is its SIMT build (tests/simt) with launches that return at once: all of its host code, but its ops are
called through Python here, which costs it some 10 us that it does not need on a GPU. The Triton backend runs with a
driver that has no GPU: all of its and Triton's host code, with launchers that do nothing. Both lack the two to three
microseconds that the driver itself takes for a launch. On a GPU `make gpu-check` measures both with everything.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import normkernels as nk
from normkernels.dispatch import choose
from normkernels.triton import configs, support
from tests.simt import build

ROUNDS, CALLS = 40, 25


def training_step() -> Callable[[], None]:
    layer = nk.IterNorm2d(64)
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    grad = torch.randn(2, 64, 8, 8)

    def step() -> None:
        layer(x).backward(grad)
        layer.zero_grad()
        x.grad = None

    return step


def inference() -> Callable[[], None]:
    layer = nk.IterNorm2d(64).eval()
    x = torch.randn(2, 64, 8, 8)

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step


def microseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def on_cuda(call: Callable[[], None]) -> float:
    with nk.use_backend("cuda"):
        return microseconds(call)


# The part of Triton's driver that a launch uses.
NO_GPU = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=lambda source, metadata: lambda *arguments: None,
    utils=SimpleNamespace(
        load_binary=lambda *arguments: (None, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    ),
)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: configs.Config, meta: dict[str, Any]
) -> None:
    kernel[grid](*arguments, **meta, num_warps=config.warps, num_stages=config.stages)


def on_triton(call: Callable[[], None]) -> float:
    with on_cpu_tensors("triton"), support.recording(90, launch):
        call()  # a first call, because entering `recording` clears the table of configurations
        return microseconds(call)


@contextmanager
def on_cpu_tensors(backend: str) -> Any:
    """Choose a backend as use_backend does, without asking whether it can run here."""
    choose._choose(backend)
    try:
        yield
    finally:
        choose._choose("auto")


def main() -> None:
    os.environ["NORMKERNELS_SIMT_RUN"] = "0"
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NO_GPU)
    build.install(build.build())
    print("| IterNorm2d(64), (2, 64, 8, 8) | cuda, us | triton, us | ratio |\n|---|---|---|---|")
    for name, make in (("forward + backward", training_step), ("evaluation", inference)):
        call = make()
        rounds = [(on_cuda(call), on_triton(call)) for _ in range(ROUNDS)][2:]  # interleaved
        ours, theirs = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {statistics.median(a / b for a, b in rounds):.2f} |")


if __name__ == "__main__":
    main()
