"""fold: the same function without the norms, exact wherever it does not refuse."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import normkernels as nk
from normkernels.convert import fold
from normkernels.layers.sync import SyncDBN, SyncIterNorm
from tests.tolerances import assert_agree, assert_folded, assert_folded_network

LINEAR = [nn.Linear, nn.Conv1d, nn.ConvTranspose1d]
LAYERS = [*LINEAR, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d]
CHANNELS = 8  # of every norm: two groups of 4

Make = Callable[[int], Any]  # a norm for a rank: 1, 2 or 3


def member(name: str, *args: Any, **options: Any) -> Make:
    """Of a family: its 1d, 2d or 3d layer."""
    return lambda rank: getattr(nn if name.startswith("Batch") else nk, f"{name}{rank}d")(CHANNELS, *args, **options)


def bare_pop(rank: int) -> Any:
    return member("POPNorm", center=False)(rank)


NORMS: dict[str, Make] = {
    "BatchNorm": member("BatchNorm"),
    "BatchNorm-bare": member("BatchNorm", affine=False),
    "SyncBatchNorm": lambda rank: nn.SyncBatchNorm(CHANNELS),
    "IterNorm": member("IterNorm", 4),
    "IterNorm-one-group": member("IterNorm"),
    "IterNorm-bare": member("IterNorm", 2, affine=False),
    "DBN": member("DBN", 4),
    "SyncIterNorm": lambda rank: SyncIterNorm(CHANNELS, 4),
    "SyncDBN": lambda rank: SyncDBN(CHANNELS, 4),
    "POPNorm": member("POPNorm"),
    "POPNorm-uncentered": bare_pop,
    "POPNorm-unscaled": member("POPNorm", scale=False),
}
ITERNORM = NORMS["IterNorm"]


def trained(norm: Any) -> Any:
    """In evaluation, with numbers of its own everywhere; a whitening matrix that is not its transpose."""
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.2 if name == "running_var" else torch.randn_like(value))
    return norm.eval()


def rank_of(layer_type: Any) -> int:
    return 1 if layer_type is nn.Linear else int(layer_type.__name__[-2])


def make(layer_type: Any, inputs: int = 6, **options: Any) -> Any:
    size = () if layer_type is nn.Linear else (options.pop("kernel_size", 3),)
    return layer_type(inputs, options.pop("outputs", CHANNELS), *size, **{"dtype": torch.float64} | options).eval()


def data(layer: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.in_features, dtype=dtype)
    return torch.randn(2, layer.in_channels, *(7, 6, 5)[: len(layer.kernel_size)], dtype=dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], v) for k, v in before.items())


def check(layer: Any, norm: Any) -> Any:
    """The layer that takes both's place: its kind and type, another one's weights, the same function."""
    net = nn.Sequential(layer, trained(norm).double()).eval()
    before = state(net)
    folded = fold(net)
    assert type(folded) is nn.Sequential and type(folded[0]) is type(layer) and type(folded[1]) is nn.Identity
    assert not any(module.training for module in folded.modules())
    assert_folded(folded, layer, net[1], data(layer))
    assert net[0] is layer and net[1] is norm and same_state(net, before)
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in net.parameters()}
    return folded[0]


# Layers and norms.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_type", LAYERS, ids=lambda t: t.__name__)
def test_every_pair(layer_type: Any, norm: str, bias: bool) -> None:
    folded = check(make(layer_type, bias=bias), NORMS[norm](rank_of(layer_type)).double())
    assert isinstance(folded.bias, nn.Parameter)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2}, {"stride": 2}, {"dilation": 2}, {"padding": 2}, {"bias": False, "groups": 2, "stride": 3},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same"}, {"padding": (2, 0), "kernel_size": (3, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions(options: dict[str, Any]) -> None:
    """What comes in front of W x changes nothing, and groups are whole."""
    check(make(nn.Conv2d, **options), ITERNORM(2).double())


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"stride": 2, "output_padding": 1}, {"dilation": 2, "padding": 1}, {"groups": 2, "stride": 2}],
    ids=str,
)
@pytest.mark.parametrize("layer_type", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_transposed_convolutions(layer_type: Any, options: dict[str, Any]) -> None:
    """Their weights are (I, O / groups, *)."""
    check(make(layer_type, **options), ITERNORM(rank_of(layer_type)).double())


@pytest.mark.parametrize(("groups", "norm"), [(8, "BatchNorm"), (8, "POPNorm"), (4, "IterNorm-bare"), (2, "DBN")])
def test_groups_of_whole_whitening_groups(groups: int, norm: str) -> None:
    check(make(nn.Conv2d, 8, groups=groups), NORMS[norm](2).double())


def test_a_diagonal_whitening_matrix_may_be_misaligned() -> None:
    """As IterNorm has with a BatchNorm's statistics: nothing is mixed."""
    norm = trained(ITERNORM(2).double())
    norm.running_whitening.copy_(torch.diag_embed(norm.running_whitening.diagonal(dim1=1, dim2=2)))
    net = nn.Sequential(make(nn.Conv2d, 8, groups=8), norm).eval()
    assert_folded(fold(net), net[0], norm, data(net[0]))


