"""ConvNorm against appendix B of its paper, for everything that nn.Conv1d and nn.Conv2d can be asked for."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import normkernels as nk
from tests.oracles import convnorm, inputs
from tests.oracles.convnorm import Config, padding_of
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_conv_norm, assert_within, conv_norm_floors, largest, unit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

LAYERS: dict[int, Any] = {1: nk.ConvNorm1d, 2: nk.ConvNorm2d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
AXES = pytest.mark.parametrize("axes", [1, 2], ids=["1d", "2d"])
DETACH = pytest.mark.parametrize("detach", [True, False], ids=["detached", "full-gradient"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)
PADDING_MODES = ["reflect", "replicate", "circular"]
NAMES = ("weight", "bias", "affine_weight")
PLAIN = Config()


def plane(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x (N, C_I, *n) with a mean, so that borders and frequency 0 matter."""
    return (torch.randn(shape, dtype=torch.float64, generator=inputs.generator(0)) + 1).to(dtype)


def options(config: Config) -> dict[str, Any]:
    """A Config as the layer's own arguments."""
    return dict(config.__dict__)


def randomized(layer: Any) -> Any:
    """Parameters that are not their initial values: no two taps of the affine kernel alike, a bias of both signs."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            values = torch.randn(p.shape, dtype=torch.float64, generator=inputs.generator(len(name)))
            p.copy_(values + (1 if name == "weight" else 0))
    return layer


def build(
    c_in: int, c_out: int, kernel: int | tuple[int, ...], config: Config = PLAIN, *, axes: int = 2,
    dtype: torch.dtype = torch.float32, bias: bool = True, affine: bool = True,
) -> Any:  # fmt: skip
    layer = LAYERS[axes](c_in, c_out, kernel, bias=bias, affine=affine, dtype=dtype, **options(config))
    return randomized(layer)


def parameters(layer: nn.Module) -> Any:
    return [None if (p := getattr(layer, name)) is None else p.detach() for name in NAMES]


def reference(x: Tensor, given: Any, config: Config, dy: Tensor) -> list[Any]:
    """y and gradients of the oracle for these values and this type."""
    leaves: list[Any] = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *given)]
    y = convnorm.conv_norm(leaves[0], config, *leaves[1:])
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in leaves)]


def result(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Any]:
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(None if getattr(layer, n) is None else getattr(layer, n).grad for n in NAMES)]


def check(layer: Any, x: Tensor, config: Config) -> None:
    """y and every gradient under the rule of tolerances.py. config: what the layer was asked for."""
    given = parameters(layer)
    exact: Any = [None if t is None else t.double() for t in given]
    shape = convnorm.conv_norm(x.double(), config, *exact).shape
    dy = torch.randn(shape, dtype=torch.float64, generator=inputs.generator(1)).to(x.dtype)
    oracle = reference(x.double(), exact, config, dy.double())
    plain = reference(x, given, config, dy)
    got = result(layer, x, dy)
    assert got[0].dtype == x.dtype
    floors = conv_norm_floors(x, given, config, dy, oracle[0], oracle[1:])
    assert_conv_norm(got, oracle, plain, floors)


def agree(a: Tensor, b: Tensor, layer: Any, x: Tensor, config: Config, count: float = 1) -> None:
    """Two of the layer's own ways to the same y: count times twice the floor of y."""
    given = parameters(layer)
    exact: Any = [None if t is None else t.double() for t in given]
    y = convnorm.conv_norm(x.double(), config, *exact)
    floors = conv_norm_floors(x, given, config, torch.ones_like(y), y)
    assert_within("y", a.detach(), b.detach().double(), None, 2 * count * floors.y, largest(y))


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
    """Every pair but 'same' with a stride, which is refused: test_same_needs_stride_1."""
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
    """Numerically, and the second derivatives that a gradient penalty needs.

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


SETTINGS = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"])),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "groups": st.sampled_from([1, 2]),
        "padding_mode": st.sampled_from(["zeros", "replicate"]),
        "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    }
)


@hypothesis.given(SETTINGS)
@hypothesis.settings(max_examples=60)
def test_shape_is_that_of_conv2d(given: dict[str, Any]) -> None:
    """And the values are the oracle's; a plane that nn.Conv2d has no output for is refused."""
    size, kernel = given.pop("size"), given.pop("kernel")
    if given["padding"] == "same":
        given["stride"] = (1, 1)
    config = Config(**given)
    x, layer = plane(1, 2, *size), build(2, 2, kernel, config)
    pads, reach = padding_of(config, kernel), [d * (k - 1) for k, d in zip(kernel, given["dilation"], strict=True)]
    room = [n + sum(p) - r for n, p, r in zip(size, pads, reach, strict=True)]
    if min(room) < 1:
        with pytest.raises(ValueError):
            layer(x)
        return
    y = layer(x)
    assert y.shape == (1, 2, *((n - 1) // s + 1 for n, s in zip(room, given["stride"], strict=True)))
    if given["padding"] != "same":  # for even kernels nn.Conv2d warns about a copy
        assert y.shape == nn.Conv2d(2, 2, kernel, **given)(x).shape
    check(layer, x, config)


# Properties that the paper states.


@AXES
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_layer_is_the_matrix_of_equation_8(axes: int, eps: float) -> None:
    """With all of the padding kept: y = Q x on a circle of n + R, where cross-correlation flips the kernel (B.2)."""
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
    floor = 1e3 * unit(torch.float32)  # of a sum of 13 x 13 x 3 squares, and y's own floor
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
    """ConvNorm: NaN for a Sobel kernel and for a filter of zeros."""
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


# Where the peers fail: PEERS.md, ConvNorm.


@AXES
def test_bias_comes_last(axes: int) -> None:
    """ConvNorm: added before normalization. A bias is neither filtered nor convolved with the affine kernel."""
    layer = build(3, 4, 3, Config(padding=1), axes=axes, dtype=torch.float64)
    x = plane(2, 3, *(9, 8)[:axes], dtype=torch.float64)
    with_bias, bias = layer(x), layer.bias.detach().clone()
    with torch.no_grad():
        layer.bias.zero_()
    agree(with_bias, layer(x) + bias.view(-1, *[1] * axes), layer, x, Config(padding=1))


def test_affine_starts_as_the_identity() -> None:
    """r_k of section 3.3 for odd, even and rectangular kernels: y is what it is without."""
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
    """ConvNorm: gives zeros."""
    layer, x = build(3, 4, 3, Config(padding=1)), plane(2, 3, 9, 8)
    assert torch.equal(layer.eval()(x), layer.train()(x))


@pytest.mark.parametrize("training", [True, False])
def test_any_resolution(training: bool) -> None:
    """ConvNorm: a buffer shaped like the feature map, so another resolution raises; and so does loading."""
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
    """ConvNorm: raises. Here also a layer cast after it was built, and x of a size that a half type can hold."""
    config = Config(stride=2, padding=1)
    layer = build(16, 8, 3, config).to(dtype)
    check(layer, 30 * plane(2, 16, 13, 13, dtype=dtype), config)


# Evaluation: the spectrum is remembered, and never stale.


class Spectra(TorchDispatchMode):
    """Counts the calls of kernel_spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def count(self) -> int:
        return sum(n for name, n in self.calls.items() if "kernel_spectrum" in name and "backward" not in name)


def test_spectrum_is_cached_in_evaluation() -> None:
    layer, x = build(3, 4, 3, Config(padding=1)), plane(2, 3, 9, 8)

    def spectra() -> int:
        with torch.no_grad(), Spectra() as seen:
            layer(x)
        return seen.count()

    assert [spectra(), spectra()] == [1, 1]
    layer.eval()
    spectra()
    assert spectra() == spectra() == 0
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += 1
    assert spectra() == 1 and spectra() == 0
    assert not layer.train()(x).isnan().any() and spectra() == 1


def edit_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[1, 0] += 2


def edit_data(layer: Any) -> None:
    layer.weight.data.copy_(torch.randn_like(layer.weight))


def replace_data(layer: Any) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def replace_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def edit_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight[:, 1].mul_(-3).add_(1)


def edit_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight[:, 1].mul_(-3).add_(1)


def optimizer_step(layer: Any) -> None:
    layer(plane(2, 3, 9, 8)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_step(layer: Any) -> None:
    layer(plane(2, 3, 9, 8)).square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()


def load(layer: Any, assign: bool = False) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()}, assign=assign)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, 3, 1, 1))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.shift


def parametrization(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Shifted())


def edit_parametrization(layer: Any) -> None:
    parametrization(layer)
    layer(plane(2, 3, 9, 8))
    with torch.no_grad():
        layer.parametrizations.weight[0].shift[0, 1] = 5


def reset(layer: Any) -> None:
    layer.reset_parameters()


EDITS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (edit_numpy, edit_data, replace_data, replace_parameter, edit_in_place, edit_in_inference_mode,
              optimizer_step, fused_step, load, parametrization, edit_parametrization, reset)
}  # fmt: skip
EDITS["load-assign"] = lambda layer: load(layer, assign=True)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("edit", EDITS)
def test_cache_is_never_stale(edit: str, mode: str) -> None:
    """Every way to change a weight between two evaluations, two of which autograd's version counter does not see."""
    config = Config(padding=1)
    layer, x = build(3, 4, 3, config).eval(), plane(2, 3, 9, 8)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        before = layer(x), layer(x)
    EDITS[edit](layer)
    with context():
        after = layer(x)
    assert torch.equal(*before) and not torch.allclose(before[0], after)
    fresh = nk.ConvNorm2d(3, 4, 3, padding=1)
    fresh.load_state_dict({name: getattr(layer, name).detach() for name in NAMES})
    assert torch.equal(fresh(x), after)


def test_cache_follows_the_type_and_the_plane() -> None:
    config = Config(padding=1)
    layer = build(3, 4, 3, config).eval()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        layer.to(dtype)
        for size in ((9, 8), (8, 9)):
            check(layer, plane(2, 3, *size, dtype=dtype), config)


@DETACH
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda c: c.__name__)
def test_gradients_in_evaluation(context: Any, detach: bool) -> None:
    """The same as in training, also after the spectrum was remembered without a graph, and twice in a row."""
    config = Config(stride=2, padding=1, detach_spectrum=detach)
    layer, x = build(3, 4, 3, config), plane(2, 3, 9, 8)
    dy = incoming_gradient(layer(x))
    expected = result(layer, x, dy)
    layer.eval()
    with context():
        layer(x)
    for _ in range(2):
        got = result(layer, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_frozen_in_evaluation() -> None:
    """Fine-tuning through a frozen layer: x still gets its gradient."""
    config = Config(padding=1)
    layer = build(3, 4, 3, config).eval().requires_grad_(False)
    x = plane(2, 3, 9, 8).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_functional_call_in_evaluation() -> None:
    """Model averaging: weights from elsewhere are not the remembered ones."""
    layer, other = build(3, 4, 3).eval(), nk.ConvNorm2d(3, 4, 3)
    x = plane(2, 3, 9, 8)
    own = layer(x)
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), (x,)), other(x))
    assert torch.equal(layer(x), own)


