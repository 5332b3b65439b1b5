"""ConvNorm against appendix B of its paper, for everything that nn.Conv1d and nn.Conv2d can be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.layers.conv_norm_checks import (
    AXES,
    DETACH,
    DTYPES,
    NAMES,
    PADDING_MODES,
    PLAIN,
    agree,
    build,
    check,
    parameters,
    plane,
    result,
)
from tests.oracles import convnorm
from tests.oracles.convnorm import Config
from tests.oracles.run import incoming_gradient
from tests.tolerances import largest, unit
from tests.tolerances.spectral import conv_norm_floors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


# Values and gradients, against the oracle.


@AXES
@DTYPES
@DETACH
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_types(axes: int, dtype: torch.dtype, detach: bool, affine: bool) -> None:
    config = Config(padding=1, detach_spectrum=detach)
    layer = build(6, 4, 3, config, axes=axes, dtype=dtype, bias=affine, affine=affine)
    check(layer, plane(3, 6, *(9, 8)[:axes], dtype=dtype), config)


# Odd, prime, twice a prime, a square, a power of two, and unequal sides. With a reach of 2, 32 and 56 are circles of 34
# and 58, as in CIFAR's and ImageNet's networks.
@pytest.mark.parametrize(
    "size",
    [(7, 7), (9, 9), (13, 13), (16, 16), (17, 17), (26, 26), (32, 32), (34, 34), (56, 56), (58, 58), (64, 64), (7, 16),
     (34, 13)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stride", [1, 2])
def test_planes(size: tuple[int, int], stride: int) -> None:
    config = Config(stride=stride, padding=1)
    check(build(3, 4, 3, config), plane(2, 3, *size), config)


@pytest.mark.parametrize("length", [7, 9, 13, 16, 17, 26, 34, 58, 64])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_lengths(length: int, kernel: int) -> None:
    config = Config(stride=2, padding=1, detach_spectrum=False)
    check(build(3, 4, kernel, config, axes=1, dtype=torch.float64), plane(2, 3, length, dtype=torch.float64), config)


# One tap, even, the usual one, rectangular both ways, larger.
KERNELS = [1, 2, 3, (3, 5), (4, 1), 5]
# None, the usual one, more than any kernel's reach, one per axis, and torch's words.
PADDINGS: list[Any] = [0, 1, 6, (1, 2), "same", "valid"]


def allowed(paddings: list[Any], strides: list[Any]) -> Any:
    """Mark every pair but 'same' with a stride, which is refused: test_same_needs_stride_1."""
    pairs = [(p, s) for p in paddings for s in strides if p != "same" or s == 1]
    return pytest.mark.parametrize(("padding", "stride"), pairs, ids=str)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@allowed(PADDINGS, [1, 2, (2, 1), 3])
def test_kernel_padding_stride(kernel: int | tuple[int, int], padding: Any, stride: int | tuple[int, int]) -> None:
    config = Config(stride=stride, padding=padding, detach_spectrum=False)
    check(build(2, 3, kernel, config, dtype=torch.float64), plane(2, 2, 9, 8, dtype=torch.float64), config)


@pytest.mark.parametrize("kernel", [2, 3, (3, 5)], ids=str)
@pytest.mark.parametrize("dilation", [2, (1, 2), (3, 1)], ids=str)
@allowed(PADDINGS, [1, (2, 1)])
def test_dilation(kernel: Any, dilation: Any, padding: Any, stride: Any) -> None:
    config = Config(stride=stride, padding=padding, dilation=dilation, detach_spectrum=False)
    check(build(2, 3, kernel, config, dtype=torch.float64), plane(2, 2, 11, 10, dtype=torch.float64), config)


# Plain, two groups, depthwise, and depthwise with two outputs per input.
@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(6, 4, 1), (6, 4, 2), (6, 6, 6), (3, 6, 3)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@DETACH
def test_groups(c_in: int, c_out: int, groups: int, stride: int, detach: bool) -> None:
    config = Config(stride=stride, padding=1, groups=groups, detach_spectrum=detach)
    check(build(c_in, c_out, 3, config), plane(2, c_in, 9, 8), config)


@AXES
@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@allowed([0, 1, 3, "same"], [1, 2])
def test_padding_modes(axes: int, mode: str, kernel: int, dilation: int, padding: Any, stride: int) -> None:
    """The plane is padded in that mode, then treated as one without padding: its circle still ends in zeros."""
    config = Config(stride, padding, dilation, padding_mode=mode, detach_spectrum=False)
    layer = build(2, 3, kernel, config, axes=axes, dtype=torch.float64)
    check(layer, plane(2, 2, *(9, 8)[:axes], dtype=torch.float64), config)


# The default, none to speak of, and one that flattens the spectrum.
@pytest.mark.parametrize("eps", [1e-8, 1e-12, 1.0])
@DETACH
def test_eps(eps: float, detach: bool) -> None:
    config = Config(padding=1, eps=eps, detach_spectrum=detach)
    check(build(3, 4, 3, config, dtype=torch.float64), plane(2, 3, 9, 8, dtype=torch.float64), config)


@AXES
@DETACH
def test_gradcheck(axes: int, detach: bool) -> None:
    """Gradients are right numerically, and the second derivatives that a gradient penalty needs.

    With detach_spectrum the weight is left out, as its gradient is not that of y.
    """
    config = Config(stride=2, padding=1, eps=1e-3, detach_spectrum=detach)
    layer = build(2, 2, 2, config, axes=axes, dtype=torch.float64)
    x = plane(1, 2, *(4, 3)[:axes], dtype=torch.float64).requires_grad_()
    names = [n for n in NAMES if not (detach and n == "weight")]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    leaves = (x, *(getattr(layer, n) for n in names))
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


# Properties that the paper states.


@AXES
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_layer_is_the_matrix_of_equation_8(axes: int, eps: float) -> None:
    """With all of the padding kept, y = Q x on a circle of n + R, where cross-correlation flips the kernel (B.2)."""
    config = Config(padding=2, eps=eps)
    layer = build(2, 3, 3, config, axes=axes, dtype=torch.float64, bias=False, affine=False)
    size, circle = (4, 3)[:axes], (6, 5)[:axes]
    x = plane(2, 2, *size, dtype=torch.float64)
    on_circle = convnorm.pad(x, [(0, 2)] * axes)
    weight = layer.weight.detach()
    planes = convnorm.embed(weight.flip(convnorm.spatial(weight)), circle)
    y = layer(x).detach()
    for k, e in enumerate(convnorm.mean_power(weight).flatten().tolist()):
        a_k = convnorm.channel_matrix(planes[k])
        q_k = convnorm.preconditioner(a_k, eps, e) @ a_k
        expected = (on_circle.flatten(1) @ q_k.T).view(2, *circle)
        agree(y[:, k], expected, layer, x, config)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [(5, 5), (4, 7)], ids=str)
def test_tight_frame_and_proposition_3_1(size: tuple[int, int], groups: int) -> None:
    """Q_k Q_k^T = I: p / (p + eps E) with the layer's eps, so 1 - eps E v^2; and |Q|_2 <= sqrt(sum_k |Q_k|_2^2)."""
    eps = 1e-8
    weight = build(4, 4, 3, Config(groups=groups), dtype=torch.float64).weight.detach()
    v = nk.ops.kernel_spectrum(weight, size, eps)
    n = v[0].numel()
    impulses = torch.eye(n, dtype=torch.float64).view(n, 1, *size).expand(n, 4, *size)
    columns = nk.ops.spectral_filter(impulses, v)  # (n, C_O, *size): P_k's columns
    planes = convnorm.embed(convnorm.channels(weight, groups), size)
    q = []
    for k in range(4):
        q.append(columns[:, k].flatten(1).T @ convnorm.channel_matrix(planes[k]))
        frame = q[k] @ q[k].T
        excess = eps * weight[k].square().sum() * v[k].square().max()
        rounding = n * unit(torch.float64) * (4 + planes[k].numel() ** 0.5) * (largest(v[k]) ** 2 * largest(v[k] ** -2))
        assert largest(frame - torch.eye(n)) <= excess + rounding
        singular = torch.linalg.svdvals(q[k])
        assert singular[0] / singular[n - 1] <= 1 + excess + 2 * rounding  # the condition number of Figure 2
    norm = torch.linalg.matrix_norm(torch.cat(q), 2).item()
    bound = sum(torch.linalg.matrix_norm(q_k, 2).item() ** 2 for q_k in q) ** 0.5
    assert 1 - excess - rounding <= norm <= bound * (1 + rounding)
    assert bound <= 2 * (1 + rounding)  # sqrt(C_O): every |Q_k| is 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_no_channel_gains_energy(padding: int, stride: int) -> None:
    """|Q_k|_2 <= 1, and cropping and stride leave parts away."""
    layer = build(3, 5, 3, Config(stride, padding), bias=False, affine=False)
    x = plane(4, 3, 13, 13)
    energy, of_y = x.square().sum((1, 2, 3)), layer(x).square().sum((2, 3))
    floor = 1e3 * unit(torch.float32)  # for a sum of 13 x 13 x 3 squares, and y's own floor
    assert (of_y <= energy[:, None] * (1 + floor)).all()


