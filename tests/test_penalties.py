"""OCNN's penalty against the dense matrix of the layer, column by column, over every geometry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkernels.parametrizations import oni
from normkernels.penalties import orthogonality

D = torch.float64
# torch.compile's own warnings, about torch's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


def operator(conv: Any, size: tuple[int, ...]) -> Tensor:
    """Return the layer on a torus as a matrix (C_O * outputs, C_I * inputs), tap by tap; strides divide the sizes."""
    weight, groups = conv.weight.detach(), conv.groups
    c_out, c_in = weight.shape[:2]
    outputs = tuple(n // s for n, s in zip(size, conv.stride, strict=True))
    A = weight.new_zeros(c_out, *outputs, c_in * groups, *size)
    for o in range(c_out):
        for position in torch.cartesian_prod(*map(torch.arange, outputs)).view(-1, len(size)).tolist():
            for tap in torch.cartesian_prod(*map(torch.arange, weight.shape[2:])).view(-1, len(size)).tolist():
                where = [
                    (p * s + t * d) % n
                    for p, s, t, d, n in zip(position, conv.stride, tap, conv.dilation, size, strict=True)
                ]
                for i in range(c_in):
                    A[(o, *position, o // (c_out // groups) * c_in + i, *where)] += weight[(o, i, *tap)]
    return A.flatten(len(size) + 1).flatten(0, len(size))


def dense_penalty(conv: Any, size: tuple[int, ...], *, columns: bool) -> Tensor:
    """Return |A A^T - I|_F^2 or |A^T A - I|_F^2 for one output position, without inputs that are never read."""
    A = operator(conv, size)
    A = A[:, A.abs().sum(0) > 0]
    gram = A.T @ A if columns else A @ A.T
    return (gram - torch.eye(len(gram), dtype=D)).square().sum() / (len(A) // conv.out_channels)


# (layer, torus, columns). The torus holds all lags, 2 k - 1 of the strided kernel's blocks: no two fall together.
GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "rows": (lambda: nn.Conv2d(3, 2, 3, dtype=D), (5, 5), False),
    "columns": (lambda: nn.Conv2d(2, 3, 3, dtype=D), (5, 5), True),
    "square": (lambda: nn.Conv2d(2, 2, 2, dtype=D), (4, 3), False),
    "rectangular kernel": (lambda: nn.Conv2d(2, 2, (1, 4), dtype=D), (2, 7), False),
    "rectangular kernel, columns": (lambda: nn.Conv2d(1, 3, (3, 2), dtype=D), (6, 3), True),
    "stride": (lambda: nn.Conv2d(1, 4, 3, stride=2, dtype=D), (6, 6), False),
    "stride, more outputs than the inputs times stride": (lambda: nn.Conv2d(1, 5, 3, stride=2, dtype=D), (6, 6), True),
    "rectangular stride": (lambda: nn.Conv2d(2, 3, (3, 4), stride=(1, 3), dtype=D), (5, 9), False),
    "stride of the kernel's size": (lambda: nn.Conv2d(1, 5, 2, stride=2, dtype=D), (4, 4), True),
    "stride over the kernel": (lambda: nn.Conv2d(1, 4, (2, 1), stride=(3, 2), dtype=D), (6, 4), True),
    "dilation": (lambda: nn.Conv2d(2, 2, 2, dilation=(2, 3), dtype=D), (5, 7), False),
    "dilation, columns": (lambda: nn.Conv1d(1, 3, 3, dilation=2, dtype=D), (9,), True),
    "dilation and stride, coprime": (lambda: nn.Conv1d(1, 3, 4, stride=2, dilation=3, dtype=D), (22,), True),
    "dilation and stride, equal": (lambda: nn.Conv1d(1, 3, 3, stride=2, dilation=2, dtype=D), (10,), True),
    "dilation and stride, common factor": (lambda: nn.Conv1d(2, 3, 3, stride=6, dilation=4, dtype=D), (36,), False),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dtype=D), (5, 5), True),
    "depthwise, strided": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2, dtype=D), (6, 6), False),
    "1d": (lambda: nn.Conv1d(3, 2, 5, dtype=D), (9,), False),
    "3d": (lambda: nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 1, 2), dtype=D), (3, 2, 4), False),
    "1x1": (lambda: nn.Conv2d(4, 3, 1, dtype=D), (2, 2), False),
    "1x1, strided": (lambda: nn.Conv2d(2, 3, 1, stride=2, dtype=D), (4, 4), True),
}


@pytest.mark.parametrize(("make", "size", "columns"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_is_that_of_the_dense_operator(make: Callable[[], nn.Module], size: tuple[int, ...], columns: bool) -> None:
    conv = make()
    torch.testing.assert_close(orthogonality(conv), dense_penalty(conv, size, columns=columns))


@pytest.mark.parametrize("channels", [(2, 3), (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sides_differ_by_a_constant(channels: tuple[int, int], stride: int) -> None:
    """|A A^T - I|^2 - |A^T A - I|^2 = C_O - C_I S, so the choice changes no gradient."""
    conv = nn.Conv2d(*channels, 3, stride=stride, dtype=D)
    size = (5 + stride - 1,) * 2
    rows, columns = (dense_penalty(conv, size, columns=c) for c in (False, True))
    constant = torch.tensor(float(conv.out_channels - conv.in_channels * stride**2), dtype=D)
    torch.testing.assert_close(rows - columns, constant)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 1), ((3, 2), (1, 2)), (3, 2), (4, 3), (2, 3)])
@pytest.mark.parametrize("channels", [(3, 2), (2, 2), (2, 3)])
def test_is_the_papers_equation(kernel: Any, stride: Any, channels: tuple[int, int]) -> None:
    """It is eq. 7 as written, for rows: Conv(K, K, padding = floor((k - 1) / S) S, stride = S) - I_r0."""
    conv = nn.Conv2d(*channels, kernel, stride=stride, dtype=D)
    K, S = conv.weight.detach(), conv.stride
    P = tuple((k - 1) // s * s for k, s in zip(conv.kernel_size, S, strict=True))
    gram = torch.nn.functional.conv2d(K, K, padding=P, stride=S)
    assert gram.shape[2:] == tuple(2 * p // s + 1 for p, s in zip(P, S, strict=True))
    gram[:, :, P[0] // S[0], P[1] // S[1]] -= torch.eye(conv.out_channels, dtype=D)
    read = conv.in_channels * math.prod(min(s, k) for s, k in zip(S, conv.kernel_size, strict=True))
    expected = gram.square().sum() - max(0, conv.out_channels - read)
    torch.testing.assert_close(orthogonality(conv), expected)


def test_off_diagonal_entries_are_those_of_the_gram_matrix() -> None:
    """One pair of overlapping rows has 2 a^2 b^2 for the lags +1 and -1, (a^2 + b^2 - 1)^2 on the diagonal."""
    conv = nn.Conv1d(1, 1, 2, dtype=D)
    a, b = conv.weight.data[0, 0] = torch.tensor([0.5, -0.25], dtype=D)
    expected = 2 * (a * b) ** 2 + (a**2 + b**2 - 1) ** 2
    torch.testing.assert_close(orthogonality(conv), expected)


# Layers that preserve lengths.


def orthogonal_matrix(n: int, d: int) -> Tensor:
    q = torch.linalg.qr(torch.randn(max(n, d), max(n, d), dtype=D))[0]
    return q[:n, :d]


@pytest.mark.parametrize(("n", "d"), [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_zero_for_a_delta_of_an_orthogonal_matrix(n: int, d: int, kernel: int) -> None:
    conv = nn.Conv2d(d, n, kernel, dtype=D)
    with torch.no_grad():
        conv.weight.zero_()[:, :, kernel // 2, kernel // 3] = orthogonal_matrix(n, d)
    assert orthogonality(conv) < 1e-24
    conv.weight.data *= 1.1
    assert orthogonality(conv) > 1e-3


@pytest.mark.parametrize("c_out", [3, 8, 11])
def test_zero_for_orthogonal_patches(c_out: int) -> None:
    """With a stride of the kernel's size patches do not overlap, and an orthogonal matrix of them is orthogonal."""
    conv = nn.Conv2d(2, c_out, 2, stride=2, dtype=D)
    conv.weight.data.copy_(orthogonal_matrix(c_out, 8).view(c_out, 2, 2, 2))
    assert orthogonality(conv) < 1e-24


