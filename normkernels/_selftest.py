"""Self-test of ``python -m normkernels.info``: every op against the equations of its record, evaluated in float64.

It needs neither the eager kernels nor the test suite, so that every installation can check itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels.dispatch import choose
from normkernels.dispatch.record import OPS, Op

SHAPE, GROUP_SIZE = (2, 8, 2, 34), 4  # few samples, for a narrow tolerance; 34 is twice a prime, hard to transform


def activations(device: torch.device) -> Tensor:
    """Return correlated channels with a mean, in float32."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(SHAPE[1]) + 0.2 * torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    return (torch.einsum("ij,njhw->nihw", mix, torch.randn(SHAPE, generator=generator)) + 2).to(device)


def run(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row for each op and backend usable here: its error relative to float64, and the tolerance."""
    x = activations(device)
    for backend in choose.BACKENDS:
        if choose.availability(backend)[0]:
            with choose.use_backend(backend):
                for op in OPS.values():
                    row = {"op": op.name, "device": device.type, "backend": backend, "passed": False}
                    yield row | _outcome(op, x)


def _outcome(op: Op, x: Tensor) -> dict[str, Any]:
    """Return what the worst of an op's samples gave."""
    try:
        worst = max((compare(op, sample) for sample in op.samples(x, GROUP_SIZE)), key=lambda pair: pair[0] / pair[1])
    except Exception as failure:  # an op that dies must not hide what the others do
        return {"message": f"{type(failure).__name__}: {failure}"}
    error, tolerance = worst
    return {"passed": error <= tolerance, "error": error, "tolerance": tolerance}


def compare(op: Op, arguments: Sequence[Any]) -> tuple[float, float]:
    """Return the error of an op relative to its reference, and the tolerance. Call it once: the op may change these."""
    expected = op.reference(*exact(arguments))
    tolerance = op.tolerance(*arguments)
    result = op.raw(*arguments)
    changed = (value for value, changes in zip(arguments, op.changes, strict=True) if changes)
    got = [*flat(result), *(tensor for value in changed for tensor in flat(value))]
    return max(_error(g, e) for g, e in zip(got, expected, strict=True) if e is not None and e.numel()), tolerance


def exact(value: Any) -> Any:
    """Return arguments with their tensors in float64 on the CPU, as copies."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().clone()
    return [exact(each) for each in value] if isinstance(value, list | tuple) else value


def flat(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else value


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"result: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not got.isfinite().all():  # checked apart: max() would pass over a NaN, and JSON has none
        raise ValueError("result: expected finite numbers, got NaN or infinity")
    largest = float(expected.abs().max())
    return float((got.detach().cpu().double() - expected.detach()).abs().max()) / (largest or 1.0)
