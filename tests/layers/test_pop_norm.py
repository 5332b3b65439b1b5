"""POP-Norm: what it computes in training and in evaluation, what it remembers, and where it is BatchNorm."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkernels as nk
from tests.oracles import inputs, popnorm
from tests.oracles.run import incoming_gradient
from tests.tolerances import assert_agree, assert_within, largest
from tests.tolerances.moments import mean_floor
from tests.tolerances.pop_norm import pop_norm_floors

RANKS = {
    "NC": (nk.POPNorm1d, nn.BatchNorm1d, inputs.SHAPE_2D),
    "NCL": (nk.POPNorm1d, nn.BatchNorm1d, inputs.SHAPE_3D),
    "NCHW": (nk.POPNorm2d, nn.BatchNorm2d, inputs.SHAPE_4D),
    "NCDHW": (nk.POPNorm3d, nn.BatchNorm3d, inputs.SHAPE_5D),
}
EVERY_RANK = pytest.mark.parametrize("rank", RANKS)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda t: str(t).removeprefix("torch.")
)
MODES = {"both": {}, "center": {"scale": False}, "scale": {"center": False}}
OPTIONS = {
    **MODES,
    "kappa-and-eps": {"kappa": 7.0, "eps": 0.3},
    "bare": {"affine": False},
}
EVERY_MODE = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def with_affine(layer: Any) -> Any:
    """Set weights of both signs and shifts, far from 1 and 0."""
    with torch.no_grad():
        for parameter, ends in ((layer.weight, (-1.5, 2)), (layer.bias, (3, -1))):
            if parameter is not None:
                parameter.copy_(torch.linspace(*ends, layer.num_features))
    return layer


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in layer.named_buffers()}


def assert_unchanged(layer: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in layer.named_buffers():
        assert torch.equal(value, before[key]), key


def options_of(layer: Any) -> tuple[Any, ...]:
    return layer.kappa, layer.eps, layer.center, layer.scale


def values_and_gradients(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Return y and the gradients of x, weight and bias."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(dy)
    return [y.detach(), leaf.grad, *(None if p is None else p.grad.clone() for p in (layer.weight, layer.bias))]


def check(layer: Any, x: Tensor, path: Any, plain: Any, running: tuple[Tensor, Tensor] | None = None) -> None:
    """Check one call and its backward against ``path(x, weight, bias)`` in float64, beside ``plain`` in x's type."""
    dy = incoming_gradient(x)
    given = [x, *(None if p is None else p.detach() for p in (layer.weight, layer.bias))]
    results = []
    for function, up in ((path, True), (plain, False)):
        leaves = [None if t is None else t.to(torch.float64 if up else t.dtype, copy=True) for t in given]
        leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)])
    exact, other = results
    floors = pop_norm_floors(x, dy, *given[1:], *options_of(layer), exact, running)
    got = values_and_gradients(layer, x, dy)
    for key, a, b, c, floor in zip(("y", "dx", "dweight", "dbias"), got, exact, other, floors, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            assert_within(key, a, b, c, floor, largest(b))


def check_training(layer: Any, x: Tensor) -> None:
    options = options_of(layer)
    check(
        layer, x,
        lambda *given: popnorm.pop_norm(*given, *options)[0], lambda *given: popnorm.plain(*given, *options)[0],
    )  # fmt: skip


def check_evaluation(layer: Any, x: Tensor) -> None:
    running, options = (layer.running_mean, layer.running_var), options_of(layer)

    def path(x: Tensor, *parameters: Tensor | None) -> Tensor:
        return popnorm.evaluate(x, *(value.double() for value in running), *parameters, *options)

    def plain(x: Tensor, *parameters: Tensor | None) -> Tensor:
        up = (None if p is None else p.to(layer.running_mean.dtype) for p in parameters)
        return popnorm.evaluate(x.to(layer.running_mean.dtype), *running, *up, *options).to(x.dtype)

    check(layer, x, path, plain, running)


@EVERY_RANK
@DTYPES
def test_training_step(rank: str, dtype: torch.dtype) -> None:
    """Output, gradients and running averages are right: of the mean, and of the unbiased variance as BatchNorm's."""
    layer_type, _, shape = RANKS[rank]
    layer = with_affine(layer_type(8, momentum=0.3, dtype=dtype))
    x = inputs.gaussian(shape, dtype=dtype)
    check_training(layer, x)
    m = x.numel() // 8
    mean, var = popnorm.statistics(x.double())
    assert_within("running_mean", layer.running_mean, 0.3 * mean, None, mean_floor(x), 1.0)
    floor = mean_floor(x) * (1 + largest(x.double()))  # the variance is a mean of squares
    assert_within("running_var", layer.running_var, 0.7 + 0.3 * var * m / (m - 1), None, floor, 1.0)
    assert layer.running_mean.dtype == layer.running_var.dtype != torch.float16
    assert layer.num_batches_tracked == 1


@EVERY_RANK
@DTYPES
def test_evaluation(rank: str, dtype: torch.dtype) -> None:
    """Statistics and parameters may be of different batches: r^2 is running_var + beta^2 for today's beta."""
    layer_type, _, shape = RANKS[rank]
    layer = layer_type(8, dtype=dtype)
    layer(inputs.gaussian(shape, dtype=dtype, mean=2.0))
    with_affine(layer).eval()
    before = buffers(layer)
    check_evaluation(layer, inputs.gaussian(shape, dtype=dtype, seed=1))
    assert_unchanged(layer, before)


@EVERY_OPTION
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Either step works by itself (Remark 1). A step that is left out has no parameter."""
    layer = with_affine(nk.POPNorm2d(8, dtype=dtype, **options))
    wanted = [name for name, used in (("weight", layer.scale), ("bias", layer.center)) if used and layer.affine]
    assert [name for name, _ in layer.named_parameters()] == wanted
    assert list(layer.state_dict()) == [*wanted, "running_mean", "running_var", "num_batches_tracked"]
    check_training(layer, inputs.gaussian(inputs.SHAPE_4D, dtype=dtype))
    check_evaluation(layer.eval(), inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, seed=1))
    other = nk.POPNorm2d(8, dtype=dtype, **options).eval()
    other.load_state_dict(layer.state_dict())
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype)
    assert torch.equal(other(x), layer(x))


def test_kappa_divides() -> None:
    """A power of two changes no digit; without the scaling step there is nothing that kappa divides."""
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    for training in (True, False):
        one, eight = (with_affine(nk.POPNorm2d(8, kappa)).train(training) for kappa in (1, 8))
        assert torch.equal(one(x), 8 * eight(x))
        one, eight = (with_affine(nk.POPNorm2d(8, kappa, scale=False)).train(training) for kappa in (1, 8))
        assert torch.equal(one(x), eight(x))


@pytest.mark.parametrize("training", [True, False])
@EVERY_RANK
def test_root_mean_square(rank: str, training: bool) -> None:
    """A channel's root mean square is |gamma| / kappa, whatever beta is, as Theorem 3 needs it."""
    layer_type, _, shape = RANKS[rank]
    layer = with_affine(layer_type(8, 3.0, eps=0.0, momentum=1.0, dtype=torch.float64))
    x = inputs.gaussian(shape)
    y = layer(x)
    if not training:
        m = x.numel() // 8
        layer.running_var *= (m - 1) / m
        y = layer.eval()(x)
    assert_agree(y.movedim(1, 0).flatten(1).square().mean(1).sqrt(), layer.weight.detach().abs() / 3)


# BatchNorm's.


@EVERY_RANK
@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_beta_and_kappa_it_is_batchnorm(rank: str, momentum: float | None) -> None:
    """Remark 1: at beta = 0 and kappa = 1 they are one function, in training and evaluation, with the same memory."""
    layer_type, batchnorm, shape = RANKS[rank]
    layer, reference = layer_type(8, 1.0, momentum=momentum).double(), batchnorm(8, momentum=momentum).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1.5, 2, 8))
        reference.weight.copy_(layer.weight)
    for seed, training in enumerate((True, True, True, False)):
        x = inputs.gaussian(shape, seed=seed, mean=float(seed), scale=1.0 + seed)
        dy = incoming_gradient(x)
        ours, theirs = (values_and_gradients(each.train(training), x, dy) for each in (layer, reference))
        assert_agree(ours[:3], theirs[:3])  # beta has another gradient: it goes through gamma / r
        assert list(layer.state_dict()) == list(reference.state_dict())
        assert_agree(list(layer.buffers()), list(reference.buffers()))


