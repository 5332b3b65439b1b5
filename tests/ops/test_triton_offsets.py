"""Offsets of the Triton kernels that 32 bits do not hold, though every index and every stride does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import choose
from tests.oracles import inputs

pytest.importorskip("triton")

import triton
import triton.language as tl

from normkernels.triton.launch import Split
from normkernels.triton.tiles import bounds, count_of
from tests.ops.test_spectral_kernels import values as planes
from tests.ops.test_triton_diagonal import step as pop_norm
from tests.ops.triton_calls import DEVICE, ON_GPU, gaussian
from tests.ops.triton_calls import step as whitened

pytestmark = pytest.mark.skipif(
    not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1"
)  # fmt: skip

# A stride beyond 32 bits makes the product with it one of 64 bits. Of the others only the products are beyond.
FAR: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "stride": ((2, 8, 15), (2**31, 15, 1)),
    "samples": ((3, 8, 15), (2**30, 15, 1)),
    "positions": ((4, 8, 3), (8, 1, 2**30)),
    "channels": ((15, 3), (1, 2**30)),
}


def apart(values: Tensor, strides: tuple[int, ...], folder: Path) -> Tensor:
    """Return the same values with these strides, in memory of which nothing else is touched.

    On a CPU it is the memory of a sparse file, and the values lie in the middle of it, so that an offset that has lost
    its upper bits finds other numbers and not the end.
    """
    last = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    if ON_GPU:
        memory, first = torch.empty(last + 1, dtype=values.dtype, device=DEVICE), 0
    else:
        first = 2**31
        memory = torch.from_file(str(folder / "memory"), shared=True, size=first + last + 1, dtype=values.dtype)
        (folder / "memory").unlink()
    return memory.as_strided(values.shape, strides, first).copy_(values)


@pytest.mark.parametrize("case", FAR)
def test_offsets_of_groups(case: str, tmp_path: Path) -> None:
    shape, strides = FAR[case]
    values = inputs.gaussian(shape, dtype=torch.float16, group_size=shape[1])
    with nk.use_backend("triton"):
        far, near = (
            whitened(x, shape[1], num_iterations=1) for x in (apart(values, strides, tmp_path), values.to(DEVICE))
        )
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize("case", FAR)
def test_offsets_of_single_channels(case: str, tmp_path: Path) -> None:
    shape, strides = FAR[case]
    values = inputs.gaussian(shape, dtype=torch.float16, group_size=1)
    with nk.use_backend("triton"):
        far, near = (pop_norm(x) for x in (apart(values, strides, tmp_path), values.to(DEVICE)))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_offsets_of_factors(tmp_path: Path) -> None:
    x = gaussian((15, 3), group_size=1)
    mean, factors = x.mean(0), torch.linspace(0.5, 2, 3).view(3, 1, 1)
    with nk.use_backend("triton"):
        far, near = (nk.ops.whiten(x, mean, W) for W in (apart(factors, (2**30, 1, 1), tmp_path), factors.to(DEVICE)))
    assert torch.equal(far, near)


# Shapes of planes and strides: samples, channels, rows and columns that are 2^30 elements apart.
PLANES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "samples": ((3, 1, 4, 5), (2**30, 20, 5, 1)),
    "channels": ((1, 3, 4, 5), (60, 2**30, 5, 1)),
    "rows": ((1, 1, 3, 5), (15, 15, 2**30, 1)),
    "columns": ((1, 1, 5, 3), (15, 15, 1, 2**30)),
}


@pytest.mark.parametrize("case", PLANES)
def test_offsets_of_planes(case: str, tmp_path: Path) -> None:
    shape, strides = PLANES[case]
    z, v, dy = planes(shape, torch.float16), planes(shape[1:]), planes(shape, torch.float16, seed=1)
    with nk.use_backend("triton"):
        near = filtered(z.to(DEVICE), v, dy.to(DEVICE))
        far = filtered(apart(z, strides, tmp_path), v, apart(dy, strides, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def filtered(z: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and the gradient of v."""
    v = v.to(DEVICE).requires_grad_()
    y = nk.ops.spectral_filter(z, v)
    return y.detach(), torch.autograd.grad(y, v, dy)[0]


# Operand, its shape, and strides of which one is 2^30.
SMALL: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "rows of W": ("W", (1, 3, 3), (9, 2**30, 1)),
    "columns of W": ("W", (1, 3, 3), (9, 1, 2**30)),
    "rows of v": ("v", (1, 4, 5), (20, 2**30, 1)),
    "input channels of a weight": ("weight", (1, 3, 3, 2), (18, 2**30, 2, 1)),
    "columns of a weight": ("weight", (1, 3, 3, 3), (27, 9, 1, 2**30)),
}


@pytest.mark.parametrize("case", SMALL)
def test_offsets_of_small_operands(case: str, tmp_path: Path) -> None:
    """Kernels compute these offsets in 32 bits, and get a compact copy where 32 bits would not do."""
    name, shape, strides = SMALL[case]
    values = planes(shape)
    x = {"W": planes((2, 3, 4, 5)), "v": planes((2, 1, 4, 5)), "weight": values}[name].to(DEVICE)
    call = {
        "W": lambda W: nk.ops.whiten(x, torch.zeros(3, device=DEVICE), W),
        "v": lambda v: nk.ops.spectral_filter(x, v),
        "weight": lambda weight: nk.ops.kernel_spectrum(weight, (5, 6)),
    }[name]
    with nk.use_backend("triton"):
        assert torch.equal(call(apart(values, strides, tmp_path)), call(values.to(DEVICE)))


@triton.jit(do_not_specialize=["columns"])
def cut_kernel(out, cut, columns, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    start, stop = bounds(part, cut.chunk, columns, WIDE, 1)
    tl.store(out + 3 * part, start)
    tl.store(out + 3 * part + 1, stop)
    tl.store(out + 3 * part + 2, count_of(part, cut, columns))


def test_columns_of_parts_in_64_bits() -> None:
    """The last part begins at 2^31. Only the helpers run: with data the interpreter would take days."""
    chunk, columns = 2**30, 2**31 + 7
    found = torch.zeros(3, 3, dtype=torch.int64, device=DEVICE)
    cut_kernel[(3,)](found, Split(3, chunk), columns, WIDE=True)
    assert found.tolist() == [[0, chunk, chunk], [chunk, 2 * chunk, chunk], [2 * chunk, columns, 7]]
