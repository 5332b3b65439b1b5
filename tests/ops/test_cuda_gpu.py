"""The compiled CUDA kernels on a GPU: real sizes, launches, streams, graphs, and what only a GPU has room for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import choose, record
from tests import backends
from tests.ops import test_iter_norm, test_moments, test_pop_norm, test_precondition
from tests.ops.cuda_calls import SERVED, TYPES, equal, given, name, on_device, raw, step
from tests.ops.test_spectral_kernels import check as check_filter
from tests.ops.test_spectral_kernels import values
from tests.oracles import inputs
from tests.oracles.run import Config, moved
from tests.tolerances import unit

pytestmark = [
    pytest.mark.usefixtures("backend"),
    backends.only("cuda-cuda"),
]


def test_every_op_is_registered() -> None:
    assert choose._compiled == {(op, "cuda") for op in SERVED}
    x = torch.empty(2, 8, 8, 8, device="cuda")
    assert {op for op in record.OPS if nk.backend_of(op, x) == "cuda"} == set(SERVED)


ELSEWHERE = [
    ("whiten", 1, "mean"),
    ("whiten", 3, "weight"),
    ("stacked_mix", 4, "matrix"),
    ("iter_norm_backward", 4, "W"),
    ("spectral_filter", 1, "v"),
    ("pop_norm_backward", 4, "mean"),
]


@pytest.mark.parametrize(("op", "at", "argument"), ELSEWHERE)
def test_another_device_is_named(op: str, at: int, argument: str) -> None:
    values = given(op)
    values[at] = values[at].cpu()
    with pytest.raises(RuntimeError, match=f"{op}: {argument}: expected a tensor on the device of the data"):
        raw(op)(*values)


REAL = {"56x56": ((32, 64, 56, 56), 64), "7x7": ((64, 128, 7, 7), 64), "wide": ((16, 128, 28, 28), 128),
        "2d": ((4096, 96), 32)}  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("case", REAL)
def test_real_sizes_on_a_gpu(case: str, dtype: torch.dtype, channels_last: bool) -> None:
    """There are many parts for each group, full tiles and several waves of blocks; two runs agree bit by bit."""
    shape, d = REAL[case]
    x = inputs.gaussian(shape, dtype=dtype, group_size=d, mean=3.0)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert equal(step(x, d), step(x, d))
    test_iter_norm.check(x, Config(group_size=d))


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("case", REAL)
def test_real_sizes_of_channels_on_a_gpu(case: str, dtype: torch.dtype, channels_last: bool) -> None:
    x = inputs.gaussian(REAL[case][0], dtype=dtype, group_size=1, mean=3.0)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    first, second = ([*nk.ops.pop_norm(moved(x))] for _ in range(2))
    assert equal(first, second)
    test_pop_norm.check(x)
    test_moments.check(x, 1)


@pytest.mark.parametrize("dtype", TYPES, ids=name)
def test_the_layers_of_a_network_on_a_gpu(dtype: torch.dtype) -> None:
    """There are more of them than one launch takes."""
    shapes = [(64, 3, 7, 7), *[(32, 16, 3, 3)] * 40, *[(128, 96, 1, 1)] * 20, (100, 512)]
    test_precondition.check([test_precondition.Layer(shape, 1, True, dtype, i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("side", [9, 34, 58])
def test_real_planes_on_a_gpu(side: int, channels_last: bool) -> None:
    z = values((32, 64, side, side))
    check_filter(
        z.contiguous(memory_format=torch.channels_last) if channels_last else z, values((64, side, side), seed=1)
    )


LAUNCHES = {
    "moments": ["moments_kernel"],
    "cross_moments": ["cross_moments_kernel"],
    "inverse_sqrt": ["inverse_sqrt_kernel"],
    "inverse_sqrt_backward": ["inverse_sqrt_backward_kernel"],
    "whiten": ["mix_kernel"],
    "stacked_mix": ["mix_kernel"],
    "iter_norm": ["forward_kernel", "mix_kernel"],
    "iter_norm_backward": ["backward_kernel", "mix_kernel"],
    "spectral_filter": ["coefficients_kernel", "filter_kernel"],
    "pop_norm": ["pop_forward_kernel", "scale_kernel"],
    "pop_norm_backward": ["pop_backward_kernel", "scale_kernel"],
    "precondition": ["precondition_kernel"],
}


@pytest.mark.parametrize("op", LAUNCHES)
def test_launches(op: str) -> None:
    """Nothing else runs on the GPU but what zeroes counters: no copy, no conversion."""
    torch.use_deterministic_algorithms(False)  # otherwise torch would fill what is allocated
    arguments = [value.contiguous() if isinstance(value, Tensor) else value for value in given(op)]
    raw(op)(*arguments)  # loads the kernels
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        raw(op)(*arguments)
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [kernel for kernel in ran if not kernel.startswith("Memset")]
    assert len(kernels) == len(LAUNCHES[op]), ran
    assert all(expected in kernel for expected, kernel in zip(LAUNCHES[op], kernels, strict=True)), ran


def of_iter_norm(x: Tensor) -> Tensor:
    return nk.ops.iter_norm(x, 64)[0]


def of_pop_norm(x: Tensor) -> Tensor:
    return nk.ops.pop_norm(x)[0]


def of_filter(x: Tensor) -> Tensor:
    return nk.ops.spectral_filter(x, torch.ones(64, 14, 14, device=x.device))


@pytest.mark.parametrize("path", [of_iter_norm, of_pop_norm, of_filter])
def test_no_synchronization_and_graph_capture(path: Callable[[Tensor], Tensor]) -> None:
    """The host never waits, and a captured step replays on new data."""
    shape = (32, 64, 14, 14)
    x = moved(inputs.gaussian(shape, dtype=torch.float32, group_size=64))
    grad, leaf = torch.randn_like(x), x.clone().requires_grad_()
    torch.autograd.grad(path(leaf), leaf, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(path(leaf), leaf, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(path(leaf), leaf, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = path(leaf)
        (dx,) = torch.autograd.grad(y, leaf, grad)
    with torch.no_grad():
        leaf.copy_(inputs.gaussian(shape, dtype=torch.float32, group_size=64, seed=1))
    graph.replay()
    expected = path(leaf)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, leaf, grad)[0])


def test_two_streams_at_once() -> None:
    """Each call has counters and partial results of its own."""
    given = [inputs.gaussian((64, 64, 14, 14), dtype=torch.float32, group_size=64, seed=i).cuda() for i in range(2)]
    streams = [torch.cuda.Stream() for _ in given]
    expected = [on_device(x, 64) for x in given]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for x, stream in zip(given, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(on_device(x, 64))
        torch.cuda.synchronize()
        assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The kernels run where the data lies, not on the current device, which stays what it was."""
    x = inputs.gaussian((64, 64, 14, 14), dtype=torch.float32, group_size=64)
    got = on_device(x.to("cuda:1"), 64)
    assert torch.cuda.current_device() == 0 and got[0].device.index == 1
    assert equal([t.cpu() for t in got], [t.cpu() for t in on_device(x.cuda(), 64)])


