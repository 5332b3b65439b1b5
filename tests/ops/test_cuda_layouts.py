"""The CUDA kernels give the same twice, in every layout, and lose no digits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import normkernels as nk
from tests.ops import test_iter_norm, test_moments, test_pop_norm, test_precondition, test_whiten
from tests.ops.cuda_calls import ANYWHERE, SIMT, TYPES, equal, filtered, many_columns, name, on_device, step
from tests.ops.test_precondition import Layer
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, leaf, moved, oracle, run
from tests.tolerances import assert_within, largest
from tests.tolerances.whitening import exactly_centered

pytestmark = pytest.mark.usefixtures("backend")

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