# nn.Conv's conventions.


@AXES
def test_signature_is_convs(axes: int) -> None:
    """Names, order and defaults of nn.Conv, then keywords only."""
    ours = list(inspect.signature(LAYERS[axes]).parameters.values())
    theirs = list(inspect.signature(CONVS[axes]).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert {p.name: p.default for p in ours[len(theirs) :]} == {"affine": True, "eps": 1e-8, "detach_spectrum": True}
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@AXES
def test_names_and_shapes(axes: int) -> None:
    layer, conv = LAYERS[axes](6, 4, 3, groups=2), CONVS[axes](6, 4, 3, groups=2)
    assert list(layer.state_dict()) == list(NAMES) and not list(layer.buffers())
    for name in ("weight", "bias"):
        assert getattr(layer, name).shape == getattr(conv, name).shape
    assert layer.affine_weight.shape == (4, 1, *[3] * axes)
    assert all(isinstance(getattr(layer, name), nn.Parameter) for name in NAMES)
    bare = LAYERS[axes](6, 4, 3, bias=False, affine=False)
    assert list(bare.state_dict()) == ["weight"] and bare.bias is None and bare.affine_weight is None


@AXES
def test_initial_weight_is_convs(axes: int) -> None:
    """The same draws, so that a seed gives the same network with either layer."""
    torch.manual_seed(5)
    layer = LAYERS[axes](3, 4, 3)
    torch.manual_seed(5)
    conv = CONVS[axes](3, 4, 3)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


@AXES
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_checkpoint(axes: int, bias: bool, assign: bool) -> None:
    """Loads strictly, inside a network: the affine kernel becomes the identity. The dict stays as it was."""
    source: Any = nn.Sequential(CONVS[axes](3, 4, 3, bias=bias), nn.ReLU())
    target: Any = nn.Sequential(build(3, 4, 3, axes=axes, bias=bias), nn.ReLU())
    state = source.state_dict()
    keys = list(state)
    target.load_state_dict(state, assign=assign)
    assert list(state) == keys
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[0].affine_weight, LAYERS[axes](3, 4, 3).affine_weight)
    assert target[0].affine_weight.requires_grad
    bare = LAYERS[axes](3, 4, 3, bias=bias, affine=False)
    bare.load_state_dict(source[0].state_dict())