def test_orthogonal_kernels_are_not_enough() -> None:
    """The point of the paper: rows of the flattened kernel are orthonormal, and those of the convolution are not."""
    conv = nn.Conv2d(4, 4, 3, dtype=D)
    conv.weight.data.copy_(orthogonal_matrix(4, 36).view(4, 4, 3, 3))
    assert orthogonality(conv) > 0.1


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 2), (4, 2), (2, 4)])
def test_descending_it_leads_to_an_isometry(c_in: int, c_out: int) -> None:
    conv = nn.Conv2d(c_in, c_out, 3, bias=False, dtype=D)
    optimizer = torch.optim.LBFGS(conv.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = orthogonality(conv)
        loss.backward()
        return loss

    optimizer.step(closure)
    values = torch.linalg.svdvals(operator(conv, (5, 5)))
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-2)


# Layers and types.


@pytest.mark.parametrize(("n", "d"), [(3, 5), (5, 3)])
def test_linear(n: int, d: int) -> None:
    linear = nn.Linear(d, n, dtype=D)
    W = linear.weight.detach()
    gram = W @ W.T if n <= d else W.T @ W
    torch.testing.assert_close(orthogonality(linear), (gram - torch.eye(3, dtype=D)).square().sum())


def test_transposed_convolution_is_the_adjoint() -> None:
    transposed = nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), groups=2, output_padding=(1, 0), dtype=D)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), groups=2, dtype=D)
    conv.weight = transposed.weight
    assert torch.equal(orthogonality(transposed), orthogonality(conv))


