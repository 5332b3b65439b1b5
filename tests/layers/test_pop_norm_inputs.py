"""POP-Norm with bad batches, wrong input, every memory format and type, in networks and in graphs."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.layers.pop_norm_checks import (
    EVERY_MODE,
    EVERY_RANK,
    RANKS,
    assert_unchanged,
    buffers,
    check_evaluation,
    check_training,
    values_and_gradients,
    with_affine,
)
from tests.oracles import inputs
from tests.tolerances import assert_agree

# Bad batches.


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_bad_batch_leaves_the_statistics_alone(bad: float, momentum: float | None, first: bool) -> None:
    """No statistic changes, though in the output a bad value stays in its channel."""
    layer = nk.POPNorm2d(8, momentum=momentum)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    if not first:
        layer(x)
    before = buffers(layer)
    broken = x.clone()
    broken[3, 6, 0, 0] = bad
    y = layer(broken)
    assert y[:, 6].isnan().all() and y[:, :6].isfinite().all()
    assert_unchanged(layer, before)
    layer(x)
    assert layer.num_batches_tracked == 2 - first
    assert all(b.isfinite().all() for b in layer.buffers())


def test_overflow_leaves_the_statistics_alone() -> None:
    """The mean of the batch is finite, its variance is not."""
    layer = nk.POPNorm2d(8)
    before = buffers(layer)
    layer(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32, scale=1e25))
    assert_unchanged(layer, before)


def test_large_variances_are_remembered() -> None:
    """The variances are finite, but their sum is not: that of 64 channels overflows float32."""
    x = inputs.gaussian((4, 64), dtype=torch.float32, mean=0.0, scale=4e18)
    layer, reference = nk.POPNorm1d(64), nn.BatchNorm1d(64)
    layer(x)
    reference(x)
    assert (layer.running_var * 10).sum().isinf() and layer.num_batches_tracked == 1
    assert_agree(layer.running_var, reference.running_var)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (3, 8, 0, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool, shape: tuple[int, ...]) -> None:
    layer = with_affine(nk.POPNorm2d(8)).train(training)
    before = buffers(layer)
    x = torch.empty(shape)
    y, dx, *grads = values_and_gradients(layer, x, torch.empty(shape))
    assert y.shape == dx.shape == shape and not any(grad.any() for grad in grads)
    assert_unchanged(layer, before)


@EVERY_RANK
def test_one_value_per_channel(rank: str) -> None:
    """A batch of one (N, C) has no variance: training raises, as BatchNorm; evaluation has statistics and works."""
    layer_type, batchnorm, shape = RANKS[rank]
    layer = layer_type(8)
    x = torch.randn(1, 8, *[1] * (len(shape) - 2))
    before = buffers(layer)
    with pytest.raises(ValueError, match="more than one value per channel") as raised:
        layer(x)
    assert str(tuple(x.shape)) in str(raised.value)
    with pytest.raises(ValueError):
        batchnorm(8)(x)
    assert_unchanged(layer, before)
    assert_agree(layer.eval()(x), batchnorm(8).eval()(x) / 4)


WRONG = {
    "channels": (torch.randn(4, 7, 3, 3), ValueError, "8", "7"),
    "rank-3": (torch.randn(4, 8, 3), ValueError, "4D", "3D"),
    "rank-5": (torch.randn(4, 8, 3, 3, 3), ValueError, "4D", "5D"),
    "unbatched": (torch.randn(8, 3, 3), ValueError, "4D", "3D"),
    "integer": (torch.ones(4, 8, 3, 3, dtype=torch.int32), TypeError, "float32", "int32"),
    "double-into-float": (torch.randn(4, 8, 3, 3).double(), TypeError, "float64", "float32"),
    "another-device": (torch.empty(4, 8, 3, 3, device="meta"), ValueError, "meta", "cpu"),
    "not-a-tensor": ([[1.0]], TypeError, "Tensor", "list"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what: str, training: bool) -> None:
    x, error, expected, got = WRONG[what]
    layer = nk.POPNorm2d(8).train(training)
    before = buffers(layer)
    with pytest.raises(error) as raised:
        layer(x)
    assert expected in str(raised.value) and got in str(raised.value)
    assert_unchanged(layer, before)


@EVERY_RANK
def test_other_ranks_are_refused(rank: str) -> None:
    layer_type, _, shape = RANKS[rank]
    own = {2, 3} if layer_type is nk.POPNorm1d else {len(shape)}
    for other in {1, 2, 3, 4, 5, 6} - own:
        with pytest.raises(ValueError, match="expected"):
            layer_type(8)(torch.randn(8, 8, 2, 2, 2, 2)[(..., *[0] * (6 - other))])


# Memory formats, types, networks, graphs.


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(training: bool) -> None:
    layer = nk.POPNorm2d(8).train(training)
    x = torch.randn(5, 8, 4, 3).contiguous(memory_format=torch.channels_last)
    y, dx, *_ = values_and_gradients(layer, x, torch.ones_like(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_between_convolutions(dtype: torch.dtype, training: bool) -> None:
    """float32 parameters, half-type activations: the layer follows the activations, as BatchNorm does."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), with_affine(nk.POPNorm2d(8)), nn.Conv2d(8, 4, 3)).train(training)
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
    with torch.autocast("cpu", dtype):
        loss = net(torch.randn(4, 3, 9, 9)).float().square().mean()
    loss.backward()
    assert seen[0].dtype == seen[1].dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in net.parameters())  # fmt: skip
    assert net[1].running_var.dtype == torch.float32
    assert torch.equal(net[1](seen[0].detach()), seen[1])  # as outside of autocast


