"""fold on networks: what is found, what refers to what, what tracing does not see."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import fold
from tests.convert.foldable import (
    ITERNORM,
    RESNETS,
    Block,
    Graph,
    ResNet,
    bn,
    conv,
    data,
    filled,
    hooked,
    images,
    make,
    member,
    pair,
    refused,
    resnet,
    same_state,
    state,
    trained,
)
from tests.tolerances import assert_agree
from tests.tolerances.folding import assert_folded_network


@pytest.mark.parametrize("norm", RESNETS)
def test_resnet(norm: str) -> None:
    """Every norm becomes Identity under its name; nothing else changes but the biases, and the forward is its own."""
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
    """Norms behind norms are folded, with Identity and Dropout between."""
    net = nn.Sequential(
        make(nn.Conv2d), nn.Dropout(0.5), trained(member("BatchNorm")(2)), nn.Identity(), nn.Dropout2d(0.5),
        trained(member("DBN", 4)(2)), trained(member("POPNorm")(2)), nn.ReLU(), nn.Dropout(0.5),
    ).double().eval()  # fmt: skip
    x = data(net[0])
    folded = fold(net)
    assert_agree(folded(x), net(x))
    assert [type(folded[i]) for i in (1, 2, 5, 6, 8)] == [nn.Dropout, nn.Identity, nn.Identity, nn.Identity, nn.Dropout]


def test_pop_norm_goes_into_the_next_layer() -> None:
    """That layer may have a norm behind it as well."""
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
    """The next layer pads with zeros, which would not be zeros in front of the norm."""
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
    """The folded network has all gradients, as a network without norms would."""
    folded = fold(resnet())
    folded.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


# References between modules.


class Referring(nn.Module):
    """A network with a list that is no ModuleList, a second name, a tied weight, and a value of the last call."""

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
    """A tied weight is found under whichever of its names it is read."""
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
    """A network whose control flow depends on data, around a block, a list of blocks and an activation."""

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
    """Untraceable parts inside of a traceable whole, whose own pairs are found as well."""

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
    """A module that hides what it calls from tracing."""

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
    """A network that goes through a Sequential, which tracing would show, if it were possible."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), bn().double(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all()
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
    """Each of these networks was once folded into another function. Now it is refused."""
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
    """Pairs inside of it are folded, but a norm behind it is not: a hook may change what comes out, or keep it."""
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
    """Inside of the black box each module is called once."""
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
