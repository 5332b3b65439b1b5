"""Triton's kernels for single channels and for gradients: launches, what they read, how they are cut, the table."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels import _warnings
from normkernels.dispatch import choose
from normkernels.triton import diagonal, launch, support
from tests.ops.triton_calls import DEVICE, ON_GPU, Launches, gaussian, note_launches
from tests.oracles import inputs
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_agree

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1"
)  # fmt: skip
MODES = {"both": (True, True), "center": (True, False), "scale": (False, True)}
launches = pytest.fixture(note_launches)


def step(x: Tensor, center: bool = True, scale: bool = True) -> list[Tensor]:
    """Return y, mean, variance and all gradients of one training step of POP-Norm."""
    vector = torch.linspace(-1, 2, x.shape[1], device=x.device).to(x.dtype)
    leaves = [value.detach().requires_grad_() for value in (x, vector, vector)]
    weight, bias = leaves[1] if scale else None, leaves[2] if center else None
    y, mean, var = nk.ops.pop_norm(leaves[0], weight, bias, center=center, scale=scale)
    wanted = [leaf for leaf, used in zip(leaves, (True, scale, center), strict=True) if used]
    value = y.detach()
    dy = incoming_gradient(value.cpu()).to(x.device) + 4 * value  # were it orthogonal to x, hardly any x would be in dx
    return [value, mean, var, *torch.autograd.grad(y, wanted, dy)]


def on(backend: str, *arguments: Any) -> list[Tensor]:
    with nk.use_backend(backend):
        return step(*arguments)


# --- single channels ------------------------------------------------------------------------------------------------


def test_launches_of_pop_norm(launches: Launches) -> None:
    on("triton", gaussian((6, 16, 5, 3)))
    assert launches.names() == [
        "partial_channel_moments", "normalize", "partial_channel_cross", "normalize_backward",
    ]  # fmt: skip


def test_launches_of_the_primitives(launches: Launches) -> None:
    x = gaussian((6, 16, 5, 3))
    with nk.use_backend("triton"), torch.no_grad():
        _, mean, cov = nk.ops.moments(x, 1)
        nk.ops.cross_moments(x, x, mean, 1)
        nk.ops.whiten(x, mean, cov)
    assert launches.names() == [
        "partial_channel_moments", "finish_channel_moments", "partial_channel_cross", "finish_channel_cross",
        "channel_map",
    ]  # fmt: skip


# Reads of x and dy in backward; forward reads x twice. As BatchNorm, but that without a scale x is no part of dx.
PASSES = {"both": (2, 2), "center": (0, 2), "scale": (2, 2)}


@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_passes_over_the_data(layout: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32))
    dy, weight = incoming_gradient(x), torch.ones(8)
    touched = count_touched({"x": x, "dy": dy}, monkeypatch)
    center, scale = MODES[mode]
    options = (weight if scale else None, weight if center else None)
    with nk.use_backend("triton"):
        y, mean, var = torch.ops.normkernels.pop_norm(x, *options, 4.0, 1e-5, center, scale)
        assert touched() == {"x": 2 * x.numel(), "dy": 0, "written": y.numel()}
        torch.ops.normkernels.pop_norm_backward(dy, x, *options, mean, var, 4.0, 1e-5, center, scale)
        of_x, of_dy = PASSES[mode]
        assert touched() == {"x": of_x * x.numel(), "dy": of_dy * x.numel(), "written": x.numel()}


def count_touched(places: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that tells, and forgets, how many elements were read of each tensor, and written in tiles."""
    from triton.runtime.interpreter import InterpreterBuilder

    touched: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = pointers.data[mask.data] if mask is not None else pointers.data
        for name, tensor in places.items():
            start = tensor.data_ptr()
            stop = start + tensor.numel() * tensor.itemsize
            touched[name] += int(np.count_nonzero((addresses >= start) & (addresses < stop)))
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched["written"] += int(np.count_nonzero(mask.data)) if pointers.data.ndim == 2 else 0
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)

    def tell() -> dict[str, int]:
        told = dict(touched)
        touched.clear()
        return told

    return tell


