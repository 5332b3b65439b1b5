"""The Triton kernels as they are launched: how often, over how much data, in how many parts, and twice the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import choose
from normkernels.triton import configs, launch, support
from tests import backends
from tests.ops.triton_calls import DEVICE, ON_GPU, Launches, gaussian, note_launches, step
from tests.oracles import inputs, iternorm
from tests.oracles.run import Config, incoming_gradient, oracle, run
from tests.tolerances import assert_within, largest
from tests.tolerances.moments import cov_floor, mean_floor
from tests.tolerances.whitening import exactly_centered

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1")
ACTIVATIONS = ("partial_moments", "partial_cross", "mix_kernel")
launches = pytest.fixture(note_launches)


def test_launches_of_a_training_step(launches: Launches) -> None:
    with nk.use_backend("triton"):
        step(gaussian((6, 16, 5, 3)))
    assert launches.names() == [
        "partial_moments", "finish_forward", "mix_kernel", "partial_cross", "finish_backward", "mix_kernel",
    ]  # fmt: skip


def test_launches_of_inference(launches: Launches) -> None:
    layer = nk.IterNorm2d(16, group_size=8, device=DEVICE).eval()
    with nk.use_backend("triton"), torch.no_grad():
        layer(gaussian((6, 16, 5, 3)))
    assert launches.names() == ["mix_kernel"]


def test_launches_of_the_primitives(launches: Launches) -> None:
    x = gaussian((6, 16, 5, 3))
    with nk.use_backend("triton"), torch.no_grad():
        _, mean, cov = nk.ops.moments(x, 8)
        assert launches.names() == ["partial_moments", "finish_moments"]
        nk.ops.inverse_sqrt(cov)
        assert launches.names()[2:] == ["inverse_sqrt_kernel"]
        nk.ops.cross_moments(x, x, mean, 8)
        assert launches.names()[3:] == ["partial_cross", "finish_cross"]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NCHW-channel-slice", "NC", "NCHW-every-other-sample"])
def test_data_is_read_in_place(layout: str, launches: Launches) -> None:
    """The kernels get x's own memory, whatever its strides: no copy is made first."""
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32)).to(DEVICE)
    with nk.use_backend("triton"):
        nk.ops.iter_norm(x, 8)
    for name, seen in launches:
        if name in ACTIVATIONS:
            assert seen["arguments"][0].data.data_ptr() == x.data_ptr()


# Elements of x and dy: the tile that gives a part its shift is read twice. Once more for each further block of rows.
@pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_passes_over_the_data(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward reads x twice and writes y once, backward reads x and dy twice and writes dx once, as BatchNorm does."""
    from triton.runtime.interpreter import InterpreterBuilder

    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=torch.float32))
    dy = incoming_gradient(x)
    touched: Counter[str] = Counter()
    places = {"x": x, "dy": dy}

    def count(kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data] if mask is not None else pointers.data
        for name, tensor in places.items():
            start, stop = tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()
            touched[f"{name} {kind}"] += int(np.count_nonzero((addresses >= start) & (addresses < stop)))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched["written"] += int(np.count_nonzero(mask.data)) if pointers.data.ndim == 2 else 0
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    with nk.use_backend("triton"):
        _, mean, W, S, scale = torch.ops.normkernels.iter_norm(x, None, None, 8, 5, 1e-5, False, False)
        block = configs.configuration("moments", 16, launch.columns(x).layout, x.dtype, 80).block
        cut = launch.split(x.numel() // 8, 1, block, DEVICE)
        assert cut.parts > 1
        assert touched["x read"] == 2 * x.numel() + 8 * sum(
            min(block, x.numel() // 8 - part * cut.chunk) for part in range(cut.parts)
        )
        touched.clear()
        torch.ops.normkernels.iter_norm_backward(dy, x, None, mean, W, S, scale, 5, False, False)
        assert touched == {"x read": 2 * x.numel(), "dy read": 2 * x.numel()}
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        touched.clear()
        torch.ops.normkernels.whiten(x, mean, W, None, None)
        assert touched == {"x read": x.numel(), "dy read": 0, "written": x.numel()}


@pytest.mark.parametrize("d", [16, 64, 128])
def test_a_wide_group_is_mixed_by_several_programs(d: int, launches: Launches) -> None:
    x = gaussian((150, d), group_size=d)
    with nk.use_backend("triton"):
        got = step(x, d)
    with nk.use_backend("eager"):
        expected = step(x, d)
    rows = [configs.configuration(name, d, "channels", x.dtype, 80).rows for name in ("mix", "stacked_mix")]
    assert [seen["grid"][0] for name, seen in launches if name == "mix_kernel"] == [max(1, d // row) for row in rows]
    assert d < 128 or rows[0] < d
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_more_than_2_31_columns_are_counted_in_64_bits() -> None:
    """Nothing runs: an expanded tensor has as many columns as one likes."""
    seen: list[dict[str, Any]] = []
    x = torch.zeros(1, 2, 1, device=DEVICE).expand(2**16, 2, 2**15)
    with support.recording(90, lambda kernel, grid, arguments, config, meta: seen.append(meta)):
        from normkernels.primitives.moments.triton import moments

        moments(x, 2, False)
        moments(x[:9], 2, False)
    assert [meta["WIDE"] for meta in seen if "WIDE" in meta] == [True, False]


def test_64_bit_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian((6, 8, 5, 3))
    with nk.use_backend("triton"):
        expected = step(x)
        monkeypatch.setattr(launch.Columns, "wide", True)
        assert all(torch.equal(a, b) for a, b in zip(step(x), expected, strict=True))


@pytest.mark.parametrize("group_size", [8, 1])
@pytest.mark.parametrize("samples", [2, 9, 15, 17])  # the last one's second part has one column
def test_fewer_columns_than_a_tile(samples: int, group_size: int) -> None:
    """The shift is the mean of the columns that a part's first tile has; any other costs digits, at this mean all."""
    x = gaussian((samples, 8), group_size=group_size, mean=1e4)
    with nk.use_backend("triton"):
        _, mean, cov = (value.cpu() if isinstance(value, Tensor) else value for value in nk.ops.moments(x, group_size))
    x = x.cpu()
    mean_ref, cov_ref = iternorm.moments(x.double(), group_size)
    assert_within("mean", mean, mean_ref, None, mean_floor(x), largest(mean_ref))
    assert ((cov.double() - cov_ref).abs() <= cov_floor(x, cov_ref)).all()


@backends.only(*backends.TRITON)
def test_large_means_cost_nothing(backend: str) -> None:
    """The rounding of the mean is taken out of y and of the gradients again; plain PyTorch: test_precision."""
    config = Config(eps=1e-3)
    x = inputs.gaussian((9, 8, 3, 5), dtype=torch.float32, mean=-1e5)
    dy = incoming_gradient(x) + 3  # a mean of its own, which the rounding of x's mean would be multiplied with
    got, reference = run(nk.ops.iter_norm, config, x, dy), oracle(config, x, dy)
    floor = exactly_centered(x, dy, reference, config)
    assert_within("y", got.y, reference.y, None, floor.y, largest(reference.y))
    assert_within("W", got.w, reference.w, None, floor.w, largest(reference.w))
    assert_within("dx", got.dx, reference.dx, None, floor.dx, largest(reference.dx))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_agree_bit_by_bit(layout: str, dtype: torch.dtype) -> None:
    shape, lay_out = inputs.LAYOUTS[layout]
    x = lay_out(inputs.gaussian(shape, dtype=dtype)).to(DEVICE)
    with nk.use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(step(x), step(x), strict=True))
