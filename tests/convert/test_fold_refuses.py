"""fold refuses what is not exact, and says which module and why."""

from __future__ import annotations

import copy
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
from tests.convert.foldable import (
    ITERNORM,
    Graph,
    bn,
    conv,
    filled,
    hooked,
    make,
    member,
    pair,
    refused,
    resnet,
    same_state,
    state,
    trained,
)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnIterNorm(nk.IterNorm2d):
    pass


def with_own_forward(module: Any, name: str = "forward") -> nn.Module:
    inherited = getattr(module, name)
    setattr(module, name, lambda *args: 2 * inherited(*args))
    return module


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


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
    "conv-forward-inside": (lambda: with_own_forward(conv(), "_conv_forward"), bn, "forward of its class in '0.conv'"),
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
    """A list has no forward, so it is not the innermost module."""
    path = FORWARDS["untraceable"][0]
    inner = Graph(lambda self, x: self.both[1](self.both[0](x)) if x.sum() else x, both=nn.ModuleList([conv(), bn()]))
    with pytest.raises(ValueError, match=r"'conv\.both\.1' .* expected 'conv' to have a forward .* got TraceError"):
        fold(Graph(path, conv=inner, bn=nn.Identity()).eval())


def test_a_forward_of_the_models_own() -> None:
    """torch.fx does not see a forward that was set on the model itself."""
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
    """A merged weight overflows in float16, the layer's own type, alone."""
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


def test_nothing_to_fold() -> None:
    """There is an error or, if not strict, a copy and a warning."""
    for net, reason in (
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), "got none|could be folded: none"),
        (fold(resnet()), "got none|could be folded: none"),
        (bn(), r"'model' \(BatchNorm2d\): expected a call of it"),
    ):
        net.eval()
        with pytest.raises(ValueError, match=reason):
            fold(net)
        with pytest.warns(UserWarning, match=reason) as warned:
            copied = fold(net, strict=False)
        assert len(warned) == 1 and warned[0].filename == __file__
        assert copied is not net and type(copied) is type(net) and same_state(copied, state(net))
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_each_reason_once() -> None:
    """A reason stands behind the names of all norms of which it is true."""
    part = Graph(lambda self, x: self.b(self.a(F.relu(self.conv(x))).relu()).relu(), conv=conv(), a=bn(), b=bn())
    other = Graph(lambda self, x: self.d(self.c(x * x) * x) * x, c=nk.IterNorm2d(8), d=bn())
    net = nn.Sequential(part, other).eval()
    with pytest.raises(ValueError) as raised:
        fold(net)
    with pytest.warns(UserWarning) as warned:
        fold(net, False)
    for said in (str(raised.value), str(warned[0].message)):
        lines = said.splitlines()[1:]
        assert len(lines) == len({line.partition(": ")[2] for line in lines}) == 2
        assert lines[0].startswith("  '0.a' (BatchNorm2d), '0.b' (BatchNorm2d): expected a convolution or linear layer")
        assert lines[1].startswith("  '1.c' (IterNorm2d), '1.d' (BatchNorm2d): expected a convolution or linear layer")


def test_a_reason_that_differs_by_names() -> None:
    """Such a reason stands once, with all the names."""
    net = nn.Sequential(*(Graph(pair, conv=Halved(8, 8, 3, padding=1), bn=bn()) for _ in range(3)), conv(), bn()).eval()
    net[1].conv = conv()
    with pytest.raises(ValueError) as raised:
        fold(net)
    (line,) = str(raised.value).splitlines()[1:]
    assert line.startswith(
        "  '0.bn' (BatchNorm2d), '2.bn' (BatchNorm2d): expected no subclass in '0.conv', '2.conv', which may compute"
    )


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected nn\.Module, got str"):
        fold("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strict: expected True or False, got 'no'"):
        fold(resnet(), strict="no")  # type: ignore[arg-type]
