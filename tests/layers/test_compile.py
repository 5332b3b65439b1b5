"""torch.compile, torch.export and CUDA graphs of networks: what an eager one computes, and remembers."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import normkernels as nk
from tests.layers.networks import EVERY_NETWORK, NETWORKS, batch, build, counters, loss_of, memory, step
from tests.tolerances import assert_agree

# torch's own tracing code touches deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")

SIZES = (6, 9, 4)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "marked"), [*((name, True) for name in NETWORKS), ("IterNorm2d", False), ("ConvNorm2d", False)]
)
def test_one_graph_for_every_batch_size(name: str, marked: bool) -> None:
    """Forward and backward are compiled once for each mode (without mark_dynamic once more), in one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    net, eager = build(name), build(name)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for modes, training in enumerate((True, False), start=1):
        net.train(training)
        eager.train(training)
        for samples in SIZES:
            x = batch(samples, samples)
            expected = step(eager, x)
            leaf = x.clone().requires_grad_()
            if marked:
                torch._dynamo.mark_dynamic(leaf, 0)
            y = compiled(leaf)
            assert_agree([y.detach(), *torch.autograd.grad(loss_of(y), [leaf, *net.parameters()])], expected)
            assert_agree(memory(net), memory(eager))
        assert counter.frame_count <= modes * (1 if marked else 2)
    assert counters(net) == [len(SIZES)] * len(counters(eager))


def test_a_network_of_linear_layers() -> None:
    """IterNorm1d on (N, C) is compiled once, too."""
    counter = CompileCounterWithBackend("aot_eager")
    net = nn.Sequential(nn.Linear(3, 8), nk.IterNorm1d(8, 4), nn.ReLU())
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for samples in SIZES:
        x = torch.randn(samples, 3)
        torch._dynamo.mark_dynamic(x, 0)
        assert_agree(compiled(x), eager(x))
        assert_agree(memory(net), memory(eager))
    assert counter.frame_count == 1


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own warnings, about the machine
def test_inductor_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI Inductor refuses ops of which torch's table has a decomposition.

    There is one program for every batch size.
    """
    monkeypatch.setenv("CI", "1")
    net = nk.IterNorm2d(3).eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for samples in SIZES[:2]:
            assert_agree(compiled(batch(0, samples)), net(batch(0, samples)))


@EVERY_NETWORK
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_export(name: str, training: bool) -> None:
    """A program takes any batch size; in training mode it updates its own running statistics, as the module does."""
    net = build(name)
    net(batch())
    net.train(training)
    eager = copy.deepcopy(net)
    program = torch.export.export(net, (batch(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    exported: Any = program.module()
    for samples in SIZES[:2]:
        x = batch(samples, samples)
        assert_agree(step(exported, x), step(eager, x))
        assert_agree(memory(exported), memory(eager))
    assert counters(exported) == [3 if training else 1] * len(counters(eager))


@pytest.mark.parametrize("name", ["IterNorm2d", "ConvNorm2d"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_compiled_network(name: str, how: Callable[[Any], Any]) -> None:
    """After nn.Module.compile and use, a copy goes on by itself."""
    net = build(name)
    net.compile(backend="aot_eager", fullgraph=True)
    net(batch())
    twin = how(net)
    assert_agree(step(twin, batch(1)), step(net, batch(1)))
    assert_agree(memory(twin), memory(net))
    twin(batch(2))
    assert (counters(net), counters(twin)) == ([2], [3])


WITHOUT_EIGH = pytest.mark.parametrize("name", [name for name in NETWORKS if name != "DBN2d"])


@pytest.mark.gpu
@WITHOUT_EIGH
def test_cuda_graph_of_a_training_step(name: str) -> None:
    """torch.cuda.graph takes forward, backward and optimizer; replays train, and update running statistics."""

    def prepared() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = build(name).cuda()
        return net, torch.optim.SGD(net.parameters(), lr=0.1)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net(x))
        loss.backward()
        optimizer.step()
        return loss

    net, optimizer = prepared()
    static = batch().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(net, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(net, optimizer, static)

    eager, eager_optimizer = prepared()
    for _ in range(3):
        train(eager, eager_optimizer, batch().cuda())
    for seed in range(4):
        static.copy_(batch(seed))
        graph.replay()
        assert_agree(loss.detach().clone(), train(eager, eager_optimizer, batch(seed).cuda()).detach())
    assert_agree(memory(net), memory(eager))
    assert_agree([p.detach() for p in net.parameters()], [p.detach() for p in eager.parameters()])
    assert counters(net) == [7] * len(counters(net))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # inductor's own warnings, about the machine
@WITHOUT_EIGH
def test_reduce_overhead(name: str) -> None:
    """torch.compile's own CUDA graphs give eager's values, gradients and running statistics over several steps."""
    net, eager = build(name).cuda(), build(name).cuda()
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for training in (True, False):
        net.train(training)
        eager.train(training)
        for seed in range(4):
            x = batch(seed).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            got = [value.clone() for value in step(net, x, compiled)]
            assert_agree(got, step(eager, x))
            assert_agree(memory(net), memory(eager))


@pytest.mark.gpu
def test_dbn_refuses_a_cuda_graph() -> None:
    """An eigendecomposition makes the host wait; after the refusal the layer goes on without a graph."""
    norm = nk.DBN2d(8, 4).cuda()
    x = torch.randn(6, 8, 4, 4, device="cuda")
    norm(x)
    with pytest.raises(RuntimeError, match="expected method='newton'"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        norm(x)
    assert norm(x).isfinite().all()
