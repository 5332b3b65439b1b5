"""torch.onnx.export traces other functions instead of the ops, which compute what the ops do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import export
from tests.oracles import inputs
from tests.tolerances import assert_agree, rounding

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def onnx_ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that calls a public op as torch.onnx.export does."""

    def call(op: Any, *args: Any) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(export, "exporting", lambda: True)
            patched.setattr(torch.ops.normkernels, op.__name__, None)  # it must not be called
            result: Tensor = op(*args)
        return result

    return call


def check(got: Tensor, expected: Tensor) -> None:
    """Check a result. Half types are rounded at the end and nowhere else."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        assert (got.double() - expected.double()).abs().max() <= rounding(expected.double(), expected.dtype)
    else:
        assert_agree(got, expected)


@DTYPES
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("d", [1, 4, 8])
@pytest.mark.parametrize("layout", ["NC", "NLC", "NCHW", "NHWC", "NDHWC"])
def test_whiten(onnx_ops: Any, layout: str, d: int, affine: bool, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype, group_size=4))
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    W = torch.randn(8 // d, d, d, dtype=stat)
    weight, bias = (torch.linspace(-1, 2, 8, dtype=dtype) if affine else None for _ in range(2))
    given = (x, torch.linspace(1, 3, 8, dtype=stat), W, weight, bias)
    check(onnx_ops(nk.ops.whiten, *given), nk.ops.whiten(*given))


@DTYPES
@pytest.mark.parametrize("size", [(6, 7), (5, 4), (3, 2), (1, 1), (17, 34)], ids=str)
def test_spectral_filter(onnx_ops: Any, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Any spectrum is right, also one that is not even, and windows on both sides."""
    h, w = size
    v = torch.rand(8, h, w, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    z = torch.randn(2, 8, h, w, dtype=dtype)
    check(onnx_ops(nk.ops.spectral_filter, z, v), nk.ops.spectral_filter(z, v))
    target, source = [slice(h // 2, h, 2), slice(0, w, 3)], [slice(0, h, 2), slice(w // 3, w, 1)]
    z = z[:, :, : len(range(0, h, 2)), : w - w // 3]
    check(onnx_ops(nk.ops.spectral_filter, z, v, target, source), nk.ops.spectral_filter(z, v, target, source))
    z, v = torch.randn(2, 8, h, dtype=dtype), v[:, :, 0].contiguous()
    check(onnx_ops(nk.ops.spectral_filter, z, v), nk.ops.spectral_filter(z, v))


@DTYPES
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5), (3,)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_kernel_spectrum(onnx_ops: Any, kernel: tuple[int, ...], dilation: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 3, *kernel, dtype=dtype)
    weight[0] = 0  # where v is 1
    size = [12, 9][: len(kernel)]
    given = (weight, size, 1e-3, dilation)
    check(onnx_ops(nk.ops.kernel_spectrum, *given), nk.ops.kernel_spectrum(*given))


def test_a_large_mean(onnx_ops: Any) -> None:
    """x is centred before the product: W x alone would have no digit left of the result."""
    x = inputs.gaussian((6, 8, 5, 3), dtype=torch.float32) + 1e5
    mean, W = x.mean((0, 2, 3)), torch.randn(2, 4, 4)
    expected = nk.ops.whiten(x.double(), mean.double(), W.double()).float()
    assert_agree(onnx_ops(nk.ops.whiten, x, mean, W), expected)


def test_batch_statistics_are_refused(onnx_ops: Any) -> None:
    x = torch.randn(4, 8, 3, 3)
    for op in (nk.ops.iter_norm, nk.ops.pop_norm):
        with pytest.raises(ValueError, match=r"expected .* running statistics, got one that uses the batch's"):
            onnx_ops(op, x)
