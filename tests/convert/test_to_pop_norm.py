"""to_pop_norm: Conv-BN-act networks become POP-Conv-act, and nothing else of them changes."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normkernels as nk
from normkernels.convert import fold_pop_norm, to_pop_norm
from tests.oracles import popnorm
from tests.tolerances import assert_agree


def vgg(conv_bias: bool = False) -> nn.Sequential:
    """Build two convolutions and a linear layer, all with BatchNorm, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=conv_bias), nn.BatchNorm2d(8), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=conv_bias), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


class Block(nn.Module):
    """A block of a ResNet: both branches read the same x, and their sum is no convolution's output."""

    def __init__(self, c: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            None if c == out else nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2 = nn.Sequential(Block(8, 8, 1)), nn.Sequential(Block(8, 12, 2))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


VGG_LAYERS = ["0", "4", "8"]
RESNET_LAYERS = [
    "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0",
]  # fmt: skip


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=dtype)


def falls(net: nn.Module) -> bool:
    """Return whether a network learns twelve images by heart."""
    x, target = images(), torch.arange(12) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < 0.1 * losses[0]


def test_vgg() -> None:
    net = vgg()
    layers = {name: net.get_submodule(name) for name in VGG_LAYERS}
    made = to_pop_norm(net)
    assert made == {"0.norm": "0.layer", "4.norm": "4.layer", "8.norm": "8.layer"}
    for name, layer in layers.items():
        assert net.get_submodule(f"{name}.layer") is layer
    assert [type(net.get_submodule(name)) for name in made] == [nk.POPNorm2d, nk.POPNorm2d, nk.POPNorm1d]
    assert [net.get_submodule(name).num_features for name in made] == [3, 8, 192]
    assert all(isinstance(net[i], nn.Identity) for i in (1, 5, 9))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert isinstance(net[11], nn.Linear)  # no BatchNorm followed it
    assert falls(net)


def test_resnet() -> None:
    net = ResNet()
    made = to_pop_norm(net)
    assert sorted(made.values()) == sorted(f"{name}.layer" for name in RESNET_LAYERS)
    assert sorted(made) == sorted(f"{name}.norm" for name in RESNET_LAYERS)
    assert sorted(name for name, m in net.named_modules() if isinstance(m, nk.POPNorm2d)) == sorted(made)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert falls(net)


@pytest.mark.parametrize("options", [{}, {"kappa": 2.0}, {"scale": False}, {"center": False}], ids=str)
def test_it_computes_pop_conv_act(options: dict[str, Any]) -> None:
    """It is Figure 1 (b), in float64: the normalized input of each layer, its bias, its activation."""
    net = vgg().double()
    x = images(torch.float64)
    weights = [net[i].weight.detach().clone() for i in (0, 4, 8, 11)]
    to_pop_norm(net, **options)

    def pop(t: Tensor) -> Tensor:
        return popnorm.pop_norm(t, **options)[0]

    y = F.max_pool2d(F.conv2d(pop(x), weights[0], padding=1).tanh(), 2)
    y = F.conv2d(pop(y), weights[1], padding=1).relu().flatten(1)
    y = F.linear(F.linear(pop(y), weights[2], net[8].layer.bias).relu(), weights[3], net[11].bias)
    assert_agree(net(x), y)


def test_options_come_from_the_batchnorm() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, 0.01, None, affine=False), nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, 0.02, 0.3, track_running_stats=False),
    )  # fmt: skip
    to_pop_norm(net, kappa=2.0, center=False)
    first, second = net[0].norm, net[2].norm
    assert (first.eps, first.momentum, first.affine, first.track_running_stats) == (0.01, None, False, True)
    assert (second.eps, second.momentum, second.affine, second.track_running_stats) == (0.02, 0.3, True, False)
    for norm in (first, second):
        assert (norm.kappa, norm.center, norm.scale) == (2.0, False, True)


@pytest.mark.parametrize("bias", [True, False])
def test_bias(bias: bool) -> None:
    """The bias is b of eq. 8: BatchNorm's beta was its substitute. One that is there stays."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    before = net[2].bias
    to_pop_norm(net, bias=bias)
    assert net[2].layer.bias is before
    if bias:
        assert isinstance(net[0].layer.bias, nn.Parameter) and torch.equal(net[0].layer.bias, torch.zeros(8))
    else:
        assert net[0].layer.bias is None


class Subclass(nn.Conv2d):
    """A subclass, which may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else x