@pytest.mark.parametrize("scale", [1e-23, 1e12])
@DETACH
def test_scale_invariance(scale: float, detach: bool) -> None:
    """y does not depend on the weight's scale, and its gradient is divided by it."""
    config = Config(padding=1, detach_spectrum=detach)
    layer, x = build(3, 4, 3, config, bias=False), plane(2, 3, 9, 8)
    expected = layer(x)
    with torch.no_grad():
        layer.weight *= scale
    check(layer, x, config)
    agree(layer(x), expected, layer, x, config)


def test_gradient_is_orthogonal_to_the_weight() -> None:
    """y(s w) = y(w) for every channel's s, so <w_k, dL/dw_k> = 0; the stopped gradient is not orthogonal."""
    cosines = {}
    for detach in (True, False):
        config = Config(stride=2, padding=1, detach_spectrum=detach)
        layer, x = build(3, 4, 3, config, dtype=torch.float64), plane(2, 3, 9, 8, dtype=torch.float64)
        dy = incoming_gradient(layer(x))
        grad = result(layer, x, dy)[2]
        w = layer.weight.detach()
        assert grad is not None
        cosines[detach] = (w * grad).flatten(1).sum(1).abs() / (w.flatten(1).norm(dim=1) * grad.flatten(1).norm(dim=1))
        floors = conv_norm_floors(x, parameters(layer), config, dy, layer(x))
        allowed = w[0].numel() ** 0.5 * floors.dweight / grad.flatten(1).norm(dim=1)
    assert (cosines[False] <= allowed).all() and (cosines[True] > 1e4 * allowed).all()


