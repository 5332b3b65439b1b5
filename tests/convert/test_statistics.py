"""update_norm_stats: what update_bn does for BatchNorm, for every layer, and nothing lost on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import normkernels as nk
from normkernels.convert import update_norm_stats
from tests.tolerances import assert_identity

NORMS = {
    "IterNorm2d": lambda: nk.IterNorm2d(8, 4, momentum=0.3),
    "DBN2d": lambda: nk.DBN2d(8, 4, momentum=None),
    "POPNorm2d": lambda: nk.POPNorm2d(8, momentum=0.2),
    "BatchNorm2d": lambda: nn.BatchNorm2d(8, momentum=0.1),
}


def network(*norms: nn.Module) -> nn.Sequential:
    """Build a network that has seen two batches in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.ReLU(), nn.Dropout(0.5)).double()
    for batch in batches(2, seed=5):
        net(batch)
    return net


def batches(count: int = 3, seed: int = 0, samples: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, 3, 6, 6, generator=generator, dtype=torch.float64) + i for i in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def conventions(model: nn.Module) -> list[Any]:
    return [(module.training, getattr(module, "momentum", "none")) for module in model.modules()]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_is_update_bns(training: bool) -> None:
    """BatchNorm's statistics are those of update_bn, bit for bit."""
    ours = network(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=None, affine=False))
    theirs = copy.deepcopy(ours)
    for model, update in ((ours, update_norm_stats), (theirs, update_bn)):
        model.train(training)
        torch.manual_seed(3)  # for the dropout
        update(batches(), model)
    assert_same(state(ours), state(theirs))
    assert conventions(ours) == conventions(theirs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "generator"])
def test_average_over_the_loader(norm: str, form: str) -> None:
    """The statistics are the mean of what each batch alone gives a layer."""
    net = network(NORMS[norm]())
    before, modes = state(net), conventions(net)
    data: Any = batches()
    alone = []
    for batch in data:
        twin = NORMS[norm]().double()
        twin.momentum = 1.0
        twin(net[0](batch))
        alone.append([value for value in twin.buffers() if value.is_floating_point()])
    if form == "tuple":
        data = [(batch, "label") for batch in data]
    elif form == "list":
        data = [[batch] for batch in data]
    elif form == "generator":
        data = (batch for batch in data)
    update_norm_stats(data, net)
    got = [value for value in net[1].buffers() if value.is_floating_point()]
    for i, values in enumerate(zip(*alone, strict=True)):
        assert_identity(got[i], torch.stack(values).mean(0))
    assert net[1].num_batches_tracked == 3
    assert conventions(net) == modes
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_device() -> None:
    """Batches are moved with their own method."""

    class Batch:
        def __init__(self, value: Tensor) -> None:
            self.value = value

        def to(self, device: str) -> Tensor:
            assert device == "cpu"
            return self.value

    net, other = (network(nk.IterNorm2d(8, 4)) for _ in range(2))
    update_norm_stats([(Batch(batch), 0) for batch in batches()], net, "cpu")
    update_norm_stats(batches(), other)
    assert_same(state(net), state(other))


def test_averaged_model() -> None:
    """This is the main use: weights averaged over training, whose statistics nobody has seen."""
    net = network(nk.IterNorm2d(8, 4), nn.Conv2d(8, 8, 1), nk.POPNorm2d(8), nn.BatchNorm2d(8))
    average = AveragedModel(net)
    with torch.no_grad():
        net[0].weight.mul_(3)
    average.update_parameters(net)
    update_norm_stats(batches(), average)
    expected = copy.deepcopy(average.module).train()
    for layer in (expected[1], expected[3], expected[4]):
        layer.reset_running_stats()
        layer.momentum = None
    for batch in batches():
        expected(batch)
    assert_same(state(average.module), state(expected))
    assert all(layer.num_batches_tracked == 3 for layer in (average.module[1], average.module[3]))


def test_modes_one_by_one() -> None:
    """Frozen layers are estimated, too, and stay frozen, where update_bn puts the whole model into one mode."""
    net = network(nk.IterNorm2d(8, 4), nn.BatchNorm2d(8))
    net[1].eval()
    modes = conventions(net)
    update_norm_stats(batches(), net)
    assert conventions(net) == modes and net.training and not net[1].training
    assert net[1].num_batches_tracked == net[2].num_batches_tracked == 3