@pytest.mark.parametrize(
    ("layer", "norm", "x", "expected"),
    [
        (nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), torch.randn(4, 6, 9), nk.POPNorm1d),
        (nn.Conv3d(6, 8, 2), nn.BatchNorm3d(8), torch.randn(4, 6, 3, 4, 3), nk.POPNorm3d),
        (nn.Conv2d(6, 12, 3, groups=3), nn.BatchNorm2d(12), torch.randn(4, 6, 5, 5), nk.POPNorm2d),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), nn.BatchNorm2d(6), torch.randn(4, 6, 7, 7), nk.POPNorm2d),
        (Subclass(6, 8, 3), nn.BatchNorm2d(8), torch.randn(4, 6, 7, 7), nk.POPNorm2d),
        (parametrizations.weight_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), torch.randn(4, 6), nk.POPNorm1d),
    ],
    ids=["1d", "3d", "grouped", "depthwise", "subclass", "weight-norm"],
)  # fmt: skip
def test_kinds(layer: nn.Module, norm: nn.Module, x: Tensor, expected: type) -> None:
    """The norm has as many features as the layer has inputs, over all groups."""
    net = nn.Sequential(copy.deepcopy(layer), norm, nn.ReLU())
    shape = net(x).shape
    assert to_pop_norm(net) == {"0.norm": "0.layer"}
    assert type(net[0].norm) is expected and net[0].norm.num_features == 6 and type(net[0].layer) is type(layer)
    y = net(x)
    y.sum().backward()
    assert y.shape == shape and all(p.grad is not None for p in net.parameters())


# BatchNorms that stay.


class Several(nn.Module):
    """Every reason for which a BatchNorm stays, each under a name of its own; only ``conv`` and ``bn`` are a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.before_bn, self.before = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.read_twice, self.of_one_reader = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.of_shared, self.of_shared_too = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.to_shared_1, self.to_shared_2, self.shared_bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.up, self.of_up = nn.ConvTranspose2d(4, 4, 1), nn.InstanceNorm2d(4)
        self.mixed, self.over_positions = nn.Linear(8, 6), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = self.before(F.relu(self.before_bn(x)))
        y = self.read_twice(x)
        x = y + self.of_one_reader(y)
        x = self.of_shared_too(self.shared(F.relu(self.of_shared(self.shared(x)))))
        x = self.shared_bn(self.to_shared_1(x)) + self.shared_bn(self.to_shared_2(x))
        x = self.of_up(self.up(x))
        return self.over_positions(self.mixed(x.flatten(2)[..., :8]))


def test_what_stays() -> None:
    net = Several()
    before = dict(net.named_modules())
    assert to_pop_norm(net) == {"conv.norm": "conv.layer"}
    for name, module in before.items():
        if name not in ("conv", "bn"):
            assert net.get_submodule(name) is module, name
    assert net(images()).shape == (12, 4, 6)


def test_a_second_time_there_is_nothing() -> None:
    net = vgg()
    to_pop_norm(net)
    before = list(net.modules())
    with pytest.raises(ValueError, match="got none"):
        to_pop_norm(net)
    assert list(net.modules()) == before


# Names, modes, types, copies.


@pytest.mark.parametrize("pairs", [None, [("conv", "bn")], [("again", "bn_again")]])
def test_a_module_of_two_names(pairs: Any) -> None:
    """Whichever name forward uses, the norm is there, and the BatchNorm is not."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.again, self.bn_again = self.conv, self.bn

        def forward(self, x: Tensor) -> Tensor:
            return self.bn_again(self.again(x))

    net = Twice()
    made = to_pop_norm(net, pairs=pairs)
    (name,) = made
    assert net.get_submodule(name) is net.conv.norm is net.again.norm
    assert isinstance(net.bn, nn.Identity) and net.bn is net.bn_again
    net(images())
    assert net.conv.norm.num_batches_tracked == 1


@pytest.mark.parametrize("conv_training", [True, False])
@pytest.mark.parametrize("norm_training", [True, False])
def test_mode_is_kept(conv_training: bool, norm_training: bool) -> None:
    """Modes stay, such as those of BatchNorms that are held in evaluation."""
    net = vgg()
    net[0].train(conv_training)
    net[1].train(norm_training)
    to_pop_norm(net)
    assert net[0].training is net[0].layer.training is conv_training
    assert net[0].norm.training is norm_training
    assert net.training and net[4].norm.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_type_is_kept(dtype: torch.dtype) -> None:
    """The norm is built in the layer's type, with statistics as a layer's of that type."""
    net = vgg().to(dtype)
    made = to_pop_norm(net)
    assert {p.dtype for p in net.parameters()} == {dtype}
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(net.get_submodule(name).running_var.dtype == statistics for name in made)
    assert net(images(dtype)).dtype == dtype