@AXES
def test_state_dict_round_trip(axes: int) -> None:
    """After an evaluation, whose spectrum is no part of it."""
    layer, other = build(3, 4, 3, axes=axes).eval(), LAYERS[axes](3, 4, 3).eval()
    x = plane(2, 3, *(9, 8)[:axes])
    y = layer(x)
    other(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("key", ["weight", "affine_weight"])
def test_checkpoint_of_another_shape_is_an_error(key: str) -> None:
    layer = build(3, 4, 3)
    with pytest.raises(RuntimeError, match=key):
        layer.load_state_dict(layer.state_dict() | {key: torch.ones(4, 3, 5, 5)})


@AXES
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("training", [True, False])
def test_copies(axes: int, how: Any, training: bool) -> None:
    """Also of a layer that remembers a spectrum, with and without a graph; the copy goes on by itself."""
    layer, x = build(3, 4, 3, axes=axes).train(training), plane(2, 3, *(9, 8)[:axes])
    y = layer(x)
    twin = how(layer)
    assert repr(twin) == repr(layer) and torch.equal(twin(x), y)
    edit_in_place(twin)
    assert not torch.allclose(twin(x), y) and torch.equal(layer(x), y)


@AXES
def test_unbatched(axes: int) -> None:
    layer = build(3, 4, 3, Config(padding=1), axes=axes)
    x = plane(1, 3, *(9, 8)[:axes])
    assert layer(x[0]).shape == (4, *(9, 8)[:axes])
    agree(layer(x[0])[None], layer(x), layer, x, Config(padding=1))


@AXES
def test_empty_batch(axes: int) -> None:
    layer = build(3, 4, 3, Config(padding=1), axes=axes)
    x = torch.empty(0, 3, *(9, 8)[:axes], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4, *(9, 8)[:axes]) and x.grad is not None and x.grad.shape == x.shape
    assert not layer.weight.grad.any() and not layer.bias.grad.any() and not layer.affine_weight.grad.any()


@AXES
@pytest.mark.parametrize("training", [True, False])
def test_meta_device_and_types(axes: int, training: bool) -> None:
    layer: Any = LAYERS[axes](3, 4, 3, device="meta", dtype=torch.float64).train(training)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.affine_weight, LAYERS[axes](3, 4, 3, dtype=torch.float64).affine_weight)
    assert layer(plane(2, 3, *(9, 8)[:axes], dtype=torch.float64)).dtype == torch.float64