# A norm with no layer in front of it goes into the one behind it.


def check_in_front(norm: Any, layer: Any) -> Any:
    net = nn.Sequential(trained(norm).double(), layer).eval()
    before = state(net)
    folded = fold(net)
    assert type(folded[0]) is nn.Identity and type(folded[1]) is type(layer) and same_state(net, before)
    x = data(layer)
    assert_folded_network(folded(x), net(x), layers=1, terms=layer.weight[0].numel(), d=CHANNELS)
    return folded[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer_type", [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda t: t.__name__)
def test_in_front(layer_type: Any, norm: str, bias: bool) -> None:
    layer = make(layer_type, CHANNELS, outputs=6, bias=bias)
    assert check_in_front(NORMS[norm](rank_of(layer_type)), layer).weight.shape == layer.weight.shape


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"stride": 2, "dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"padding": "valid"}],
    ids=str,
)
def test_convolutions_in_front(options: dict[str, Any]) -> None:
    check_in_front(ITERNORM(2), make(nn.Conv2d, CHANNELS, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"groups": 4},
            "expected whitening groups that divide the 2 input channels in each .* 4 groups, got misaligned",
        ),
        ({"padding": 1}, "expected no zero padding"),
    ],
)
def test_refused_in_front(options: dict[str, Any], reason: str) -> None:
    norm = ITERNORM(2)
    net = nn.Sequential(trained(norm).double(), make(nn.Conv2d, CHANNELS, **options))
    with pytest.raises(ValueError, match=f"'0' .*got the input .* into the next layer, {reason}"):
        fold(net.eval())


def test_decorrelated_features_go_into_the_classifier() -> None:
    """The paper's DF: nothing is left of it either."""
    net = nn.Sequential(
        make(nn.Conv2d, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(CHANNELS, 5),
    ).double()  # fmt: skip
    nk.convert.replace(net, "IterNorm", group_size=4, decorrelate_features=True)
    for module in net:
        for norm in (m for m in module.modules() if hasattr(m, "running_mean")):
            trained(norm)
    x, folded = torch.randn(3, 3, 7, 7, dtype=torch.float64), fold(net.eval())
    assert_folded_network(folded(x), net(x), layers=2, terms=27, d=4)
    assert not [m for m in folded.modules() if hasattr(m, "running_mean")]


def test_a_zero_gamma() -> None:
    norm = member("BatchNorm")(2).double()
    net = nn.Sequential(make(nn.Conv2d), trained(norm)).eval()
    norm.weight.data[3] = 0
    folded = fold(net)
    assert not folded[0].weight[3].any() and torch.equal(folded[0].bias[3], norm.bias[3])


@pytest.mark.parametrize("affine_conv", [nk.ConvNorm1d, nk.ConvNorm2d])
@pytest.mark.parametrize("norm", ["BatchNorm", "POPNorm", "SyncBatchNorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_norm(affine_conv: Any, norm: str, bias: bool) -> None:
    """Its weight has no say in the scale; the kernels after the filter have."""
    rank = rank_of(affine_conv)
    layer = make(affine_conv, stride=2, padding=1, bias=bias)
    layer.affine_weight.data.normal_()
    net = nn.Sequential(layer, trained(NORMS[norm](rank).double())).eval()
    folded, x = fold(net), data(layer)
    assert_agree(folded(x), net(x))
    assert type(folded[0]) is affine_conv and torch.equal(folded[0].weight, layer.weight)


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["BatchNorm", "IterNorm", "POPNorm"])
@pytest.mark.parametrize("layer_type", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d], ids=lambda t: t.__name__)
def test_rounded_once(layer_type: Any, norm: str, dtype: torch.dtype) -> None:
    """The weights of the same fold in float64, in the layer's type; of two norms behind one layer, too."""
    rank = rank_of(layer_type)
    norms = [trained(NORMS[norm](rank)), trained(ITERNORM(rank))]
    net = nn.Sequential(make(layer_type, dtype=dtype), *norms).eval()
    folded, exact = fold(net), fold(copy.deepcopy(net).double())
    for name in ("weight", "bias"):
        value = getattr(folded[0], name)
        assert value.dtype == dtype and torch.equal(value, getattr(exact[0], name).to(dtype))
    assert [type(module) for module in folded[1:]] == [nn.Identity, nn.Identity]


def test_half_types_run() -> None:
    """And give the function of the float32 network, to the type's rounding of weights, sums and outputs."""
    net = nn.Sequential(make(nn.Conv2d, dtype=torch.bfloat16), trained(ITERNORM(2).to(torch.bfloat16))).eval()
    x = data(net[0], torch.bfloat16)
    assert fold(net)(x).dtype == net(x).dtype == torch.bfloat16
    exact = copy.deepcopy(net).double()
    assert_folded(fold(net).double(), exact[0], exact[1], x.double(), weights=torch.bfloat16)


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False), (False, None)])
def test_requires_grad(weight: bool, bias: bool | None) -> None:
    net = nn.Sequential(make(nn.Conv2d, bias=bias is not None), trained(ITERNORM(2).double())).eval()
    net[0].weight.requires_grad_(weight)
    if bias is not None:
        net[0].bias.requires_grad_(bias)
    folded = fold(net)[0]
    assert folded.weight.requires_grad is weight
    assert folded.bias.requires_grad is (weight if bias is None else bias)
    assert folded.weight.is_leaf and folded.bias.is_leaf