@pytest.mark.large
def test_more_than_2_31_columns() -> None:
    """Columns are counted in 64 bits. Stride 0 makes 2^31 of them from 2^16; only y is as large as that."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    samples = inputs.gaussian((2**16, 2), dtype=torch.float16, group_size=2).cuda()
    x = samples[:, :, None].expand(2**16, 2, 2**15)
    (_, mean, cov), (_, mean_ref, cov_ref) = nk.ops.moments(x, 2), nk.ops.moments(samples.double(), 2)
    tolerance = unit(torch.float32) * (4 + 2**15.5)  # cov_floor's, for 2^31 samples
    torch.testing.assert_close(mean.double(), mean_ref, rtol=tolerance, atol=0)
    torch.testing.assert_close(cov.double(), cov_ref, rtol=tolerance, atol=tolerance)
    sums, total = nk.ops.cross_moments(x, x, mean, 2)
    torch.testing.assert_close(sums.double(), cov_ref * 2**31, rtol=tolerance, atol=tolerance * 2**31)
    torch.testing.assert_close(total.double(), mean_ref * 2**31, rtol=tolerance, atol=0)
    W = torch.eye(2, device="cuda")[None]
    y = nk.ops.whiten(x, mean, W)
    assert torch.equal(y, nk.ops.whiten(samples, mean, W)[:, :, None].expand_as(y))
    _, mean, var = nk.ops.moments(x, 1)
    torch.testing.assert_close(mean.double(), mean_ref, rtol=tolerance, atol=0)
    torch.testing.assert_close(var.flatten().double(), cov_ref[0].diagonal(), rtol=tolerance, atol=tolerance)
    W = torch.full((2, 1, 1), 0.5, device="cuda")
    torch.testing.assert_close(nk.ops.whiten(x, mean, W), y / 2, rtol=1e-2, atol=1e-2)
