"""Singular values, condition numbers and norms against the dense matrix of a circular convolution; Proposition 3.1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from normkernels.analysis import channel_condition, conv_singular_values, conv_spectrum, layer_spectral_norm

D = torch.float64


def circulant(weight: Tensor, size: tuple[int, ...], groups: int = 1, dilation: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Return the matrix (C_O * positions, C_I * positions), tap by tap, in the direction of nn.Conv2d."""
    c_out, c_in, *kernel = weight.shape
    A = torch.zeros(c_out, *size, c_in * groups, *size, dtype=D)
    for position in torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size)).tolist():
        for tap in torch.cartesian_prod(*map(torch.arange, kernel)).view(-1, len(size)).tolist():
            where = [(p + t * d) % n for p, t, d, n in zip(position, tap, dilation, size, strict=False)]
            for o in range(c_out):
                first = o // (c_out // groups) * c_in
                for i in range(c_in):
                    A[(o, *position, first + i, *where)] += weight[(o, i, *tap)].double()
    return A.flatten(len(size) + 1).flatten(0, len(size))


def filters(spectrum: Tensor) -> Tensor:
    """Return the circular filter of each channel as a block-diagonal matrix."""
    size = spectrum.shape[1:]
    blocks = []
    for s in spectrum:
        deltas = torch.eye(s.numel(), dtype=D).view(-1, *size)
        blocks.append(torch.fft.ifftn(torch.fft.fftn(deltas, s=size) * s, s=size).real.flatten(1).T)
    return torch.block_diag(*blocks)