@pytest.mark.parametrize("mean", [0.0, 1e5])  # where float32 holds x to 1/256 of a standard deviation
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_parts(layout: str, mean: float, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more parts than a program merges at a time, each with its mean, and more channels than it has."""
    from normkernels.primitives.pop_norm import triton as kernels

    for module in (diagonal, kernels):
        monkeypatch.setattr(module, "CHANNEL_BATCH", 1)
    x = gaussian((2, 19, 5, 13), group_size=1, mean=mean) + torch.linspace(0, 9, 13, device=DEVICE)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    got = on("triton", x)
    assert all(min(seen["grid"]) > 1 for _, seen in launches)
    assert_agree([value.cpu() for value in got], [value.cpu() for value in on("eager", x)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_two_runs_agree_bit_by_bit(layout: str, mode: str) -> None:
    x = inputs.LAYOUTS[layout][1](inputs.gaussian(inputs.SHAPE_4D, dtype=torch.bfloat16)).to(DEVICE)
    first, second = (on("triton", x, *MODES[mode]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_64_bit_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian((6, 8, 5, 3))
    expected = on("triton", x)
    monkeypatch.setattr(launch.Columns, "wide", True)
    assert all(torch.equal(a, b) for a, b in zip(on("triton", x), expected, strict=True))


@pytest.mark.parametrize("samples", [2, 9, 15, 17])  # the last one's second part has one column
def test_fewer_columns_than_a_tile(samples: int) -> None:
    """The shift is the mean of the columns that a part's first tile has; any other costs digits, at this mean all."""
    x = gaussian((samples, 8), group_size=1, mean=1e4)
    got, expected = (on(backend, x)[:3] for backend in ("triton", "eager"))
    assert_agree([value.cpu() for value in got], [value.cpu() for value in expected])


@pytest.mark.parametrize("affine", [True, False])
def test_iter_norm_of_single_channels(affine: bool, launches: Launches) -> None:
    """The passes are ours, in forward and backward; the numbers between them are plain PyTorch's."""
    x = gaussian((6, 8, 5, 3)).requires_grad_()
    weight = torch.linspace(-1, 2, 8, device=DEVICE) if affine else None
    results = []
    for backend in ("eager", "triton"):
        with nk.use_backend(backend):
            y, mean, W = nk.ops.iter_norm(x, 1, weight=weight)
            results.append([y, mean, W, *torch.autograd.grad(y.square().sum() + y[..., 0].sum(), x)])
    assert launches.names() == [
        "partial_channel_moments", "finish_channel_moments", "channel_map",
        "partial_channel_cross", "finish_channel_cross", "channel_map",
    ]  # fmt: skip
    assert_agree(*([value.detach().cpu() for value in result] for result in results))


# --- gradients ------------------------------------------------------------------------------------------------------


class Layers:
    """Random gradients and statistics of layers of these shapes (O, I / groups, *k), with these groups."""

    def __init__(
        self, shapes: list[tuple[tuple[int, ...], int]], dtype: torch.dtype = torch.float32, bias: bool = True
    ) -> None:
        g = inputs.generator(0)
        self.groups = [groups for _, groups in shapes]
        self.weights = [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape, _ in shapes]
        self.biases = [torch.randn(shape[0], generator=g).to(DEVICE, dtype) if bias else None for shape, _ in shapes]
        self.means = [torch.randn(shape[1] * groups, generator=g).to(DEVICE) for shape, groups in shapes]
        self.variances = [mean.square() + 0.5 for mean in self.means]
        self.q2 = [1 + i / 4 for i in range(len(shapes))]

    def run(self, backend: str) -> list[Tensor]:
        """Change the gradients, and return the counts of rows that were left."""
        with nk.use_backend(backend):
            return nk.ops.precondition(
                self.weights, self.biases, self.means, self.variances, self.groups, self.q2, 1e-2, 1e-4
            )  # fmt: skip

    def gradients(self) -> list[Tensor]:
        return [value.detach().cpu().clone() for value in (*self.weights, *self.biases) if value is not None]


SHAPES = [((7, 5, 3, 3), 1), ((4, 9), 1), ((6, 2, 3), 3)]


@pytest.mark.parametrize("number", [1, 3, 140])
def test_one_launch_for_any_number_of_layers(number: int, launches: Launches) -> None:
    """140 layers are more than a program looks through at a time."""
    shapes = [((1 + i % 3, 1 + i % 5), 1) for i in range(number)]
    got, expected = Layers(shapes), Layers(shapes)
    left = got.run("triton")
    expected.run("eager")
    assert launches.names() == ["precondition_kernel"]
    assert len(left) == number and not any(left)
    assert_agree(got.gradients(), expected.gradients())


@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
def test_bytes_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are read twice, the second time from a cache, and written once."""
    layers = Layers(SHAPES)
    places = {str(i): weight for i, weight in enumerate(layers.weights)}
    touched = count_touched(places, monkeypatch)
    layers.run("triton")
    sizes = {name: 2 * weight.numel() for name, weight in places.items()}
    assert touched() == {**sizes, "written": sum(sizes.values()) // 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts_of_gradients(dtype: torch.dtype, launches: Launches) -> None:
    """Contiguous and channels_last ones change in place, others through a copy; the memory between entries stays."""
    layers, expected = (Layers([((6, 5, 3, 3), 1)] * 3 + [((6, 5), 1)] * 2, dtype) for _ in range(2))
    expected.run("eager")
    whole = torch.zeros(12, 5, dtype=dtype, device=DEVICE)
    layers.weights[1] = layers.weights[1].contiguous(memory_format=torch.channels_last)
    layers.weights[2] = layers.weights[2].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    layers.weights[3] = layers.weights[3].t().contiguous().t()
    whole[::2] = layers.weights[4]
    layers.weights[4] = whole[::2]
    places = [weight.data_ptr() for weight in layers.weights]
    layers.run("triton")
    assert [weight.data_ptr() for weight in layers.weights] == places
    assert not whole[1::2].any()
    assert_agree(layers.gradients(), expected.gradients())
    assert launches.names() == ["precondition_kernel"]


@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_are_not_finite_are_left(bias: bool) -> None:
    layers, expected = (Layers(SHAPES, bias=bias) for _ in range(2))
    for each in (layers, expected):
        each.weights[0][2, 1, 0, 2] = float("nan")
        each.weights[0][6, 4, 2, 2] = float("inf")
        each.weights[2][5, 1, 2] = -float("inf")
        if bias:
            each.biases[1][3] = float("nan")  # type: ignore[index]
    before = layers.gradients()
    left, also = layers.run("triton"), expected.run("eager")
    assert [int(n) for n in left] == [int(n) for n in also] == [2, int(bias), 1]
    after = layers.gradients()
    for i, row in ((0, 2), (0, 6), (2, 5), *([(1, 3), (3, 2), (3, 6), (4, 3), (5, 5)] if bias else [])):
        assert torch.equal(after[i][row].nan_to_num(7), before[i][row].nan_to_num(7))
    finite = [value.nan_to_num(0, 0, 0) for value in after]
    assert_agree(finite, [value.nan_to_num(0, 0, 0) for value in expected.gradients()])


@pytest.mark.parametrize("broken", ["rows", "compiler"])
def test_a_refusal_changes_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch then begins with what was given: done twice, the change would be another one."""
    from normkernels.primitives.precondition import triton as kernels

    monkeypatch.setattr(_warnings, "warned", set())
    layers, expected = Layers(SHAPES), Layers(SHAPES)
    expected.run("eager")
    if broken == "rows":
        monkeypatch.setattr(kernels, "LONGEST_ROW", 44)
    else:

        def refusing(*_: Any, **__: Any) -> None:
            raise support.Unsupported("expected a compiler")

        monkeypatch.setattr(kernels, "launch", refusing)
    with pytest.warns(UserWarning, match="precondition: plain PyTorch instead of the Triton kernels: expected"):
        layers.run("triton")
    assert all(torch.equal(a, b) for a, b in zip(layers.gradients(), expected.gradients(), strict=True))


def test_an_entry_is_divided_exactly() -> None:
    """It is divided by a multiplication in 32 bits, up to the last entry that is allowed."""
    from normkernels.primitives.precondition.triton import LONGEST_ROW, division

    periods = [*range(1, 300), 2**14 - 1, 2**14, 2**14 + 1, 2**29 - 1, 2**29, 2**29 + 1, LONGEST_ROW - 1, LONGEST_ROW]
    for period in periods:
        multiplier, shift = division(period)
        assert 0 < multiplier < 2**32 and 0 <= shift < 32
        whole = np.unique(np.linspace(0, LONGEST_ROW // period, 1000, dtype=np.uint64)) * period
        entry = np.concatenate([whole, whole[1:] - 1, np.arange(1000), [LONGEST_ROW - 1]]).astype(np.uint64)
        entry = entry[entry < LONGEST_ROW]
        assert np.array_equal((2 * entry * np.uint64(multiplier)) >> np.uint64(32 + shift), entry // np.uint64(period))


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (64, 130, 7, 7), (4096, 96)], ids=str)
def test_real_sizes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    """There are many parts, full tiles, several waves; two runs agree bit by bit, and with plain PyTorch in float64."""
    x = inputs.gaussian(shape, dtype=dtype, group_size=1, mean=3.0).cuda()
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    got = on("triton", x)
    assert all(torch.equal(a, b) for a, b in zip(got, on("triton", x), strict=True))
    for value, expected in zip(got, on("eager", x.double()), strict=True):
        error = (value.double() - expected.double()).norm() / expected.double().norm()
        assert error < 4 * torch.finfo(value.dtype).eps + 1e-5


@pytest.mark.gpu
def test_a_network_of_gradients_on_a_gpu() -> None:
    from bench.suites.gradients import EPS1, EPS2, exact, make_layers

    for dtype in (torch.float32, torch.bfloat16):
        layers = make_layers(dtype, DEVICE)
        expected = list(exact(layers))
        with nk.use_backend("triton"):
            nk.ops.precondition(*layers, EPS1, EPS2)
        for value, reference in zip(layers.gradients(), expected, strict=True):
            error = (value.double() - reference).norm() / reference.norm()
            assert error < 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.gpu
def test_gradients_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a call before the capture is read again; gradients elsewhere are changed by plain PyTorch."""
    monkeypatch.setattr(_warnings, "warned", set())
    layers, fresh = Layers(SHAPES), Layers(SHAPES)
    originals = [weight.clone() for weight in layers.weights]
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.run("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = layers.gradients()
    layers = Layers(SHAPES)
    layers.run("triton")
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(action="error"), torch.cuda.graph(graph):
        layers.run("triton")
    for given, source in ((layers, Layers(SHAPES)),):
        for target, value in zip((*given.weights, *given.biases), (*source.weights, *source.biases), strict=True):
            target.copy_(value)  # type: ignore[union-attr,arg-type]
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(layers.gradients(), expected, strict=True))
    other = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="a call before the capture has seen"), torch.cuda.graph(other):
        fresh.run("triton")
    other.replay()
    assert_agree(fresh.gradients(), expected)
    assert not torch.equal(fresh.weights[0], originals[0])