# 0 keeps the old statistics, 1 takes the new ones.
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@EVERY_OPTION
def test_statistics_are_batchnorms(options: dict[str, Any], dtype: torch.dtype, momentum: float | None) -> None:
    """The statistics are BatchNorm's, whatever the layer makes of them."""
    layer = with_affine(nk.POPNorm2d(8, momentum=momentum, dtype=dtype, **options))
    reference = nn.BatchNorm2d(8, momentum=momentum, dtype=dtype)
    for seed in range(3):
        x = inputs.gaussian(inputs.SHAPE_4D, dtype=dtype, seed=seed, mean=float(seed), scale=1.0 + seed)
        layer(x)
        reference(x)
        assert_agree(list(layer.buffers()), list(reference.buffers()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_batchnorm_checkpoint(half: bool, assign: bool) -> None:
    """With the same names a checkpoint loads strictly, inside a network, too, and back; statistics stay float32."""
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(with_affine(nn.BatchNorm2d(8))))
    source(torch.randn(5, 3, 7, 7))
    target = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nk.POPNorm2d(8)))
    state = source.half().state_dict() if half else source.state_dict()
    target.load_state_dict(state, assign=assign)
    assert all(torch.equal(value.to(state[key].dtype), state[key]) for key, value in target.state_dict().items())
    assert target[1][0].running_var.dtype == target[1][0].running_mean.dtype == torch.float32
    assert target[1][0].num_batches_tracked == 1
    nn.BatchNorm2d(8).load_state_dict(target[1][0].state_dict())
    with pytest.raises(RuntimeError, match="bias"):
        nk.POPNorm2d(8, center=False).load_state_dict(source[1][0].state_dict())


