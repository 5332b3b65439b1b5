"""The CUDA kernels: how they cut and merge, and what they promise beside their values.

On a CPU as C++ (``--simt``, see tests/simt), on a GPU as the compiled extension. Their values are tested where every
backend's are (fixture ``backend``); here is what those tests do not reach: many tiles, wide groups, several parts.
What they refuse and hand on is in test_cuda_refusals, what needs a GPU in test_cuda_gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.dispatch import define, record
from tests import backends
from tests.ops import test_inverse_sqrt, test_iter_norm, test_moments, test_pop_norm, test_precondition, test_whiten
from tests.ops.test_library import RAW, arguments, spectral_arguments
from tests.ops.test_precondition import Layer
from tests.ops.test_spectral_kernels import check as check_filter
from tests.ops.test_spectral_kernels import values
from tests.oracles import inputs
from tests.oracles import run as place
from tests.oracles.run import Config, back, incoming_gradient, leaf, moved, oracle, plain_path, run
from tests.tolerances import assert_agree, assert_within, largest
from tests.tolerances.bnp import precondition_floors
from tests.tolerances.whitening import assert_iter_norm, exactly_centered

pytestmark = pytest.mark.usefixtures("backend")
ANYWHERE = backends.only(*backends.CUDA)
SIMT = backends.only("simt")

SERVED = ("moments", "cross_moments", "inverse_sqrt", "inverse_sqrt_backward", "whiten", "stacked_mix", "iter_norm",
          "iter_norm_backward", "spectral_filter", "pop_norm", "pop_norm_backward", "precondition")  # fmt: skip
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def raw(op: str) -> Callable[..., Any]:
    """Return the op as the dispatcher has it, without the checks of the public function."""
    return getattr(torch.ops.normkernels, op).default


def given(op: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return good arguments: two groups of four channels, filtered planes of 5 x 3, or two layers."""
    if op == "precondition":
        return layers_given(dtype)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, group_size=4)
    found = arguments(op, x) if op in RAW else spectral_arguments(op, x)
    return [moved(value) if isinstance(value, Tensor) else value for value in found]


