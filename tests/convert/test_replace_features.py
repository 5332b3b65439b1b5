"""replace: a norm before the last linear layer (the paper's DF), and ConvNorm in place of convolutions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import replace
from tests.tolerances import assert_agree


class Net(nn.Module):
    """A network with any head from the last convolution to the linear layer."""

    def __init__(self, head: Callable[[Tensor], Tensor] | nn.Module, features: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3, eps=1e-3)
        self.head = head
        self.fc = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(F.relu(self.bn(self.conv(x)))))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=dtype)


class Pool(nn.Module):
    """A module as timm's, which torch.fx looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(x))


HEADS: dict[str, Callable[[], Any]] = {
    "modules": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Identity()),
    "a module of modules": Pool,
    "AvgPool2d": lambda: nn.Sequential(nn.AvgPool2d(6), nn.Dropout2d(0.1), nn.Flatten()),
    "F.adaptive_avg_pool2d": lambda: lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "F.avg_pool2d": lambda: lambda x: F.dropout(F.avg_pool2d(x, 6).view(x.size(0), -1), 0.1),
    "mean": lambda: lambda x: x.mean((2, 3)),
    "mean, from behind": lambda: lambda x: x.mean([-1, -2], keepdim=True).squeeze(-1).squeeze(-1),
    "mean by keyword": lambda: lambda x: torch.mean(x, dim=(2, 3)),
    "two means": lambda: lambda x: x.mean(3).mean(2),
    "1d": lambda: lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1).squeeze(2).contiguous(),
    "1d, mean": lambda: lambda x: x.flatten(2).mean(-1).reshape(-1, 8),
    "3d": lambda: lambda x: torch.squeeze(F.avg_pool3d(x.unsqueeze(2), (1, 6, 6))).flatten(1),
    "after a gate": lambda: lambda x: (x * x.mean((2, 3), keepdim=True)).mean((2, 3)),
    "after max pooling": lambda: lambda x: torch.reshape(F.max_pool2d(x, 2).mean((2, 3)), (-1, 8)),
}


@pytest.mark.parametrize("head", HEADS)
def test_decorrelated_features(head: str) -> None:
    net = Net(HEADS[head]())
    fc = net.fc
    assert replace(net, "IterNorm", "first", decorrelate_features=True, group_size=4) is net
    assert list(net.fc._modules) == ["norm", "layer"]
    assert net.fc.layer is fc
    df = net.fc.norm
    assert type(df) is nk.IterNorm1d
    assert (df.num_features, df.group_size, df.momentum, df.eps) == (8, 4, 0.3, 1e-3)
    seen: list[Tensor] = []
    fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert net(images()).shape == (12, 4)
    assert seen[0].mean(0).abs().max() < 1e-5  # the linear layer's input is centered
    assert df.num_batches_tracked == 1


def test_decorrelated_by_name() -> None:
    class Untraceable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    net = Untraceable(Pool()).double()
    match = "decorrelate_features: expected a model that torch.fx can trace, or the name of .*, got TraceError"
    with pytest.raises(RuntimeError, match=match):
        replace(net, "IterNorm", decorrelate_features=True)
    assert type(net.bn) is nn.BatchNorm2d
    net.fc.eval()
    replace(net, nk.DBN2d, decorrelate_features="fc", eps=0.1)
    df = net.fc.norm
    assert (type(df), type(net.bn), df.eps, df.weight.dtype) == (nk.DBN1d, nk.DBN2d, 0.1, torch.float64)
    assert not (net.fc.training or df.training or net.fc.layer.training)
    assert set(net.state_dict()) >= {"fc.layer.weight", "fc.layer.bias", "fc.norm.running_whitening"}
    assert net(images(torch.float64)).shape == (12, 4)


def test_decorrelated_in_the_form_of_the_layers() -> None:
    net = replace(Net(Pool()), "SyncDBN", decorrelate_features=True)
    assert type(net.fc.norm) is nk.SyncDBN
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net(Pool()))
    assert type(replace(net, "IterNorm", decorrelate_features=True).fc.norm) is nk.SyncIterNorm
    net = nn.DataParallel(Net(Pool()))
    assert type(replace(net, "IterNorm", decorrelate_features=True).module.fc.norm) is nk.IterNorm1d