def test_float16_with_standard_deviation_1000() -> None:
    """The variance does not fit in float16."""
    layer = nk.POPNorm2d(8, dtype=torch.float16, momentum=1.0)
    x = inputs.gaussian((9, 8, 4, 3), dtype=torch.float16, scale=1000.0)
    check_training(layer, x)
    assert layer.running_var.min() > torch.finfo(torch.float16).max
    check_evaluation(layer.eval(), x)


@EVERY_MODE
def test_a_network_trains(options: dict[str, Any]) -> None:
    """Norms stand before each layer (Figure 1), at the paper's kappa."""
    blocks = [m for _ in range(3) for m in (nk.POPNorm2d(8, **options), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
    net = nn.Sequential(*blocks, nn.Flatten(), nk.POPNorm1d(8 * 36, **options), nn.Linear(8 * 36, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.randn(24, 8, 6, 6), torch.arange(24) % 3
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# torch's own tracing code touches deprecated parts of torch.
TRACED = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@TRACED
def test_compiles_without_graph_breaks() -> None:
    """Values, gradients and memory are eager's in training and evaluation, for every batch size and a bad batch."""
    torch._dynamo.reset()  # it compiles one forward for few layers only
    layer, reference = (with_affine(nk.POPNorm2d(8)) for _ in range(2))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for training in (True, False):
        layer.train(training)
        reference.train(training)
        for samples in (4, 7):
            x = inputs.gaussian((samples, 8, 3, 2), dtype=torch.float32, seed=samples)
            pairs = []
            for module, own in ((compiled, layer), (reference, reference)):
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                pairs.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *own.parameters()])])
            assert_agree(*pairs)
            assert_agree(list(layer.buffers()), list(reference.buffers()))
    before = buffers(layer)
    layer.train()
    compiled(x.index_fill(0, torch.tensor([1]), float("nan")))
    assert_unchanged(layer, before)


@TRACED
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own, in torch.export.load
@EVERY_MODE
def test_export_of_evaluation(options: dict[str, Any]) -> None:
    """A program with a free batch size is saved and loaded; the file knows the op by name."""
    layer = with_affine(nk.POPNorm2d(8, **options))
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    layer(x)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert any(str(node.target).startswith("normkernels.") for node in loaded.graph.nodes)
    for samples in (3, 11):
        x = inputs.gaussian((samples, 8, 5, 3), dtype=torch.float32)
        assert_agree(loaded.module()(x), layer(x))