@pytest.mark.parametrize("name", ["rectangular stride", "groups", "dilation and stride, coprime", "1x1"])
def test_gradient(name: str) -> None:
    conv = GEOMETRIES[name][0]()

    def penalty(weight: Tensor) -> Tensor:
        return torch.func.functional_call(Penalty(conv), {"conv.weight": weight}, ())

    weight = conv.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(penalty, weight)
    assert torch.autograd.gradgradcheck(penalty, weight)


class Penalty(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self) -> Tensor:
        return orthogonality(self.conv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    half, single = nn.Conv2d(5, 4, 3, dtype=dtype), nn.Conv2d(5, 4, 3)
    with torch.no_grad():
        half.weight.mul_(100)  # its Gram matrix overflows float16
        single.weight.copy_(half.weight)
    penalty = orthogonality(half)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, orthogonality(single))
    penalty.backward()
    assert half.weight.grad is not None and half.weight.grad.dtype == dtype


def test_autocast_does_not_reach_it() -> None:
    conv = nn.Conv2d(5, 4, 3)
    expected = orthogonality(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality(conv), expected)


def test_device() -> None:
    """OCNN's code calls .cuda(); here the meta device stands for any other than the default one."""
    penalty = orthogonality(nn.Conv2d(5, 4, 3, stride=2, device="meta"))
    assert penalty.device.type == "meta" and penalty.shape == ()


def test_parametrized_layer() -> None:
    conv = oni(nn.Conv2d(6, 4, 1), num_iterations=20)
    penalty = orthogonality(conv)
    assert penalty < 1e-4
    penalty.backward()
    assert conv.parametrizations.weight.original.grad is not None


def test_compiles() -> None:
    conv = nn.Conv2d(4, 3, 3, stride=2, groups=1)
    compiled = torch.compile(lambda: orthogonality(conv), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), orthogonality(conv))


@pytest.mark.parametrize(
    ("conv", "error", "message"),
    [
        (torch.ones(3, 3), TypeError, r"conv: expected an nn.Module, got Tensor"),
        (nn.ReLU(), TypeError, r"conv.weight: expected a tensor of a floating-point type, got NoneType"),
        (nn.Conv2d(2, 3, 1, dtype=torch.complex64), TypeError, r"conv.weight: .*, got torch.complex64"),
        (nn.BatchNorm2d(3), ValueError, r"conv: expected a linear layer or .*, got BatchNorm2d with .* \(3,\)"),
        (nn.Bilinear(2, 3, 4), ValueError, r"conv: expected a linear layer or .*, got Bilinear"),
    ],
)  # fmt: skip
def test_bad_input(conv: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonality(conv)