def test_stopped_gradient_is_that_of_a_constant_spectrum() -> None:
    """Algorithm 1: detach_spectrum does not change y, only where the gradient goes."""
    x, layers = plane(2, 3, 9, 8), [build(3, 4, 3, Config(padding=1, detach_spectrum=d)) for d in (True, False)]
    dy = incoming_gradient(layers[0](x))
    stopped, full = (result(layer, x, dy) for layer in layers)
    assert torch.equal(stopped[0], full[0]) and not torch.allclose(stopped[2], full[2])


SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


@DTYPES
@DETACH
def test_spectral_zero_and_zero_filter(dtype: torch.dtype, detach: bool) -> None:
    """The results are finite; the peer, ConvNorm, has NaN for a Sobel kernel and for a filter of zeros."""
    config = Config(padding=1, detach_spectrum=detach)
    layer = build(1, 3, 3, config, dtype=dtype)
    with torch.no_grad():
        layer.weight[0] = SOBEL
        layer.weight[1] = 0
    x = plane(2, 1, 9, 8, dtype=dtype)
    # At frequency 0, v is 2900: with dL/dy = 1 the gradient of the weight would pass float16's 65504 by itself.
    values = result(layer, x, torch.full((2, 3, 9, 8), 0.01, dtype=dtype))
    assert all(t is not None and t.isfinite().all() for t in values)
    assert torch.equal(values[0][:, 1], layer.bias.detach()[1].expand(2, 9, 8))
    if dtype in (torch.float64, torch.float32):
        check(layer, x, config)