def test_memory_format_is_kept() -> None:
    net = nn.Sequential(make(nn.Conv2d), trained(ITERNORM(2).double())).eval()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fold(net)[0].weight.is_contiguous(memory_format=torch.channels_last)


# Networks.


class Block(nn.Module):
    """Of a ResNet, with activations as functions and as a module, in place."""

    def __init__(self, c: int, out: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, padding=1, bias=False), norm(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if c == out else nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1, norm), Block(8, 8, 1, norm))
        self.layer2 = nn.Sequential(Block(8, 16, 2, norm), Block(16, 16, 1, norm))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


RESNETS: dict[str, Any] = {
    "BatchNorm": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "IterNorm": lambda c: nk.IterNorm2d(c, 8),
    "DBN": lambda c: nk.DBN2d(c, 4),
    "SyncIterNorm": lambda c: SyncIterNorm(c, 8),
    "POPNorm": nk.POPNorm2d,
}


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 3, 12, 12, dtype=dtype)


def resnet(norm: str = "IterNorm") -> ResNet:
    net = ResNet(RESNETS[norm]).double().eval()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            trained(module)
    return net


@pytest.mark.parametrize("norm", RESNETS)
def test_resnet(norm: str) -> None:
    """Every norm, under its name; nothing else changes but for the biases, and forward is its own."""
    net, x = resnet(norm), images()
    before, kinds = state(net), {name: type(m) for name, m in net.named_modules()}
    folded = fold(net)
    norms = {name for name, m in net.named_modules() if hasattr(m, "running_mean")}
    assert len(norms) == 10 and type(folded) is ResNet
    assert {name: type(m) for name, m in folded.named_modules()} == kinds | dict.fromkeys(norms, nn.Identity)
    assert_folded_network(folded(x), net(x), layers=10, terms=9 * 16, d=8)
    assert same_state(net, before) and {name: type(m) for name, m in net.named_modules()} == kinds
    convs = [name for name, kind in kinds.items() if kind is nn.Conv2d]
    expected = {f"{name}.{key}" for name in convs for key in ("weight", "bias")} | {"fc.weight", "fc.bias"}
    assert set(folded.state_dict()) == expected and torch.equal(folded.fc.weight, net.fc.weight)


def test_chain() -> None:
    """Norms behind norms, Identity and Dropout between."""
    net = nn.Sequential(
        make(nn.Conv2d), nn.Dropout(0.5), trained(member("BatchNorm")(2)), nn.Identity(), nn.Dropout2d(0.5),
        trained(member("DBN", 4)(2)), trained(member("POPNorm")(2)), nn.ReLU(), nn.Dropout(0.5),
    ).double().eval()  # fmt: skip
    x = data(net[0])
    folded = fold(net)
    assert_agree(folded(x), net(x))
    assert [type(folded[i]) for i in (1, 2, 5, 6, 8)] == [nn.Dropout, nn.Identity, nn.Identity, nn.Identity, nn.Dropout]