def test_no_graph() -> None:
    net = network(nk.IterNorm2d(8, 4))
    grads = []
    net.register_forward_hook(lambda module, args, out: grads.append(out.requires_grad))
    update_norm_stats(batches(), net)
    assert grads == [False] * 3 and torch.is_grad_enabled()
    assert all(not value.requires_grad for value in net.buffers())


def test_layers_that_no_batch_reaches_keep_theirs() -> None:
    """update_bn would leave them at mean 0 and variance 1, and so would a batch of NaN."""
    net = network(nk.IterNorm2d(8, 4))
    net.aside = copy.deepcopy(net[1])
    net.aside.forward = lambda x: x
    before = state(net.aside)
    update_norm_stats(batches(), net)
    assert_same(state(net.aside), before)
    assert net[1].num_batches_tracked == 3

    kept = state(net)
    with pytest.raises(ValueError, match="that reach the normalization layers with finite values, got 3 batches"):
        update_norm_stats([torch.full_like(batch, float("nan")) for batch in batches()], net)
    assert_same(state(net), kept)


def test_batches_that_are_not_finite() -> None:
    """One such batch spoils BatchNorm's average, so its statistics stay; other layers leave the batch out."""
    net = network(nn.BatchNorm2d(8), nk.IterNorm2d(8, 4))
    before, kept = state(net[1]), conventions(net)
    data = batches()
    data[1][0, 0, 0, 0] = float("nan")
    update_norm_stats(data, net)
    assert_same(state(net[1]), before)
    assert net[2].num_batches_tracked == 2 and conventions(net) == kept
    data[1] = torch.full_like(data[1], 1e200)  # its variance alone overflows
    update_norm_stats(data, net)
    assert_same(state(net[1]), before)


@pytest.mark.parametrize("norm", list(NORMS))
def test_layers_frozen_by_hand(norm: str) -> None:
    """Such layers use a batch's statistics, and update none."""
    net = network(NORMS[norm]())
    net[1].track_running_stats = False
    before = state(net)
    with pytest.raises(ValueError, match="layer that tracks running statistics, got none"):
        update_norm_stats(batches(), net)
    net.insert(2, NORMS[norm]().double())
    frozen = state(net[1])
    update_norm_stats(batches(), net)
    assert_same(state(net[1]), frozen)
    assert net[2].num_batches_tracked == 3 and all(torch.equal(before[f"1.{name}"], v) for name, v in frozen.items())


def interrupted() -> Iterator[Tensor]:
    yield from batches(2)
    raise KeyboardInterrupt


def failing(net: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        if module.num_batches_tracked == 2:
            raise RuntimeError("out of memory")

    net[2].register_forward_pre_hook(hook)
    return batches()


LOADERS: dict[str, tuple[Any, Any]] = {
    "empty": (lambda net: [], ValueError),
    "loader-raises": (lambda net: interrupted(), KeyboardInterrupt),
    "model-raises": (failing, RuntimeError),
    "wrong-shape": (lambda net: [*batches(), torch.ones(2, 5)], RuntimeError),
    "empty-tuple": (lambda net: [*batches(), ()], ValueError),
    "not-a-loader": (lambda net: 3, TypeError),
}


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_lost(what: str, training: bool) -> None:
    """Statistics, counters, modes and momenta are as before after any exception."""
    loader, error = LOADERS[what]
    net = network(nk.IterNorm2d(8, 4), nn.BatchNorm2d(8), nk.DBN2d(8, 4, momentum=None)).train(training)
    net[2].train(not training)
    before, modes = state(net), conventions(net)
    with pytest.raises(error):
        update_norm_stats(loader(net), net)
    assert_same(state(net), before)
    assert conventions(net) == modes


def test_refusals() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nk.IterNorm2d(8, 4, track_running_stats=False), nk.ConvNorm2d(8, 8, 3))
    with pytest.raises(ValueError, match=r"model: expected a BatchNorm, IterNorm, DBN or POP-Norm .*, got none"):
        update_norm_stats(batches(), bare)
    with pytest.raises(TypeError, match=r"model: expected nn\.Module, got function"):
        update_norm_stats(batches(), lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loader: expected batches, or tuples that begin with one, got \(\)"):
        update_norm_stats([()], network(nk.IterNorm2d(8, 4)))
    with pytest.raises(ValueError, match="got 0 batches"):
        update_norm_stats([], network(nk.IterNorm2d(8, 4)))
