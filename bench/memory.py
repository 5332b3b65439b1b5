"""Memory of one training step: the bytes that it keeps for its backward pass, and its peak.

Kept: the distinct storages that autograd saves, parameters left out, the input included (it has to stay
alive).
Peak: on CUDA the allocator's own maximum; on a CPU the high-water mark of the resident set of a fresh
process, which counts scratch memory of the libraries too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import bnp, suites
from bench.environment import ROOT
from bench.suites import Comparison, Settings
from bench.workload import Inputs, make_gradient, make_input, prepare_layer

PROBE_TIMEOUT_S = 300


def comparisons(settings: Settings) -> list[Comparison]:
    return [*suites.memory(settings), *bnp.memory(settings)]


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


def measure_memory(comparison: Comparison, provider: str) -> MemoryUse:
    """Check the provider, count what it saves, measure the peak (on a CPU in a process of its own)."""
    inputs = Inputs(comparison.work)
    call = prepare_layer(comparison.provider(provider), inputs)
    saved = saved_bytes(call.layer, inputs[0].x)
    del call, inputs
    measure = peak_of_step if comparison.work.device.type == "cuda" else probe
    return MemoryUse(saved, measure(comparison, provider), comparison.work.nbytes)


def probe(comparison: Comparison, provider: str) -> int:
    command = [sys.executable, "-m", "bench.memory", "--key", comparison.key, "--provider", provider]
    # glibc keeps freed blocks below a threshold that grows with use; with a fixed one every tensor is given
    # back at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"expected the memory probe of {provider} to succeed, it said: {done.stderr[-500:]}")
    return int(json.loads(done.stdout)["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one step of one provider, as JSON")
    parser.add_argument("--key", required=True, help="key of a comparison of the memory suite")
    parser.add_argument("--provider", required=True)
    arguments = parser.parse_args()
    found = {comparison.key: comparison for comparison in comparisons(Settings())}
    if arguments.key not in found:
        parser.error(f"expected one of {sorted(found)}, got {arguments.key!r}")
    peak = peak_of_step(found[arguments.key], arguments.provider)
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main()