class Constant(Net):
    """A network with a constant, which torch.fx keeps as an attribute of the model."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.tensor([2.0]))


def test_tracing_leaves_no_attributes() -> None:
    net = Constant(Pool())
    before = set(vars(net))
    replace(net, "IterNorm", decorrelate_features=True)
    assert set(vars(net)) == before


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.a, self.b = nn.BatchNorm2d(3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x).mean((2, 3))
        return self.a(x) + self.b(x)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3))) + self.fc(self.bn(x).mean((2, 3)))


class Either(Heads):
    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        x = self.bn(x).mean((2, 3))
        return self.b(x) if second else self.a(x)


NONE = "or that layer's name; got linear layers"


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (lambda: Net(nn.AdaptiveMaxPool2d(1)), f"{NONE} 'fc', and of 0 poolings the last one leads to none"),
        (lambda: Net(lambda x: x.mean((2, 3)).relu()), f"{NONE} 'fc', and of 1 poolings .* none"),
        (lambda: Net(lambda x: x.flatten(2).mean(1), 36), f"{NONE} 'fc', and of 0 poolings"),
        (lambda: Net(lambda x: x.mean((1, 2, 3), keepdim=True).expand(-1, 8, 1, 1).flatten(1)), "of 0 poolings"),
        (lambda: Net(nn.Sequential(Pool(), nn.Linear(8, 8), nn.ReLU())), "'head.1', 'fc', and of 1 .* to 'head.1'$"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), f"{NONE} none, and of 0 poolings"),
        (Heads, "leads to 'a', 'b'"),
        (Again, "linear layers 'fc', 'fc', and of 2 poolings the last one leads to 'fc'$"),
        (Either, "whatever optional arguments and shapes are, or its name; got 'a', 'b'$"),
    ],
)  # fmt: skip
def test_no_such_linear_layer(net: Callable[[], nn.Module], match: str) -> None:
    model = net()
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        replace(model, "IterNorm", decorrelate_features=True)
    assert {name: id(m) for name, m in model.named_modules()} == before


@pytest.mark.parametrize(
    ("name", "match"),
    [("conv", "expected the name of a Linear, got Conv2d"), ("", "got Net for ''"), ("fd", "no module of .*'fd'")],
)  # fmt: skip
def test_no_such_name(name: str, match: str) -> None:
    net = Net(Pool())
    with pytest.raises(ValueError, match=match):
        replace(net, "IterNorm", decorrelate_features=name)
    assert type(net.bn) is nn.BatchNorm2d


def test_features_are_reported_too(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "normkernels.convert"),
        pytest.warns(UserWarning, match="group_size 5 does not divide 8 channels: 4 in 'bn', 'fc'$"),
    ):
        replace(Net(Pool()), "IterNorm", decorrelate_features=True, group_size=5)
    assert caplog.records[-1].getMessage() == "fc: Linear(8, 4) -> IterNorm1d(8, group_size=4), Linear(8, 4)"


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3}, {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}, {"kernel_size": 1, "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2}, {"kernel_size": 2, "padding": 1, "padding_mode": "reflect"},
]  # fmt: skip


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("conv", "norm"), [(nn.Conv1d, nk.ConvNorm1d), (nn.Conv2d, nk.ConvNorm2d)])
def test_conv_norm(conv: Any, norm: Any, options: dict[str, Any]) -> None:
    layer = conv(4, 6, **options, dtype=torch.float64).eval()
    layer.weight.requires_grad_(False)
    expected = norm(4, 6, **options, dtype=torch.float64)
    expected.load_state_dict(layer.state_dict(), strict=False)
    state = torch.get_rng_state()
    net: Any = replace(nn.Sequential(layer), nk.ConvNorm2d)
    assert torch.equal(torch.get_rng_state(), state)
    new = net[0]
    assert type(new) is norm
    assert repr(new) == repr(expected)
    assert (new.weight is layer.weight, new.bias is layer.bias, new.training) == (True, True, False)
    assert new.state_dict().keys() == expected.state_dict().keys()
    x = torch.randn(2, 4, *[9] * new.weight.dim())[..., 0, 0].double()
    assert_agree(new(x), expected(x))
    assert_agree(new.affine_weight.detach(), expected.affine_weight.detach())
    assert new.affine_weight.requires_grad


def test_conv_norm_options_and_checkpoints() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(4, 4, 1))
    checkpoint = net.state_dict()
    shared = nn.ModuleList([net, net[0]])
    replace(shared, "ConvNorm", affine=False, eps=1e-3, detach_spectrum=False)
    new = net[0]
    assert shared[1] is new
    assert (new.affine_weight, new.eps, new.detach_spectrum) == (None, 1e-3, False)
    assert (type(net[1]), type(net[2])) == (nn.BatchNorm2d, nn.Conv3d)
    net.load_state_dict(checkpoint)
    with torch.device("meta"):
        net = replace(nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float16)), "ConvNorm")
    assert {(t.device.type, t.dtype) for t in net.state_dict().values()} == {("meta", torch.float16)}