def layers_given(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return the arguments of a convolution of two groups and of a linear layer without a bias."""
    layers = [
        Layer((6, 4, 3, 2), 2, True, dtype),
        Layer((3, 5), 1, False, dtype, 1),
    ]
    biases = [torch.empty(0, dtype=dtype) if layer.Gb is None else layer.Gb for layer in layers]
    tensors = [layer.Gw for layer in layers], biases, [layer.mean for layer in layers], [layer.var for layer in layers]
    return [*([moved(t.clone()) for t in each] for each in tensors), [2, 1], [1.0, 2.5], 1e-2, 1e-4]


def step(x: Tensor, d: int, **options: Any) -> list[Tensor]:
    """Return y, mean, W and all gradients of a training step, where it was computed."""
    leaves = [leaf(t) for t in (x, *test_iter_norm.affine(x.shape[1], x.dtype))]
    y, mean, W = nk.ops.iter_norm(leaves[0], d, weight=leaves[1], bias=leaves[2], **options)  # type: ignore[arg-type]
    return [y.detach(), mean, W, *torch.autograd.grad(y, leaves, incoming_gradient(y.detach()))]  # type: ignore[arg-type]


def filtered(shape: tuple[int, ...]) -> list[Tensor]:
    z = leaf(values(shape))
    y = nk.ops.spectral_filter(z, moved(values(shape[1:], seed=1)))  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, z, incoming_gradient(y.detach()))]  # type: ignore[arg-type]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what is there --------------------------------------------------------------------------------------------------


@SIMT
def test_every_op_is_registered() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {op for op in define.ops() if registered(f"normkernels_simt::{op}", "CPU")} == set(SERVED)
    assert {op for op in define.ops() if "cuda" in record._IMPLEMENTATIONS[op]} == set(SERVED)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "IterNorm": lambda: nk.IterNorm2d(8, group_size=4, device=place.device),
    "ConvNorm": lambda: nk.ConvNorm2d(8, 8, 3, padding=1, device=place.device),
    "POPNorm": lambda: nk.POPNorm2d(8, device=place.device),
}


@ANYWHERE
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_trains_a_step(layer: str) -> None:
    """Output, gradients and the layer afterwards are as with plain PyTorch, in evaluation too."""
    results = []
    for backend in ("cuda", "eager"):
        torch.manual_seed(0)
        with nk.use_backend(backend):
            model = LAYERS[layer]()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            x = leaf(inputs.gaussian((6, 8, 6, 6), dtype=torch.float32))
            y = model(x)
            y.backward(incoming_gradient(y.detach()))
            optimizer.step()
            evaluated = model.eval()(x).detach()
        results.append([y.detach(), x.grad, evaluated, *model.state_dict().values()])  # type: ignore[union-attr]
    assert_agree(*results)


@ANYWHERE
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("op", SERVED)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(raw(op), tuple(given(op)))


@ANYWHERE
@pytest.mark.parametrize(
    "op", ["whiten", "stacked_mix", "iter_norm", "iter_norm_backward", "pop_norm", "pop_norm_backward"]
)
def test_a_copied_input_has_an_output_of_its_own_layout(op: str) -> None:
    """It is channels_last, cut in width: the spatial dimensions do not collapse, and the kernels get a copy."""
    found = given(op)
    for i, value in enumerate(found):
        if isinstance(value, Tensor) and value.dim() == 4:
            wide = torch.cat((value, value), 3).contiguous(memory_format=torch.channels_last)
            found[i] = wide[..., : value.shape[3]]
    torch.library.opcheck(raw(op), tuple(found), test_utils="test_faketensor")


@ANYWHERE
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("layer", LAYERS)
def test_compiles_whole(layer: str) -> None:
    x = moved(inputs.gaussian((6, 8, 6, 6), dtype=torch.float32))
    model = LAYERS[layer]()
    expected = model(x)
    torch._dynamo.reset()
    assert_agree(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# --- tiles, parts, merging ------------------------------------------------------------------------------------------
#
# The simulated device has three processors, so a single group is cut into six parts that are merged three by three, and
# two groups into three parts, merged two and one; three have two parts each, and one level. A tile of the reduction
# has 128 columns up to d = 32, then 64 and 32; backward half of them up to 64. One column more than five tiles makes a
# last part of one column.

WIDTHS = {16: 641, 20: 641, 33: 321, 64: 321, 100: 161, 128: 161}


def many_columns(d: int, groups: int, dtype: torch.dtype, **options: Any) -> Tensor:
    return inputs.gaussian((WIDTHS[d], d * groups), dtype=dtype, group_size=d, **options)


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("d", WIDTHS)
def test_several_parts(d: int, groups: int, dtype: torch.dtype) -> None:
    """Channels are innermost, or there is one sample of that many positions, which are not a multiple of anything."""
    x = many_columns(d, groups, dtype)
    test_iter_norm.check(x if groups % 2 else x.T.contiguous()[None], Config(group_size=d))


# For moments the gradient is tested, too, which is a mix; for whiten the gradient is the cross moments.
@ANYWHERE
@pytest.mark.parametrize("d", [20, 128])
def test_several_parts_of_the_primitives(d: int) -> None:
    test_moments.check(many_columns(d, 1, torch.float32, mean=100.0), d)
    test_whiten.check(test_whiten.arguments(many_columns(d, 1, torch.float32), d))


# Four, five and six parts, in sets of two or three, the last set with fewer or the last part with less.
@ANYWHERE
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 385, 513, 640, 769, 1409])
def test_every_number_of_parts(columns: int) -> None:
    x = inputs.gaussian((columns, 16), dtype=torch.float32, group_size=16)
    test_moments.check(x, 16)
    test_iter_norm.check(x, Config(group_size=16), stable=True)


@ANYWHERE
@pytest.mark.parametrize("d", [33, 100, 128])
def test_a_single_column(d: int) -> None:
    """m = 1: nothing is left of x, whatever the padding of the tile holds."""
    x = inputs.gaussian((1, d), dtype=torch.float32, group_size=d)
    y, mean, W, dx, _, dbias = map(back, step(x, d))
    bias = test_iter_norm.affine(d, torch.float32)[1]
    assert torch.equal(y[0], bias) and torch.equal(mean, x[0])  # type: ignore[index, arg-type]
    assert W.isfinite().all() and not dx.any()  # type: ignore[union-attr]
    assert torch.equal(dbias, incoming_gradient(x)[0])  # type: ignore[arg-type]


@ANYWHERE
@pytest.mark.parametrize("given_affine", [(False, False), (True, False), (False, True)], ids=str)
def test_without_weight_or_bias(given_affine: tuple[bool, bool]) -> None:
    x, config = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32), Config()
    weight, bias = (value if asked else None for value, asked in
                    zip(test_iter_norm.affine(8, x.dtype), given_affine, strict=True))  # fmt: skip
    problem = config, x, incoming_gradient(x), weight, bias
    got = run(nk.ops.iter_norm, *problem)
    assert_iter_norm(got, oracle(*problem), plain_path(*problem), *problem[1:4], config)


# A single channel or two have up to nine blocks. They take 1024 columns at a time in float32 and 2048 in half types
# where the positions are next to each other, and 128 or 256 where the channels are; 256 where nothing is aligned. One
# column more than a multiple of that, or one access, makes a last part that is as short as can be.
CHANNELS = {
    "positions": ((1, 2, 6152), torch.Tensor.contiguous),
    "positions-of-samples": ((3, 1, 4, 1028), torch.Tensor.contiguous),
    "odd-planes": ((27, 2, 7, 7), torch.Tensor.contiguous),
    "channels": ((1537, 8), torch.Tensor.contiguous),
    "one-more-channel": ((1537, 9), torch.Tensor.contiguous),
    "many-channels": ((65, 104), torch.Tensor.contiguous),
    "one-channel": ((513, 1), torch.Tensor.contiguous),
    "samples": ((1537, 3, 1, 2), inputs.LAYOUTS["CHWN"][1]),
}


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("case", CHANNELS)
def test_several_parts_of_channels(case: str, dtype: torch.dtype) -> None:
    """Channels are alone in their groups. Each part has a mean of its own, which is what merging is about."""
    shape, lay_out = CHANNELS[case]
    x = inputs.gaussian(shape, group_size=1, mean=3.0)
    x = lay_out((x + torch.linspace(-2, 2, len(x), dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))).to(dtype))
    test_pop_norm.check(x)
    test_moments.check(x, 1)
    test_whiten.check(test_whiten.arguments(x, 1))


@ANYWHERE
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1025, 2303, 2305])
def test_every_number_of_parts_of_channels(columns: int) -> None:
    x = inputs.gaussian((1, 1, columns), dtype=torch.float32, group_size=1)
    test_pop_norm.check(x)
    test_moments.check(x, 1)


@ANYWHERE
@pytest.mark.parametrize("layout", ["NC", "NCL"])
def test_a_single_value_of_a_channel(layout: str) -> None:
    """m = 1: nothing is left of x but beta, and no gradient of x."""
    x = leaf(inputs.gaussian((1, 37) if layout == "NC" else (1, 37, 1), dtype=torch.float32, group_size=1))
    bias = leaf(torch.linspace(-1, 2, 37))
    y, mean, var = nk.ops.pop_norm(x, None, bias, 1.0, 0.0)  # type: ignore[arg-type]
    assert torch.equal(mean, x.detach().flatten()) and not var.any()  # type: ignore[union-attr]
    torch.testing.assert_close(y.detach().flatten(), bias.detach().sign())  # type: ignore[union-attr]
    (dx,) = torch.autograd.grad(y, x, incoming_gradient(y.detach()).to(y.device))  # type: ignore[arg-type]
    assert largest(dx) <= 1e-6


# 2048 values or more are a row of a block, fewer of a warp; in accesses of 16 bytes where all rows are aligned.
ROWS = {
    "long": ((3, 2600), 1, True),
    "long-odd": ((3, 2049), 1, False),
    "long-kernel": ((4, 256, 3, 3), 2, True),
    "long-kernel-odd": ((2, 231, 3, 3), 1, True),
    "short": ((17, 48), 1, True),
    "short-kernel": ((9, 16, 3, 2), 3, True),
}


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_rows_of_gradients(case: str, channels_last: bool, dtype: torch.dtype) -> None:
    layer = Layer(*ROWS[case], dtype)
    if channels_last and layer.Gw.dim() == 4:
        layer.Gw = layer.Gw.contiguous(memory_format=torch.channels_last)
    ((Gw, Gb),), left = test_precondition.run([layer])
    exact, tensors = Layer(*ROWS[case], torch.float64), (layer.Gw, layer.Gb, layer.mean, layer.var)
    exact.Gw, exact.Gb, exact.mean, exact.var = (None if t is None else t.double() for t in tensors)  # type: ignore[assignment]
    with nk.use_backend("eager"):  # test_precondition has the paper's matrix instead, which is large here
        ((Gw_ref, Gb_ref),), _ = test_precondition.run([exact])
    assert left == [0] and Gw.stride() == layer.Gw.stride()
    floor_w, floor_b = precondition_floors(*tensors, layer.q2, Gw_ref, Gb_ref)
    assert ((Gw.double() - Gw_ref).abs() <= floor_w).all()
    if Gb is not None:
        assert ((Gb.double() - Gb_ref).abs() <= floor_b).all()


@ANYWHERE
def test_a_long_row_that_is_not_finite_is_left() -> None:
    layer = Layer((3, 2600), 1, True, torch.float32)
    layer.Gw[1, 2599] = float("nan")
    ((Gw, Gb),), left = test_precondition.run([layer])
    assert left == [1]
    torch.testing.assert_close(Gw[1], layer.Gw[1], rtol=0, atol=0, equal_nan=True)
    assert layer.Gb is not None and Gb[1] == layer.Gb[1]
    assert Gw[[0, 2]].isfinite().all() and not torch.equal(Gw[2], layer.Gw[2])


@ANYWHERE
def test_lists_keep_nothing() -> None:
    """LibTorch leaks strings, but it must not leak lists and their tensors."""
    arguments = given("precondition")
    before = [t._use_count() for each in arguments[:4] for t in each]
    for _ in range(3):
        raw("precondition")(*arguments)
    assert [t._use_count() for each in arguments[:4] for t in each] == before


# The last has more planes than the simulated device filters at once: three blocks on each of three processors.
@ANYWHERE
@pytest.mark.parametrize("shape", [(11, 3, 5, 6), (2, 100, 1, 4), (3, 5, 64, 64)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers_of_planes(shape: tuple[int, ...], channels_last: bool) -> None:
    z, v = values(shape), values(shape[1:], seed=1)
    check_filter(z.contiguous(memory_format=torch.channels_last) if channels_last else z, v)


# 99 KiB: sm_86, sm_89 and sm_120, where one matrix of d = 128 fits into shared memory. 163 KiB: sm_80, two of them.
@SIMT
@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024])
def test_matrices_that_shared_memory_has_no_room_for(shared_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in global memory, and nothing else changes.

    A launch that asks for more shared memory fails, so some matrices do lie there.
    """
    x = many_columns(128, 2, torch.float32)
    cov = torch.stack([inputs.covariance(inputs.spectrum(128, 10.0), seed) for seed in range(2)])

    def results() -> list[Tensor]:
        given = cov.float().requires_grad_()
        W = nk.ops.inverse_sqrt(given)
        return [*step(x, 128), W.detach(), *torch.autograd.grad(W, given, torch.cos(cov.float()))]

    expected = results()
    monkeypatch.setenv("NORMKERNELS_SIMT_SHARED_BYTES", str(shared_bytes))
    assert equal(results(), expected)
    test_inverse_sqrt.check(cov, Config(), torch.float32)


# --- determinism ----------------------------------------------------------------------------------------------------


def all_results(d: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Return results of every op, of some by way of others."""
    x = many_columns(d, groups, dtype)
    given = leaf(x)
    _, mean, cov = nk.ops.moments(given, d)  # type: ignore[arg-type]
    W = nk.ops.inverse_sqrt(cov)
    (dx,) = torch.autograd.grad(nk.ops.whiten(given, mean, W), given, incoming_gradient(given))  # type: ignore[arg-type]
    return [*step(x, d), mean.detach(), cov.detach(), W.detach(), dx, *filtered((7, 3, 9, 10)), *diagonal(dtype)]


def diagonal(dtype: torch.dtype) -> list[Tensor]:
    """Return results for channels on their own, in several parts, and for layers with rows of warps and of blocks."""
    results = []
    for shape in ((1537, 9), (1, 2, 6152)):
        given = leaf(inputs.gaussian(shape, dtype=dtype, group_size=1))
        y, mean, var = nk.ops.pop_norm(given)  # type: ignore[arg-type]
        _, also, cov = nk.ops.moments(given, 1)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad(y, given, incoming_gradient(y.detach()))  # type: ignore[arg-type]
        results += [y.detach(), mean, var, also.detach(), cov.detach(), dx]
    layers = [Layer(shape, 1, True, dtype) for shape in ((3, 2600), (9, 3, 2))]
    return [*results, *(t for pair in test_precondition.run(layers)[0] for t in pair)]


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("d", [16, 128])
def test_two_runs_agree_bit_by_bit(d: int, dtype: torch.dtype) -> None:
    assert equal(all_results(d, 1, dtype), all_results(d, 1, dtype))


@SIMT
@pytest.mark.parametrize(("d", "groups"), [(16, 1), (16, 3), (33, 2), (128, 1)])
def test_the_order_of_threads_and_blocks_does_not_matter(d: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another block comes last and merges; where a barrier is missing, another thread is first."""
    results = []
    for threads, blocks in product(("ascending", "descending"), repeat=2):
        monkeypatch.setenv("NORMKERNELS_SIMT_THREADS", threads)
        monkeypatch.setenv("NORMKERNELS_SIMT_BLOCKS", blocks)
        results.append(all_results(d, groups, torch.float32))
    assert all(equal(results[0], other) for other in results[1:])


# --- layouts --------------------------------------------------------------------------------------------------------

# Layouts of tests/oracles/inputs.py are tested with every backend. name -> a shape, and x from values of that shape.
STRIDES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "unfold": ((8, 60), lambda v: v.unfold(1, 12, 5).permute(1, 0, 2)),  # samples overlap
    "unfold-planes": ((6, 8, 30), lambda v: v.unfold(2, 6, 4)),  # rows of a plane overlap
    "overlapping-rows": ((300,), lambda v: v.as_strided((70, 8), (4, 1))),  # channels of one sample are the next one's
    "expanded-samples": ((1, 8, 40), lambda v: v.expand(3, 8, 40)),
    "expanded-positions": ((40, 8, 1), lambda v: v.expand(40, 8, 3)),
    "expanded-plane": ((40, 8, 1, 1), lambda v: v.expand(40, 8, 3, 2)),
    "1x1-odd-strides": ((40, 8), lambda v: v.as_strided((40, 8, 1, 1), (8, 1, 5, 7))),
    "1x1-transposed": ((8, 40), lambda v: v.as_strided((40, 8, 1, 1), (1, 40, 3, 999))),
    "1x1-every-other": ((40, 16), lambda v: v.as_strided((40, 8, 1, 1), (16, 2, 1, 1))),
    "one-row": ((1, 8, 1, 50), lambda v: v.as_strided((1, 8, 1, 50), (3, 50, 7, 1))),
    "rows-permuted": ((8, 5, 6, 7), lambda v: v.permute(2, 0, 3, 1)),  # nothing collapses
    "rows-reversed": ((6, 8, 5, 7), lambda v: v.transpose(2, 3)),
    "unaligned-NHWC": ((6 * 35 * 8 + 3,), lambda v: v[3:].view(6, 5, 7, 8).permute(0, 3, 1, 2)),
}  # fmt: skip


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("case", STRIDES)
def test_strides(case: str, dtype: torch.dtype) -> None:
    """Tensors are right read in place or copied, with a contiguous gradient and with one as strided as x."""
    shape, view = STRIDES[case]
    x = view(torch.randn(shape, dtype=torch.float64, generator=inputs.generator(0)).to(dtype) + 1)
    assert x.shape[1] == 8
    test_iter_norm.check(x, Config(), dy=incoming_gradient(x).contiguous())
    test_moments.check(x)
    dy = view(torch.randn(shape, generator=inputs.generator(1)).to(dtype))
    test_iter_norm.check(x, Config(), dy=dy)
    test_pop_norm.check(x, dy=dy)
    test_moments.check(x, 1)


PAIRS = ["NCHW", "NHWC", "CHWN", "NCHW-cropped", "NHWC-channel-slice", "NCHW-unaligned"]


@ANYWHERE
@pytest.mark.parametrize("of_dy", PAIRS)
@pytest.mark.parametrize("of_x", PAIRS)
def test_mixed_layouts(of_x: str, of_dy: str) -> None:
    """Groups of 4 in bfloat16: the widest accesses of x and of dy differ, as their strides do."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.bfloat16, group_size=4)
    dy = incoming_gradient(x)
    x, dy = inputs.LAYOUTS[of_x][1](x), inputs.LAYOUTS[of_dy][1](dy)
    test_iter_norm.check(x, Config(group_size=4), dy=dy)
    test_pop_norm.check(x, dy=dy)


@ANYWHERE
@pytest.mark.parametrize("case", ["one-channel", "one-position", "one-channel-one-position"])
def test_one_of_something(case: str) -> None:
    """Strides of such a dimension mean nothing; here they are odd."""
    v = torch.randn(60, generator=inputs.generator(0)) + 1
    x = {
        "one-channel": v.as_strided((4, 1, 5, 3), (15, 1, 3, 1)),
        "one-position": v[:56].as_strided((7, 8, 1), (8, 1, 1)),
        "one-channel-one-position": v.as_strided((30, 1, 1, 1), (2, 17, 1, 3)),
    }[case]
    test_iter_norm.check(x, Config(group_size=1), stable=True)
    test_pop_norm.check(x)


@ANYWHERE
def test_strided_parameters() -> None:
    """W, mean, weight and bias are read by their strides, or packed."""
    x, mean, W, weight, bias = test_whiten.arguments(inputs.gaussian((41, 8), dtype=torch.float32), 4)
    both = torch.stack((weight, bias, mean), 1)
    expected = nk.ops.whiten(*map(moved, (x, mean, W, weight, bias)))
    strided = moved(both)
    got = nk.ops.whiten(moved(x), strided[:, 2], moved(W.mT.contiguous()).mT, strided[:, 0], strided[:, 1])
    assert torch.equal(got, expected)
    expanded = nk.ops.whiten(moved(x), moved(mean), moved(W[:1]).expand(2, 4, 4))
    assert torch.equal(expanded, nk.ops.whiten(moved(x), moved(mean), moved(W[:1].repeat(2, 1, 1))))


@ANYWHERE
def test_offsets_beyond_2_31_elements() -> None:
    """Two samples are 2^31 elements apart, in memory of which on a CPU only these are touched."""
    near, count = moved(inputs.gaussian((2, 8, 15), dtype=torch.float16)), 2**31 + 120
    if near.is_cuda:
        memory = torch.empty(count, dtype=near.dtype, device=near.device)
    else:
        memory = torch.from_numpy(np.empty(count, dtype=np.float16))
    far = memory.as_strided((2, 8, 15), (2**31, 15, 1)).copy_(near)
    assert equal(on_device(far, 8), on_device(near, 8))
    assert equal(*([*nk.ops.pop_norm(x)] for x in (far, near)))


def on_device(x: Tensor, d: int) -> list[Tensor]:
    """Return y, mean, W and dx, of x as it is."""
    x = x.detach().requires_grad_()
    y, mean, W = nk.ops.iter_norm(x, d)
    return [y.detach(), mean, W, *torch.autograd.grad(y, x, incoming_gradient(y.detach()))]


# --- precision ------------------------------------------------------------------------------------------------------


# 1.9, 2.1: about where half data are shifted. 200: where bfloat16 holds one bit of a standard deviation. 50: so few
# columns that the errors of single differences do not average out.
@ANYWHERE
@pytest.mark.parametrize("columns", [50, 701])
@pytest.mark.parametrize("mean", [0.0, 1.9, 2.1, 3.0, 30.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_half_data_of_any_mean(dtype: torch.dtype, mean: float, columns: int) -> None:
    """Means are in standard deviations. Differences to the shift must be exact, or the covariance loses digits."""
    test_moments.check(inputs.gaussian((columns, 16), dtype=dtype, group_size=16, mean=mean), 16)


@ANYWHERE
@pytest.mark.parametrize("mean", [1e3, -1e5], ids="mean{:g}".format)
def test_large_means_cost_nothing(mean: float) -> None:
    """The rounding of the mean is taken out of x - mean again, as with plain PyTorch (test_precision)."""
    x, config = many_columns(16, 1, torch.float32, mean=mean), Config(group_size=16, eps=1e-3)
    dy = incoming_gradient(x) + 3
    got, reference = run(nk.ops.iter_norm, config, x, dy), oracle(config, x, dy)
    floor = exactly_centered(x, dy, reference, config)
    assert_within("y", got.y, reference.y, None, floor.y, largest(reference.y))
    assert_within("W", got.w, reference.w, None, floor.w, largest(reference.w))
    assert_within("dx", got.dx, reference.dx, None, floor.dx, largest(reference.dx))


@ANYWHERE
@pytest.mark.parametrize("dtype", TYPES, ids=name)
def test_long_sums(dtype: torch.dtype) -> None:
    """A tensor core truncates where it adds; in sums of so many products that would be more than rounding errors."""
    x = inputs.gaussian((40_000, 48), dtype=dtype, group_size=16, mean=0.0)
    test_moments.check(x, 16)
    test_whiten.check(test_whiten.arguments(x, 16, mean=0.0))