# Inputs and options at which the published implementation of ConvNorm (the peer) is wrong or fails.


@AXES
def test_bias_comes_last(axes: int) -> None:
    """A bias is neither filtered nor convolved with the affine kernel.

    The peer, ConvNorm, adds it before normalization.
    """
    layer = build(3, 4, 3, Config(padding=1), axes=axes, dtype=torch.float64)
    x = plane(2, 3, *(9, 8)[:axes], dtype=torch.float64)
    with_bias, bias = layer(x), layer.bias.detach().clone()
    with torch.no_grad():
        layer.bias.zero_()
    agree(with_bias, layer(x) + bias.view(-1, *[1] * axes), layer, x, Config(padding=1))


def test_affine_starts_as_the_identity() -> None:
    """The affine kernel is r_k of section 3.3, odd, even and rectangular: y is what it is without."""
    for kernel in (1, 2, 3, (3, 5), (4, 2)):
        torch.manual_seed(0)
        layer: Any = nk.ConvNorm2d(3, 4, kernel)
        torch.manual_seed(0)
        bare: Any = nk.ConvNorm2d(3, 4, kernel, affine=False)
        expected = torch.zeros_like(layer.affine_weight)
        expected[:, :, (layer.kernel_size[0] - 1) // 2, (layer.kernel_size[1] - 1) // 2] = 1
        assert torch.equal(layer.affine_weight, expected) and torch.equal(layer.weight, bare.weight)
        x = plane(2, 3, 9, 8)
        agree(layer(x), bare(x), layer, x, PLAIN)


def test_evaluation_before_training() -> None:
    """Evaluation gives what training gives; the peer, ConvNorm, gives zeros."""
    layer, x = build(3, 4, 3, Config(padding=1)), plane(2, 3, 9, 8)
    assert torch.equal(layer.eval()(x), layer.train()(x))


@pytest.mark.parametrize("training", [True, False])
def test_any_resolution(training: bool) -> None:
    """A layer takes any plane after any other.

    The peer, ConvNorm, has a buffer shaped like the feature map, so another resolution raises; and so does loading.
    """
    config = Config(padding=1)
    layer = build(3, 4, 3, config).train(training)
    other = nk.ConvNorm2d(3, 4, 3, padding=1).train(training)
    other(plane(1, 3, 5, 5))
    other.load_state_dict(layer.state_dict())
    for size in ((9, 8), (16, 7), (9, 8), (3, 3)):
        x = plane(2, 3, *size)
        y = layer(x)
        check(layer, x, config)
        assert torch.equal(other(x), y)
        assert not list(layer.buffers()) and list(layer.state_dict()) == list(NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_types(dtype: torch.dtype) -> None:
    """Half types work, also in a layer that was cast after it was built. The peer, ConvNorm, raises.

    x is of a size that a half type can hold.
    """
    config = Config(stride=2, padding=1)
    layer = build(16, 8, 3, config).to(dtype)
    check(layer, 30 * plane(2, 16, 13, 13, dtype=dtype), config)