def test_pop_norm_goes_into_the_next_layer() -> None:
    """Which may have a norm behind it as well."""
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.Tanh(), trained(member("POPNorm")(2)), nn.Dropout(), nn.Conv2d(8, 8, 3, groups=2),
        trained(ITERNORM(2)), nn.Tanh(), trained(member("POPNorm", center=False)(2)), nn.Conv2d(8, 3, 3, padding=1),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    folded = fold(net)
    assert_agree(folded(x), net(x))
    assert [type(folded[i]) for i in (2, 5, 7)] == [nn.Identity] * 3
    assert torch.equal(folded[0].weight, net[0].weight)


def test_pop_norm_goes_into_the_layer_before_it_first() -> None:
    """There zeros that the next one pads with are none."""
    net = (
        nn.Sequential(nn.Conv2d(6, 8, 3), trained(member("POPNorm")(2)), nn.Conv2d(8, 8, 3, padding=1)).double().eval()
    )
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    folded = fold(net)
    assert_agree(folded(x), net(x))
    assert torch.equal(folded[2].weight, net[2].weight)


def test_compile() -> None:
    torch.compiler.reset()
    net, x = resnet(), images()
    with torch.no_grad():
        got = torch.compile(fold(net), backend="aot_eager", fullgraph=True)(x)
    assert_folded_network(got, net(x), layers=10, terms=9 * 16, d=8)