# Running statistics.


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_without_statistics_uses_the_batch(track: bool) -> None:
    layer = nk.POPNorm2d(8, track_running_stats=track)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32)
    in_training = layer(x)
    in_evaluation = layer.eval()(x)
    assert torch.equal(in_training, in_evaluation) is not track
    if not track:
        assert not list(layer.buffers()) and list(layer.state_dict()) == ["weight", "bias"]
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(torch.randn(1, 8, 1, 1))


def test_reset() -> None:
    layer, fresh = with_affine(nk.POPNorm2d(8)), nk.POPNorm2d(8)
    layer(inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32))
    layer.reset_running_stats()
    assert_unchanged(layer, buffers(fresh))
    assert not torch.equal(layer.weight, fresh.weight)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), fresh.parameters(), strict=True))


def test_no_graph_in_buffers() -> None:
    layer = nk.POPNorm2d(8)
    for _ in range(2):
        layer(torch.randn(5, 8, 2, 2, requires_grad=True)).sum().backward()
    assert all(not b.requires_grad and b.grad_fn is None for b in layer.buffers())


@EVERY_OPTION
def test_gradients_of_evaluation(options: dict[str, Any]) -> None:
    """Gradients of any order are right, with a training step between a call and its backward."""
    layer = with_affine(nk.POPNorm2d(2, dtype=torch.float64, **options))
    x = inputs.gaussian((3, 2, 2, 2)).requires_grad_()
    layer(x)
    layer.eval()
    parameters = dict(layer.named_parameters())

    def path(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)

    assert gradcheck(path, (x, *parameters.values()))
    assert gradgradcheck(path, (x, *parameters.values()))
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    layer.train()(10 * x)
    assert_agree(torch.autograd.grad(loss, x), expected)


def test_frozen() -> None:
    """Fine-tuning goes through a frozen layer: x still gets its gradient."""
    layer = nk.POPNorm2d(8, 2.0, eps=0.0).eval().requires_grad_(False)
    x = inputs.gaussian(inputs.SHAPE_4D, dtype=torch.float32).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(x))
    assert torch.equal(y, x / 2) and torch.equal(x.grad, torch.full_like(x, 0.5))  # fresh: mean 0, variance 1


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
