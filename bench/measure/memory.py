"""Memory of one training step: the bytes that it keeps for its backward pass, and its peak.

Kept: the distinct storages that autograd saves, parameters left out, the input included (it has to stay
alive).
Peak: on CUDA the allocator's own maximum; on a CPU the high-water mark of the resident set of a fresh
process, which counts scratch memory of the libraries too.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.measure.comparison import Comparison
from bench.measure.workload import make_gradient, make_input


@dataclass(frozen=True)
class MemoryUse:
    """Bytes beyond the input and the output gradient, except `saved`, which includes the input."""

    saved: int
    peak: int
    input: int


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes of the distinct storages that a forward pass keeps for the backward pass, without parameters."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    # the saved tensors stay referenced until the end: a freed storage could give its address to the next one
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    total = sum(storages.values())
    del y
    return total


def high_water_mark() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_high_water_mark() -> None:
    """Lower the mark to what the process holds now. Only Linux allows it; elsewhere that of making the input stays."""
    clear = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError):
        if clear.exists():
            clear.write_text("5")


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Run forward and backward, or forward alone for an input without a gradient."""
    if x.requires_grad:
        layer(x).backward(dy)
    else:
        with torch.inference_mode():
            layer(x)


def peak_of_step(comparison: Comparison, provider: str) -> int:
    """Measure the peak bytes of one forward and backward pass beyond what was held before it."""
    work = comparison.work
    layer = comparison.provider(provider).build(work).to(work.device)
    differentiate = work.mode != "inference"
    x, dy = make_input(work, 0).requires_grad_(differentiate), make_gradient(work, 0)
    # libraries and thread pools start on a two-sample batch, so that the step itself is all that is counted
    step(layer, x.detach()[:2].clone().requires_grad_(differentiate), dy[:2].clone())
    for parameter in layer.parameters():
        parameter.grad = None
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, x, dy)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset_high_water_mark()
    before = high_water_mark()
    step(layer, x, dy)
    return high_water_mark() - before