def test_device_is_kept() -> None:
    net = vgg().to("meta")
    to_pop_norm(net)
    assert all(p.is_meta for p in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(how: Any) -> None:
    net = vgg()
    twin = how(net)
    to_pop_norm(net)
    assert isinstance(twin[1], nn.BatchNorm2d)  # it was copied before
    other = how(net)
    x = images()
    assert torch.equal(net(x), other(x)) and list(net.state_dict()) == list(other.state_dict())
    other(x)
    assert net[0].norm.num_batches_tracked == 1 and other[0].norm.num_batches_tracked == 2
    to_pop_norm(twin)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_it_folds_away() -> None:
    """The returned names serve to fold: after training, norms before unpadded layers cost nothing."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    net = net.double()
    made = to_pop_norm(net)
    net(images(torch.float64))
    x = images(torch.float64)
    expected = net.eval()(x)
    for norm, layer in made.items():
        folded = fold_pop_norm(net.get_submodule(norm), net.get_submodule(layer))
        net.set_submodule(norm, nn.Identity())
        net.set_submodule(layer, folded)
    assert_agree(net(x), expected)


# Without tracing.


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8)))
        self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.bn(self.conv(x)) if x.mean() < 1e9 else x


def test_untraceable() -> None:
    net = Untraceable()
    with pytest.raises(RuntimeError, match=r"torch.fx can trace.*TraceError.*pairs="):
        to_pop_norm(net)
    assert to_pop_norm(net, pairs=iter([("conv", "bn"), ("block.conv", "block.bn")])) == {
        "conv.norm": "conv.layer", "block.conv.norm": "block.conv.layer",
    }  # fmt: skip
    net(images())
    assert net.conv.norm.num_batches_tracked == net.block.conv.norm.num_batches_tracked == 1
    assert isinstance(net.bn, nn.Identity) and isinstance(net.block.bn, nn.Identity)


def test_pairs_choose() -> None:
    """Pairs choose some of those that tracing finds."""
    net = vgg()
    assert to_pop_norm(net, pairs=[("4", "5")]) == {"4.norm": "4.layer"}
    assert isinstance(net[1], nn.BatchNorm2d) and isinstance(net[0], nn.Conv2d)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def mixed() -> nn.Module:
    """Return a good pair, and modules that make none."""
    return nn.ModuleDict({
        "conv": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "conv2": nn.Conv2d(8, 8, 3), "narrow": nn.BatchNorm2d(4),
        "sync": nn.SyncBatchNorm(8), "act": WithActivation(8), "instance": nn.InstanceNorm2d(8),
        "up": nn.ConvTranspose2d(8, 8, 3), "lazy": nn.LazyConv2d(8, 3), "bn2": nn.BatchNorm2d(8),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "expected", "got"),
    [
        ({"pairs": []}, ValueError, "a convolution or linear layer", "none"),
        ({"pairs": ["conv", "bn"]}, TypeError, "names of a layer and of the BatchNorm", "'conv'"),
        ({"pairs": {"conv": "bn"}}, TypeError, "names of a layer and of the BatchNorm", "'conv'"),
        ({"pairs": [("conv", "bn", "bn")]}, TypeError, "names of a layer and of the BatchNorm", "('conv', 'bn', 'bn')"),
        ({"pairs": [("conv", "bn"), ("conv3", "bn2")]}, ValueError, "names of modules of the model", "'conv3'"),
        ({"pairs": [("conv", "bn"), ("", "bn2")]}, ValueError, "names of modules of the model", "''"),
        ({"pairs": [("conv", "bn"), ("conv2", 3)]}, ValueError, "names of modules of the model", "3"),
        ({"pairs": [("conv", "bn"), ("bn2", "conv2")]}, ValueError, "'bn2': expected Linear or Conv1d", "BatchNorm2d"),
        ({"pairs": [("conv", "bn"), ("instance", "bn2")]}, ValueError, "Linear or Conv1d/2d/3d", "InstanceNorm2d"),
        ({"pairs": [("conv", "bn"), ("conv2", "instance")]}, ValueError, "BatchNorm1d/2d/3d", "InstanceNorm2d"),
        ({"pairs": [("conv", "bn"), ("conv2", "sync")]}, ValueError, "BatchNorm1d/2d/3d", "SyncBatchNorm"),
        ({"pairs": [("conv", "bn"), ("conv2", "act")]}, ValueError, "BatchNorm1d/2d/3d", "WithActivation"),
        ({"pairs": [("conv", "bn"), ("conv2", "narrow")]}, ValueError, "8 features as 'conv2' gives", "4"),
        ({"pairs": [("conv", "bn"), ("conv", "bn2")]}, ValueError, "each module in one of them", "'conv' in 2"),
        ({"pairs": [("conv", "bn"), ("conv2", "bn")]}, ValueError, "each module in one of them", "'bn' in 2"),
        ({"pairs": [("conv", "bn"), ("lazy", "bn2")]}, ValueError, "at least 1", "0"),
        ({"kappa": 0.5}, ValueError, "kappa: expected", "0.5"),
        ({"center": False, "scale": False}, ValueError, "center, scale", "False"),
        ({"center": "no"}, TypeError, "center: expected True or False", "'no'"),
        ({"bias": "no"}, TypeError, "bias: expected True or False", "'no'"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], expected: str, got: str) -> None:
    """The model is as it was, even where pairs before the wrong one were good."""
    net = mixed()
    before = dict(net.named_modules()), [name for name, _ in net.named_parameters()]
    with pytest.raises(error) as raised:
        to_pop_norm(net, **{"pairs": [("conv", "bn")]} | change)
    assert expected in str(raised.value) and got in str(raised.value)
    assert (dict(net.named_modules()), [name for name, _ in net.named_parameters()]) == before


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"model: expected nn\.Module, got str"):
        to_pop_norm("resnet18")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        to_pop_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match="'1': expected BatchNorm1d/2d/3d, got SyncBatchNorm"):
        to_pop_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)))
    with pytest.raises(ValueError, match="'1': expected BatchNorm1d/2d/3d, got WithActivation"):
        to_pop_norm(nn.Sequential(nn.Conv2d(3, 8, 3), WithActivation(8)))