def power(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.fft.fftn(weight, s=size).abs().square().sum(1)


def convnorm(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return v = (sum |a^|^2)^(-1/2), eq. 6."""
    return power(weight, size).rsqrt()


def descending(values: Tensor) -> Tensor:
    return values.flatten().sort(descending=True).values


GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "wide": ((2, 3, 3, 3), (5, 4), {}),
    "tall, rectangular kernel": ((3, 2, 2, 3), (4, 5), {}),
    "even and odd planes": ((2, 2, 1, 2), (2, 7), {}),
    "as large as the plane": ((1, 2, 3, 4), (3, 4), {}),
    "groups": ((4, 2, 3, 2), (4, 3), {"groups": 2}),
    "depthwise": ((3, 1, 2, 2), (3, 3), {"groups": 3}),
    "dilation": ((2, 2, 2, 3), (4, 5), {"dilation": (3, 2)}),
    "1d": ((2, 3, 3), (7,), {}),
    "1d, dilated": ((2, 3, 3), (8,), {"dilation": (2,)}),
    "3d": ((2, 1, 2, 1, 2), (2, 3, 2), {}),
}
EACH = pytest.mark.parametrize(("shape", "size", "options"), GEOMETRIES.values(), ids=GEOMETRIES.keys())


@EACH
def test_all_singular_values(shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any]) -> None:
    """The singular values are the largest ones of the dense matrix, and the spectral norm is the first of them."""
    weight = torch.randn(shape, dtype=D)
    values = conv_singular_values(weight, size, **options)
    groups = options.get("groups", 1)
    assert values.shape == (*size, groups * min(shape[0] // groups, shape[1])) and values.dtype == D
    expected = torch.linalg.svdvals(circulant(weight, size, groups, options.get("dilation", (1, 1, 1))))
    torch.testing.assert_close(descending(values), expected[: values.numel()])
    torch.testing.assert_close(layer_spectral_norm(weight, size, **options), expected[0])


@EACH
def test_with_a_spectrum(shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any]) -> None:
    """Any real filter after the convolution acts as the real part of the product in the Fourier domain."""
    weight = torch.randn(shape, dtype=D)
    spectrum = torch.randn(shape[0], *size, dtype=D)
    matrix = circulant(weight, size, options.get("groups", 1), options.get("dilation", (1, 1, 1)))
    expected = torch.linalg.svdvals(filters(spectrum) @ matrix)
    values = conv_singular_values(weight, size, spectrum=spectrum, **options)
    torch.testing.assert_close(descending(values), expected[: values.numel()])
    torch.testing.assert_close(layer_spectral_norm(weight, size, spectrum=spectrum, **options), expected[0])


@EACH
def test_channel_condition(shape: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any]) -> None:
    """The condition number is that of the rows of the dense matrix that belong to a channel."""
    weight = torch.randn(shape, dtype=D)
    dilation = options.get("dilation", (1, 1, 1))
    matrix = circulant(weight, size, options.get("groups", 1), dilation).unflatten(0, (shape[0], -1))
    values = torch.linalg.svdvals(matrix)
    got = channel_condition(weight, size, dilation=dilation[: len(size)])
    torch.testing.assert_close(got, values[:, 0] / values[:, -1])

    spectrum = torch.rand(shape[0], *size, dtype=D) + 0.5
    blocks = [filters(s[None]) @ block for s, block in zip(spectrum, matrix, strict=True)]
    values = torch.linalg.svdvals(torch.stack(blocks))
    got = channel_condition(weight, size, dilation=dilation[: len(size)], spectrum=spectrum)
    torch.testing.assert_close(got, values[:, 0] / values[:, -1])


def test_frequencies_are_where_fft2_has_them() -> None:
    weight = torch.randn(3, 2, 3, 2, dtype=D)
    expected = torch.linalg.svdvals(torch.fft.fft2(weight, s=(5, 6)).permute(2, 3, 0, 1))
    torch.testing.assert_close(conv_singular_values(weight, (5, 6)), expected)
    torch.testing.assert_close(conv_singular_values(weight, 5), conv_singular_values(weight, (5, 5)))


def test_groups_follow_each_other() -> None:
    weight = torch.randn(4, 2, 3, 3, dtype=D)
    weight[2:] *= 100
    both = conv_singular_values(weight, 5, groups=2)
    parts = [conv_singular_values(w, 5) for w in weight.chunk(2)]
    torch.testing.assert_close(both, torch.cat(parts, 2))


@pytest.mark.parametrize("size", [7, 9, 11, 16, 22])
def test_chunks_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 2, 3, 3, dtype=D)
    functions = (conv_singular_values, channel_condition, layer_spectral_norm)
    spectrum = torch.rand(3, size, size, dtype=D) + 1
    whole = [f(weight, size, spectrum=spectrum) for f in functions]
    monkeypatch.setattr(conv_spectrum, "CHUNK_BYTES", 5 * 3 * 2 * 16)  # five frequencies
    torch.testing.assert_close([f(weight, size, spectrum=spectrum) for f in functions], whole)


def test_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices are computed in chunks: for 512 x 512 on 32 x 32 they would be 2 GiB at once."""
    largest = 0
    frequencies = conv_spectrum._frequencies

    def watched(*args: Any) -> Any:
        nonlocal largest
        for index, mirror, K in frequencies(*args):
            largest = max(largest, K.numel() * K.element_size())
            yield index, mirror, K

    monkeypatch.setattr(conv_spectrum, "_frequencies", watched)
    monkeypatch.setattr(conv_spectrum, "CHUNK_BYTES", 2**20)
    channel_condition(torch.randn(64, 64, 3, 3), 32)
    assert 2**19 < largest <= 2**20


# The paper's claims.


@pytest.mark.parametrize("size", [(7, 7), (8, 11), (34, 34)])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 8, 5, 2), (5, 1, 3, 3)])
def test_each_channel_becomes_a_tight_frame(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Q_k Q_k^T = I: the condition number becomes 1, where it was not."""
    weight = torch.randn(shape, dtype=D)
    before = channel_condition(weight, size)
    after = channel_condition(weight, size, spectrum=convnorm(weight, size))
    assert before.min() > 1.05
    torch.testing.assert_close(after, torch.ones_like(after))
    for k in range(shape[0]):
        values = conv_singular_values(weight[k : k + 1], size, spectrum=convnorm(weight, size)[k : k + 1])
        torch.testing.assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 8, 5, 2), (16, 16, 3, 3)])
@pytest.mark.parametrize("normalized", [True, False])
def test_proposition_3_1(shape: tuple[int, ...], normalized: bool) -> None:
    """|Q| <= sqrt(sum |Q_k|^2), which for ConvNorm is sqrt(C_O)."""
    weight = torch.randn(shape, dtype=D)
    spectrum = convnorm(weight, (9, 9)) if normalized else torch.ones(shape[0], 9, 9, dtype=D)
    norm = layer_spectral_norm(weight, 9, spectrum=spectrum)
    channels = torch.stack([
        layer_spectral_norm(weight[k : k + 1], 9, spectrum=spectrum[k : k + 1]) for k in range(shape[0])
    ])  # fmt: skip
    bound = channels.square().sum().sqrt()
    assert channels.max() * (1 - 1e-12) <= norm <= bound
    if normalized:
        torch.testing.assert_close(bound, torch.tensor(math.sqrt(shape[0]), dtype=D))
    # Filters that are all the same attain the bound.
    same = weight[:1].expand_as(weight).contiguous()
    torch.testing.assert_close(layer_spectral_norm(same, 9), layer_spectral_norm(same[:1], 9) * math.sqrt(shape[0]))


# Zeros, scales and types.

SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).view(1, 1, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 8, 22])
def test_spectral_zeros(dtype: torch.dtype, size: int) -> None:
    """Exact zeros at frequency 0 are found, and one that rounding hides at a third of a turn: 1 + w + w^2 = 0."""
    assert channel_condition(SOBEL.to(dtype), size).tolist() == [math.inf]
    assert channel_condition(SOBEL.to(dtype), size, spectrum=torch.full((1, size, size), 1e3)).tolist() == [math.inf]
    assert channel_condition(torch.ones(1, 1, 3, 1, dtype=dtype), 9).tolist() == [math.inf]
    assert channel_condition(torch.full((1, 1, 3, 1), 0.1, dtype=dtype), 9).tolist() == [math.inf]
    two = torch.cat([SOBEL, torch.zeros_like(SOBEL)]).to(dtype)  # a zero filter passes nothing at all
    assert channel_condition(two, size).tolist() == [math.inf, math.inf]
    assert layer_spectral_norm(two[1:], size) == 0 and conv_singular_values(two[1:], size).abs().sum() == 0
    nearly = torch.tensor([1.0, -1 + 1e-10], dtype=D).view(1, 1, 2)
    expected = (1 - nearly[0, 0, 1]) / (1 + nearly[0, 0, 1])
    torch.testing.assert_close(channel_condition(nearly, 8), expected.view(1))
    torch.testing.assert_close(channel_condition(nearly * 2.0**-664, 8), expected.view(1))
    one_ulp = torch.tensor([1.0, -1 + 2**-24]).view(1, 1, 2)  # in float32 itself it would be within rounding
    torch.testing.assert_close(channel_condition(one_ulp, 8), torch.tensor([2.0**25 - 1]))


@pytest.mark.parametrize("scale", [1e-23, 1e12, 1e30])
def test_any_scale(scale: float) -> None:
    """Any scale is right: squares of 1e-23 underflow in float32, and a ConvNorm spectrum makes up for the scale."""
    weight = torch.randn(4, 3, 3, 3)
    v = convnorm(weight.double(), (7, 7))
    scaled = (weight * scale, 7)
    torch.testing.assert_close(channel_condition(*scaled), channel_condition(weight, 7), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer_spectral_norm(*scaled) / scale, layer_spectral_norm(weight, 7))
    torch.testing.assert_close(
        layer_spectral_norm(*scaled, spectrum=v / scale), layer_spectral_norm(weight, 7, spectrum=v)
    )
    torch.testing.assert_close(
        conv_singular_values(*scaled, spectrum=v / scale), conv_singular_values(weight, 7, spectrum=v)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=dtype, requires_grad=True)
    for function in (conv_singular_values, channel_condition, layer_spectral_norm):
        got = function(weight, 8)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got.double(), function(weight.double(), 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [conv_singular_values, channel_condition, layer_spectral_norm])
@pytest.mark.parametrize(
    ("weight", "size", "options", "error", "message"),
    [
        ([1.0], 3, {}, TypeError, r"weight: expected a torch.Tensor, got list"),
        (torch.ones(2, 2, 3, 3, dtype=torch.int64), 5, {}, TypeError, r"weight: expected float16.*got torch.int64"),
        (torch.ones(2, 2, 3, dtype=torch.complex64), 5, {}, TypeError, r"weight: .*got torch.complex64"),
        (torch.ones(2, 2), 5, {}, ValueError, r"weight: expected a non-empty shape .*, got \(2, 2\)"),
        (torch.full((2, 2, 3, 3), math.nan), 5, {}, ValueError, r"weight: expected finite values, got 36"),
        (torch.ones(2, 2, 3, 3), (5, 2), {}, ValueError, r"size: expected at least .* \(3, 3\), got \(5, 2\)"),
        (torch.ones(2, 2, 3, 3), 4, {"dilation": 2}, ValueError, r"size: expected at least .* \(5, 5\), got \(4, 4\)"),
        (torch.ones(2, 2, 3, 3), (5, 5, 5), {}, ValueError, r"size: expected an int or 2 .*, got \(5, 5, 5\)"),
        (torch.ones(2, 2, 3, 3), 5.0, {}, TypeError, r"size: expected an int, got 5.0"),
        (torch.ones(2, 2, 3, 3), 5, {"dilation": 0}, ValueError, r"dilation: expected at least 1, got 0"),
        (torch.ones(2, 2, 3, 3), 5, {"spectrum": torch.ones(2, 5, 4)}, ValueError,
         r"spectrum: expected shape \(2, 5, 5\), got \(2, 5, 4\)"),
        (torch.ones(2, 2, 3, 3), 5, {"spectrum": torch.ones(2, 5, 5) * 1j}, TypeError, r"spectrum: .*complex64"),
        (torch.ones(2, 2, 3, 3), 5, {"spectrum": torch.full((2, 5, 5), math.inf)}, ValueError,
         r"spectrum: expected finite values, got 50"),
    ],
)  # fmt: skip
def test_bad_input(
    function: Any, weight: Any, size: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(weight, size, **options)


@pytest.mark.parametrize("function", [conv_singular_values, layer_spectral_norm])
def test_groups_that_do_not_divide(function: Any) -> None:
    with pytest.raises(ValueError, match=r"groups: expected a divisor of the 3 output channels, got 2"):
        function(torch.ones(3, 1, 2, 2), 4, groups=2)
