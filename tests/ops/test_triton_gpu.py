"""The Triton kernels on a GPU: real sizes, streams, graphs, several devices."""

from __future__ import annotations

import pytest
import torch

import normkernels as nk
from normkernels.dispatch import choose
from tests.ops.triton_calls import DEVICE, gaussian, step
from tests.oracles import inputs
from tests.oracles.run import Config, incoming_gradient, oracle, plain_path, run
from tests.tolerances.whitening import assert_iter_norm

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not choose.availability("triton")[0], reason="neither a GPU nor TRITON_INTERPRET=1")
SHAPES = {"56x56": (32, 64, 56, 56), "7x7": (64, 128, 7, 7), "wide": (16, 128, 28, 28), "2d": (4096, 96)}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_sizes_on_a_gpu(shape: str, dtype: torch.dtype, channels_last: bool) -> None:
    """There are many parts for each group, full tiles and several waves of programs; two runs agree bit by bit."""
    d = 128 if shape == "wide" else 32 if shape == "2d" else 64
    x = inputs.gaussian(SHAPES[shape], dtype=dtype, group_size=d, mean=3.0)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    dy, config = incoming_gradient(x), Config(group_size=d)
    with nk.use_backend("triton"):
        on_gpu = step(x.cuda(), d)
        assert all(torch.equal(a, b) for a, b in zip(on_gpu, step(x.cuda(), d), strict=True))
    from tests.oracles import run as place

    before, place.device = place.device, DEVICE
    try:
        with nk.use_backend("triton"):
            got = run(nk.ops.iter_norm, config, x, dy)
        assert_iter_norm(got, oracle(config, x, dy), plain_path(config, x, dy), x, dy, None, config)
    finally:
        place.device = before


@pytest.mark.gpu
def test_no_synchronization_and_graph_capture() -> None:
    """The host never waits, and a captured step replays on new data."""
    x = gaussian((32, 64, 14, 14), group_size=64)
    with nk.use_backend("triton"):
        step(x, 64)  # compiles the kernels
        torch.cuda.synchronize()
        grad = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = nk.ops.iter_norm(leaf, 64)[0]
            torch.autograd.grad(y, leaf, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.autograd.grad(nk.ops.iter_norm(leaf, 64)[0], leaf, grad)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nk.ops.iter_norm(leaf, 64)[0]
            (dx,) = torch.autograd.grad(y, leaf, grad)
        with torch.no_grad():
            leaf.copy_(gaussian((32, 64, 14, 14), group_size=64, seed=1))
        graph.replay()
        expected = nk.ops.iter_norm(leaf, 64)[0]
        assert torch.equal(y, expected)
        assert torch.equal(dx, torch.autograd.grad(expected, leaf, grad)[0])


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    inputs_, streams = (
        [gaussian((64, 64, 14, 14), group_size=64, seed=i) for i in range(2)],
        [torch.cuda.Stream() for _ in range(2)],
    )
    with nk.use_backend("triton"):
        expected = [step(x, 64) for x in inputs_]
        torch.cuda.synchronize()
        for _ in range(10):
            got = []
            for x, stream in zip(inputs_, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(step(x, 64))
            torch.cuda.synchronize()
            for a, b in zip(got, expected, strict=True):
                assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """The kernels run where the data lies, not on the current device."""
    x = gaussian((64, 64, 14, 14), group_size=64)
    with nk.use_backend("triton"):
        expected = step(x, 64)
        got = step(x.to("cuda:1"), 64)
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
def test_triton_serves_cuda_tensors_by_itself() -> None:
    assert nk.backend_of("iter_norm", torch.empty(2, 8, device="cuda")) == "triton"