def test_export() -> None:
    net, x = resnet(), images()
    program = torch.export.export(fold(net), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert not any(
        "normkernels" in str(node.target) or "batch_norm" in str(node.target) for node in program.graph.nodes
    )
    assert_folded_network(program.module()(x[:3]), net(x[:3]), layers=10, terms=9 * 16, d=8)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(how: Any) -> None:
    folded, x = fold(resnet()), images()
    twin = how(folded)
    assert torch.equal(twin(x), folded(x))
    twin.load_state_dict(folded.state_dict())


def test_it_trains_on() -> None:
    """As a network without norms would."""
    folded = fold(resnet())
    folded.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


# What refers to what.


class Referring(nn.Module):
    """A list that is no ModuleList, a second name, a tied weight, and something kept from the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = make(nn.Conv2d, 8), trained(ITERNORM(2).double())
        self.bn_again = self.bn
        self.layers = [self.conv, self.bn]
        self.tied = make(nn.Conv2d, 8, bias=False)
        self.tied.weight = self.conv.weight
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        self.last = x.relu()
        return self.tied(self.last)


def test_references() -> None:
    net = Referring().eval()
    folded, x = fold(net), data(net.conv)
    assert_agree(folded(x), net(x))
    assert folded.layers[0] is folded.conv and folded.layers[1] is folded.bn is folded.bn_again
    assert type(folded.bn) is nn.Identity
    assert torch.equal(folded.tied.weight, net.conv.weight) and net.tied.weight is net.conv.weight


def test_a_tied_weight_that_is_read() -> None:
    """Under whichever of its names."""
    for path in (
        lambda self, x: pair(self, x) + self.conv.weight.sum(),
        lambda self, x: pair(self, x) + self.tied.sum(),
    ):
        part = Graph(path, conv=conv(), bn=bn())
        part.tied = part.conv.weight
        refused(part, "bn", "other use of the parameters of '0.conv'")


def test_tracing_leaves_nothing() -> None:
    net = Referring().eval()
    folded = fold(net)
    assert net.last is None and folded.last is None
    pickle.loads(pickle.dumps(folded))


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Untraceable(nn.Module):
    """With control flow that depends on data, around a block, a list of blocks and an activation alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.ModuleList([Block(8, 8, 1, nk.IterNorm2d), nn.Sequential(Block(8, 8, 1, nk.IterNorm2d))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if x.mean() < 1e9 else x
        return x


class Clipped(nn.Module):
    """An activation that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=1) if x.max() > 1 else x


class Deep(nn.Module):
    """Untraceable parts inside of a traceable whole: the whole's own pairs are found as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Clipped()
        self.inner = nn.Sequential(nn.Sequential(Untraceable()), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.act(self.bn(self.conv(x))))


@pytest.mark.parametrize("kind", [Untraceable, Deep, lambda: nn.DataParallel(Untraceable())])
def test_untraceable(kind: Any) -> None:
    net = kind().double().eval()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            trained(module)
    folded, x = fold(net), images()
    assert not any(hasattr(module, "running_mean") for module in folded.modules())
    assert_folded_network(folded(x), net(x), layers=7, terms=9 * 8, d=8)


class Hidden(nn.Module):
    """What it calls is not seen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < 1e9 else x


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = conv(), bn().double(), conv()

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + (y if aux is None else self.other(aux))


class Taps(nn.Module):
    """Goes through a Sequential, which tracing would show, if it were possible."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), bn().double(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return torch.stack(taps).sum(0)


def hook_to_nothing(module: Any) -> Any:
    module.register_forward_hook(lambda *args: None)
    return module


def doubling(module: Any) -> Any:
    module.forward = lambda x: 2 * x
    return module


def shared_with_hidden(name: str) -> nn.Module:
    part = Graph(lambda self, x: self.un(pair(self, x)), conv=conv(), bn=bn().double(), un=nn.Identity())
    part.un = Hidden(getattr(part, name))
    return part


def in_place_beside(self: Any, x: Tensor) -> Tensor:
    y, r = self.bn(x), self.act(x)
    return self.conv(y) + r


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv-in-untraceable": (lambda: shared_with_hidden("conv"), "one call of 'conv', got 2"),
    "norm-in-untraceable": (lambda: shared_with_hidden("bn"), "one call of 'bn', got 2"),
    "conv-in-hooked": (
        lambda: Graph(
            lambda self, x: self.h(pair(self, x)), bn=bn().double(), conv=(c := conv()),
            h=hook_to_nothing(nn.Sequential(c, nn.ReLU())),
        ),
        "one call of 'conv', got 2",
    ),
    "in-place": (
        lambda: Graph(in_place_beside, conv=conv(padding=0, kernel_size=1), bn=bn().double(), act=nn.ReLU(True)),
        "nothing between it and its user, got 'act'",
    ),
    "optional": (Optional, "forward depends on aux, which may be left out"),
    "isinstance": (
        lambda: Graph(lambda self, x: pair(self, x) + (self.conv(x) if isinstance(x, Tensor) else 0), conv=conv(),
                      bn=bn().double()),
        "one call of 'conv', got 2",
    ),
    "own-identity": (
        lambda: nn.Sequential(conv(), doubling(nn.Identity()), bn().double()), r"got '1' \(Identity\)",
    ),
    "taps": (Taps, "'features' to have a forward .*'model', which it cannot trace, may call one by one"),
    "meta-conv": (lambda: nn.Sequential(conv(device="meta"), bn()), "finite values in weight of '0', got a meta"),
    "nan-conv": (lambda: nn.Sequential(filled(conv(), "weight", torch.nan), bn()), "finite values in weight of '0'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_what_tracing_does_not_see(name: str) -> None:
    """Each of these was folded, into another function."""
    build, reason = UNSEEN[name]
    with pytest.raises(ValueError, match=reason):
        fold(build().eval())


def test_a_sequential_of_an_untraceable_model_by_itself() -> None:
    net = Taps().eval()
    net.features = fold(net.features)
    assert type(net.features[1]) is nn.Identity


def test_an_optional_argument_that_changes_nothing() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn().double()

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.bn(self.conv(x)) * scale

    net = Network().eval()
    x = data(net.conv)
    assert_folded_network(fold(net)(x), net(x), layers=1, terms=72, d=1)


def test_results_that_a_model_keeps_in_a_list() -> None:
    def path(self: Any, x: Tensor) -> Tensor:
        self.kept = [pair(self, x)]
        return self.kept[0]

    net = Graph(path, conv=conv(), bn=bn().double()).eval()
    x = data(net.conv)
    net(x)
    assert_folded_network(fold(net)(x), net(x), layers=1, terms=72, d=1)


def test_a_module_with_hooks_is_a_black_box() -> None:
    """Its pairs are its own business, but a norm behind it is not: a hook may change what comes out, or keep it."""
    pair = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net = nn.Sequential(pair, nn.Sequential(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)).double().eval()
    seen: list[Any] = []
    pair.register_forward_hook(lambda module, given, y: 2 * y)
    handle = net[1].register_forward_hook(lambda module, given, y: seen.append(y))
    x = images()
    with pytest.warns(UserWarning, match=r"'2' \(BatchNorm2d\): expected .* in front of it, got '1' \(Sequential\)"):
        folded = fold(net, strict=False)
    assert not seen and type(folded[0][1]) is nn.Identity
    assert_agree(folded(x), net(x))
    assert len(seen) == 2
    handle.remove()
    assert type(fold(net)[2]) is nn.Identity


def test_a_black_box_that_is_called_twice() -> None:
    """Inside, each is called once."""
    part = Graph(
        lambda self, x: self.box(self.box(x)), box=hooked(nn.Sequential(conv(), bn().double()), "forward_hook")
    )
    net = part.eval()
    trained(net.box[1])
    folded, x = fold(net), data(net.box[0])
    assert type(folded.box[1]) is nn.Identity
    assert_folded_network(folded(x), net(x), layers=2, terms=9 * 8, d=1)


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_process_groups_stay() -> None:
    net = nn.Sequential(
        make(nn.Conv2d), nn.SyncBatchNorm(8, process_group=Uncopyable()), nn.ReLU(), nn.SyncBatchNorm(8)
    )
    net[3].process_group = net[1].process_group
    net.eval()
    with pytest.warns(UserWarning, match="'3'"):
        folded = fold(net, strict=False)
    assert folded[3].process_group is net[3].process_group


# Refusals.


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnIterNorm(nk.IterNorm2d):
    pass


class Graph(nn.Module):
    """A forward of a test's own over these modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.path = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.path(self, x)


def conv(**options: Any) -> nn.Conv2d:
    return make(nn.Conv2d, 8, **{"padding": 1} | options)


def bn(**options: Any) -> nn.BatchNorm2d:
    """With a beta, so that it cannot be folded into the padded convolution behind it."""
    norm = nn.BatchNorm2d(CHANNELS, **options)
    nn.init.constant_(norm.bias, 0.5)
    return norm


def hooked(module: nn.Module, kind: str) -> nn.Module:
    getattr(module, f"register_{kind}")(lambda *args: None)
    return module


def with_own_forward(module: Any) -> nn.Module:
    module.forward = lambda x, forward=module.forward: 2 * forward(x)
    return module


def filled(norm: Any, name: str, value: float) -> Any:
    getattr(norm, name).data[3] = value
    return norm


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def pair(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x))


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "relu": (lambda self, x: self.bn(F.relu(self.conv(x))), "in front of it, got relu"),
    "method": (lambda self, x: self.bn(self.conv(x).tanh()), "in front of it, got tanh"),
    "sum": (lambda self, x: self.bn(self.conv(x) + x), "in front of it, got add"),
    "functional-dropout": (lambda self, x: self.bn(F.dropout(self.conv(x), 0.5, False)), "in front of it, got dropout"),
    "first": (lambda self, x: self.conv(self.bn(x)), "in front of it, got the input"),
    "read-twice": (lambda self, x: (y := self.conv(x)) + self.bn(y), "one user of the output of '0.conv' .* add"),
    "returned": (lambda self, x: (self.bn(y := self.conv(x)), y), "output of '0.conv' .*('1'|the output of)"),
    "in-place": (lambda self, x: self.bn((y := self.conv(x), y.mul_(2))[0]), "one user of the output of '0.conv'"),
    "conv-twice": (lambda self, x: self.conv(self.bn(self.conv(x))), "one call of '0.conv', got 2"),
    "norm-twice": (lambda self, x: self.bn(self.bn(self.conv(x))), "one call of '0.bn', got 2"),
    "both-twice": (lambda self, x: pair(self, pair(self, x)), "one call of '0.bn', got 2"),
    "weight-read": (lambda self, x: self.bn(self.conv(x)) + self.conv.weight.sum(), "other use of the param.*'0.conv'"),
    "gamma-read": (lambda self, x: self.bn(self.conv(x)) * self.bn.weight.sum(), "other use of the param.*'0.bn'"),
    "mean-read": (lambda self, x: self.bn(self.conv(x)) + self.bn.running_mean.sum(), "other use of the param.*'0.bn'"),
    "uncalled": (lambda self, x: self.conv(x), "expected a call of it, found none"),
    "untraceable": (lambda self, x: pair(self, x) if x.sum() else x, "'0' to have a forward.*TraceError"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_refused_forwards(name: str) -> None:
    forward, reason = FORWARDS[name]
    refused(Graph(forward, conv=conv(), bn=bn()), "bn", reason)


def refused(part: nn.Module, name: str, reason: str) -> None:
    """With the norm's name. Not strictly, beside a pair that is folded, it stays, and all around it."""
    net = nn.Sequential(part.double(), conv(), bn().double()).eval()
    before = dict(net.named_modules())
    where = rf"\n  '0\.{name}' \({type(part.get_submodule(name)).__name__}\): .*{reason}"
    with pytest.raises(ValueError, match=rf"model: expected all its norms to be foldable, got{where}") as raised:
        fold(net)
    assert "'2'" not in str(raised.value)
    with pytest.warns(UserWarning, match=rf"not folded and stay as they are:{where}") as warned:
        folded = fold(net, strict=False)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert type(folded[2]) is nn.Identity
    assert [type(m) for m in folded[0].modules()] == [type(m) for m in net[0].modules()]
    if not any(p.is_meta for p in net.parameters()):
        torch.testing.assert_close(folded[0].state_dict(), net[0].state_dict(), rtol=0, atol=0, equal_nan=True)
    assert dict(net.named_modules()) == before
    with pytest.raises(ValueError, match=rf"model: expected some of its norms to be foldable, got{where}"):
        fold(net[:1].eval(), strict=False)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "no-statistics": (conv, lambda: bn(track_running_stats=False), "running statistics, got"),
    "no-statistics-iternorm": (conv, lambda: nk.IterNorm2d(8, track_running_stats=False), "running statistics, got"),
    "nan": (conv, lambda: filled(bn(), "running_mean", torch.nan), "finite values in running_mean, got 1 that"),
    "infinite": (conv, lambda: filled(bn(), "running_var", torch.inf), "finite values in running_var"),
    "negative": (conv, lambda: filled(bn(), "running_var", -1.0), "merged weight within torch.float64, got up to nan"),
    "meta": (conv, lambda: bn(device="meta"), "finite values in weight, got a meta tensor"),
    "misaligned": (lambda: conv(groups=4), lambda: nk.IterNorm2d(8, 4), "2 output channels .* 4 groups, got misal"),
    "across": (lambda: conv(groups=2), lambda: nk.DBN2d(8, 8), "4 output channels .* 2 groups, got misaligned"),
    "channels": (lambda: conv(outputs=4), bn, "4 features behind Conv2d, got 8"),
    "rank": (conv, lambda: nn.BatchNorm3d(8), "norm for 4D input behind Conv2d, got BatchNorm3d"),
    "rank-iternorm": (conv, lambda: nk.IterNorm1d(8), "norm for 4D input behind Conv2d, got IterNorm1d"),
    "linear-on-images": (lambda: nn.Linear(8, 8), bn, "norm for 2D input behind Linear, got BatchNorm2d"),
    "weight-norm": (lambda: parametrizations.weight_norm(conv()), bn, "the weight of '0.conv' .*computed"),
    "old-weight-norm": (lambda: old_weight_norm(conv()), bn, "the weight of '0.conv' .*computed"),
    "pruned": (lambda: prune.l1_unstructured(conv(), "weight", amount=2), bn, "the weight of '0.conv' .*computed"),
    "pruned-bias": (lambda: prune.l1_unstructured(conv(), "bias", amount=2), bn, "the bias of '0.conv' .*computed"),
    "sub-conv": (lambda: Halved(8, 8, 3), bn, "no subclass in '0.conv'.*Halved"),
    "sub-norm": (conv, lambda: Activated(8), "no subclass.*Activated"),
    "sub-iternorm": (conv, lambda: OwnIterNorm(8), "no subclass.*OwnIterNorm"),
    "parametrized-norm": (conv, lambda: parametrizations.weight_norm(nk.IterNorm2d(8)), "no subclass.*Parametrized"),
    **{
        f"conv-{kind}": (lambda kind=kind: hooked(conv(), kind), bn, f"no hooks on '0.conv', got {said}")
        for kind, said in (
            ("forward_hook", "forward hooks"), ("forward_pre_hook", "forward pre hooks"),
            ("full_backward_hook", "backward hooks"), ("full_backward_pre_hook", "backward pre hooks"),
        )
    },
    "norm-hook": (conv, lambda: hooked(bn(), "forward_hook"), "no hooks on '0.bn', got forward hooks"),
    "conv-forward": (lambda: with_own_forward(conv()), bn, "forward of its class in '0.conv'"),
    "norm-forward": (conv, lambda: with_own_forward(bn()), "forward of its class in '0.bn'"),
    "conv-norm": (lambda: nk.ConvNorm2d(8, 8, 3), lambda: nk.IterNorm2d(8, 4), "1 output channels .* groups of 4"),
    "bare-conv-norm": (lambda: nk.ConvNorm2d(8, 8, 3, affine=False), bn, "ConvNorm2d with affine=True"),
    "instance-norm": (lambda: nn.InstanceNorm2d(8), bn, r"in front of it, got '0.conv' \(InstanceNorm2d\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_refused_modules(name: str) -> None:
    layer, norm, reason = MODULES[name]
    part = Graph(pair, conv=layer(), bn=norm())
    if isinstance(part.bn, nk.IterNorm2d | nk.DBN2d) and part.bn.running_mean is not None:
        trained(part.bn)
    refused(part, "bn", reason)


def test_the_reason_is_the_innermost_modules() -> None:
    """Which is not a list, that has no forward anyway."""
    path = FORWARDS["untraceable"][0]
    inner = Graph(lambda self, x: self.both[1](self.both[0](x)) if x.sum() else x, both=nn.ModuleList([conv(), bn()]))
    with pytest.raises(ValueError, match=r"'conv\.both\.1' .* expected 'conv' to have a forward .* got TraceError"):
        fold(Graph(path, conv=inner, bn=nn.Identity()).eval())


def test_a_forward_of_the_models_own() -> None:
    """Which torch.fx does not see."""
    net = Graph(pair, conv=conv(), bn=bn()).eval()
    net.forward = MethodType(lambda self, x: self.bn(self.conv(x).relu()), net)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'bn' .*'model' to have a forward.*not that of its class"):
        fold(net)


def test_dropout_in_training_mode_is_in_between() -> None:
    net = nn.Sequential(conv(), nn.Dropout(), bn()).eval()
    net[1].train()
    with pytest.raises(ValueError, match=r"'2' .* in front of it, got '1' \(Dropout\)"):
        fold(net)
    net[1].eval()
    hooked(net[1], "forward_hook")
    with pytest.raises(ValueError, match=r"'2' .* in front of it, got '1' \(Dropout\)"):
        fold(net)


def test_a_norm_behind_one_that_stays_stays() -> None:
    net = nn.Sequential(conv(groups=4), trained(ITERNORM(2)), bn(), nn.Identity(), bn()).eval()
    with pytest.raises(ValueError, match=r"misaligned.*\n.*'2' .* got '1' .*\n.*'4' .* got '2'"):
        fold(net)


def test_overflow() -> None:
    """In the layer's own type alone."""
    net = nn.Sequential(conv(), filled(bn(), "running_var", 1e-12), nn.ReLU()).eval()
    net[1].eps, net[0].weight.data[3] = 0.0, 0.5
    fold(net)
    reason = r"'1' \(BatchNorm2d\): expected a merged weight within torch.float16, got up to 5e\+05"
    with pytest.raises(ValueError, match=reason):
        fold(nn.Sequential(copy.deepcopy(net[0]).half(), net[1]).eval())


POP_REASONS = {
    "padded": (lambda self, x: self.conv(self.bn(x.tanh())), "got tanh; .* next layer, expected no zero pad"),
    "two-users": (lambda self, x: self.conv(y := self.bn(x.tanh())) + y, "one user of the output of '0.bn' .*'0.conv'"),
    "no-layer": (lambda self, x: self.bn(x.tanh()).relu(), "linear layer behind it, got relu"),
    "unused": (lambda self, x: (self.bn(x), x)[1], "one user of the output of '0.bn' .*, got nobody"),
    "layer-twice": (lambda self, x: self.conv(self.conv(self.bn(x))), "one call of '0.conv', got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", POP_REASONS)
def test_refused_pop_norms(name: str) -> None:
    forward, reason = POP_REASONS[name]
    refused(Graph(forward, conv=conv(), bn=trained(member("POPNorm")(2))), "bn", reason)


def test_pop_norm_in_front_of_a_transposed_convolution() -> None:
    layer = make(nn.ConvTranspose2d, 8)
    part = Graph(lambda self, x: self.conv(self.bn(x)), conv=layer, bn=trained(member("POPNorm")(2)))
    refused(part, "bn", "expected Linear or Conv1d/2d/3d behind a norm, got ConvTranspose2d")


@pytest.mark.parametrize("strict", [True, False])
def test_training_mode(strict: bool) -> None:
    net = nn.Sequential(conv(), bn(), nn.Sequential(conv(), bn()))
    with pytest.raises(ValueError, match=r"'model': expected evaluation mode.*got training mode"):
        fold(net, strict=strict)
    net.eval()[2][1].train()
    with pytest.raises(ValueError, match=r"'2\.1': expected evaluation mode"):
        fold(net, strict=strict)
    net.eval().training = True
    with pytest.raises(ValueError, match="'model': expected evaluation mode"):
        fold(net, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_to_fold(strict: bool) -> None:
    with pytest.raises(ValueError, match=r"model: expected BatchNorm.* got none"):
        fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).eval(), strict=strict)
    with pytest.raises(ValueError, match="got none"):
        fold(fold(resnet()), strict=strict)
    with pytest.raises(ValueError, match=r"'model' \(BatchNorm2d\): expected a call of it"):
        fold(bn().eval(), strict=strict)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected nn\.Module, got str"):
        fold("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strict: expected True or False, got 'no'"):
        fold(resnet(), strict="no")  # type: ignore[arg-type]