@AXES
def test_repr(axes: int) -> None:
    """nn.Conv's, and what is not a default of ours."""
    text = repr(LAYERS[axes](6, 4, 3, stride=2, affine=False, eps=0.01, detach_spectrum=False))
    for part in (f"ConvNorm{axes}d(6, 4", "stride=", "affine=False", "eps=0.01", "detach_spectrum=False"):
        assert part in text


# Memory formats, autocast, compilation.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [Config(1, 1), Config(2, 0), Config(1, 4), Config(1, "same")], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_channels_last_is_kept(affine: bool, config: Config, training: bool) -> None:
    layer = build(8, 6, 3, config, affine=affine).train(training)
    x = plane(3, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert layer(x.contiguous()).is_contiguous()
    check(layer, x, config)
    check(layer.to(memory_format=torch.channels_last), x, config)


@AXES
@DETACH
@pytest.mark.parametrize("training", [True, False])
def test_autocast(axes: int, detach: bool, training: bool) -> None:
    """The layer follows nn.Conv into bfloat16, its spectrum and filter do not: y is as good as the plain path's."""
    config = Config(stride=2, padding=1, detach_spectrum=detach)
    layer = build(16, 8, 3, config, axes=axes).train(training)
    x = plane(2, 16, *(13, 12)[:axes])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        for _ in range(2):  # from the cache, and of half-type activations
            assert layer(x.bfloat16()).dtype == y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    given = [t.bfloat16() for t in parameters(layer)]
    exact = convnorm.conv_norm(x.double(), config, *[t.double() for t in parameters(layer)])
    plain = convnorm.conv_norm(x.bfloat16(), config, *given)
    floors = conv_norm_floors(x.bfloat16(), given, config, exact, exact)
    # Besides what floors counts, x and the parameters were rounded to bfloat16 here.
    assert_within("y", y.detach(), exact, plain, 2 * floors.y, largest(exact))


def test_autocast_of_a_network() -> None:
    """Without a cast by hand between the layers, and trained a step."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nk.ConvNorm2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(plane(4, 3, 9, 9)).float().square().mean()
    loss.backward()
    assert seen[0].dtype == seen[1].dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@AXES
@DETACH
@pytest.mark.parametrize("stride", [1, 2])
def test_compiles_without_graph_breaks(axes: int, detach: bool, stride: int) -> None:
    """In training, then in evaluation, then after the weights changed under the compiled module."""
    torch.compiler.reset()
    config = Config(stride=stride, padding=1, detach_spectrum=detach)
    layer, x = build(3, 4, 3, config, axes=axes), plane(2, 3, *(9, 8)[:axes])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    dy = incoming_gradient(layer(x))

    def compare() -> None:
        expected = result(layer, x, dy)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.backward(dy)
        floors = conv_norm_floors(x, parameters(layer), config, dy, expected[0], expected[1:])
        got = [y.detach(), leaf.grad, *(getattr(layer, n).grad for n in NAMES)]
        floors = replace(floors, **{k: 2 * v for k, v in floors.__dict__.items()})
        assert_conv_norm(got, [t.double() for t in expected], [None] * 5, floors)

    compare()
    layer.eval()
    compare()
    for edit in (edit_in_place, edit_data):
        edit(layer)
        compare()
        with torch.no_grad():
            agree(compiled(x), layer(x), layer, x, config)


def test_compiled_under_autocast() -> None:
    torch.compiler.reset()
    layer, x = build(8, 4, 3, Config(padding=1)), plane(2, 8, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    given: Any = [t.bfloat16() for t in parameters(layer)]
    floors = conv_norm_floors(x.bfloat16(), given, Config(padding=1), expected, expected.double())
    assert_within("y", y.detach(), expected.detach().double(), None, 2 * floors.y, largest(expected))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_with_dynamic_shapes(training: bool) -> None:
    """Batch and plane as symbols."""
    torch.compiler.reset()
    config = Config(stride=2, padding=1)
    layer = build(3, 4, 3, config).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 3, 9, 8), (3, 3, 13, 11), (2, 3, 16, 7)):
        x = plane(*shape)
        agree(compiled(x), layer(x), layer, x, config)


# Bad input.


@AXES
@pytest.mark.parametrize("stride", [2, 3])
def test_same_needs_stride_1(axes: int, stride: int) -> None:
    with pytest.raises(ValueError, match="same"):
        LAYERS[axes](3, 4, 3, stride=stride, padding="same")


@pytest.mark.parametrize(
    ("arguments", "expected", "got"),
    [
        ({"in_channels": 6, "groups": 4}, "6", "4"),
        ({"out_channels": 9, "groups": 2}, "9", "2"),
        ({"groups": 0}, "groups", "0"),
        ({"padding": "some"}, "same", "some"),
        ({"padding_mode": "mirror"}, "reflect", "mirror"),
        ({"eps": -1.0}, "eps", "-1"),
    ],
    ids=str,
)
def test_wrong_construction(arguments: dict[str, Any], expected: str, got: str) -> None:
    with pytest.raises(ValueError) as raised:
        nk.ConvNorm2d(**({"in_channels": 6, "out_channels": 8, "kernel_size": 3} | arguments))
    assert expected in str(raised.value) and got in str(raised.value)


WRONG = {
    "channels": (torch.randn(2, 5, 9, 8), ValueError, "6", "5"),
    "rank-2": (torch.randn(9, 8), ValueError, "4D", "2D"),
    "rank-5": (torch.randn(2, 6, 9, 8, 7), ValueError, "4D", "5D"),
    "integer": (torch.ones(2, 6, 9, 8, dtype=torch.int32), TypeError, "float32", "int32"),
    "complex": (torch.ones(2, 6, 9, 8, dtype=torch.complex64), TypeError, "float32", "complex64"),
    "not-a-tensor": ([[1.0]], TypeError, "Tensor", "list"),
    "too-low": (torch.randn(2, 6, 2, 8), ValueError, "5", "2"),
    "too-narrow": (torch.randn(2, 6, 9, 1), ValueError, "5", "1"),
    "empty-plane": (torch.randn(2, 6, 0, 8), ValueError, "5", "0"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what: str, training: bool) -> None:
    """5 x 5, padding 1: a plane of 2 is padded to 4. Nothing is remembered of a failed call."""
    x, error, expected, got = WRONG[what]
    layer, good = build(6, 4, 5, Config(padding=1)).train(training), plane(2, 6, 9, 8)
    y, before = layer(good), {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error) as raised:
        layer(x)
    assert expected in str(raised.value) and got in str(raised.value)
    assert list(layer.state_dict()) == list(before) and not list(layer.buffers())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer(good), y)


@pytest.mark.parametrize("training", [True, False])
def test_other_ranks_are_refused_in_one_dimension(training: bool) -> None:
    layer = build(6, 4, 3, axes=1).train(training)
    for x in (torch.randn(6), torch.randn(2, 6, 9, 8)):
        with pytest.raises(ValueError, match=rf"3D.*{x.ndim}D"):
            layer(x)
    with pytest.raises(ValueError) as raised:
        layer(torch.randn(2, 5, 9))
    assert "6" in str(raised.value) and "5" in str(raised.value)
