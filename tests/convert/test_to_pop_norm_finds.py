"""to_pop_norm: pairs where the whole cannot be traced, transposed convolutions, the classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normkernels as nk
from normkernels.convert import to_pop_norm
from tests.oracles import popnorm
from tests.tolerances import assert_agree


def batch_norms(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def pop_norms(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, nk.POPNorm1d | nk.POPNorm2d | nk.POPNorm3d)]


# Networks that cannot be traced, of parts that can.


class ConvLayer(nn.Module):
    """A layer as in the ResNet of transformers."""

    def __init__(self, c: int, out: int, act: bool = True) -> None:
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(c, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalization(self.convolution(x))
        y: Tensor = self.activation(x)
        return y


class Layer(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.shortcut = ConvLayer(c, out, act=False)
        self.layer = nn.Sequential(ConvLayer(c, out), ConvLayer(out, out, act=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.layer(hidden) + self.shortcut(hidden))


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Layer(8, 8), Layer(8, 12)])

    def forward(self, x: Tensor, output_hidden_states: bool = False, return_dict: bool = True) -> Any:
        states: tuple[Tensor, ...] = ()
        for stage in self.stages:
            if output_hidden_states:
                states += (x,)
            x = stage(x)
        return {"last": x, "states": states} if return_dict else (x, states)


class HuggingFace(nn.Module):
    """A network that checks the values of its input, and calculates a loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.encoder = ConvLayer(3, 8), Stages()
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        if not pixel_values.isfinite().all():
            raise ValueError("pixel_values: expected finite ones")
        logits = self.classifier(self.encoder(self.embedder(pixel_values))["last"])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


class Yolo(nn.Module):
    """A network that goes through a list of its layers, each of which says where it takes its input from."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(ConvLayer(3, 8), Layer(8, 8), ConvLayer(8, 8), nn.Flatten(2))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(x, dict):
            return self.loss(x, *args, **kwargs)
        for layer in self.model:
            x = layer(x)
        return x.mean(-1)

    def loss(self, batch: dict[str, Tensor], *args: Any) -> Tensor:
        return F.cross_entropy(self(batch["img"]), batch["cls"])


@pytest.mark.parametrize(("build", "layers"), [(HuggingFace, 7), (Yolo, 5)])
def test_parts_that_can_be_traced(build: Any, layers: int) -> None:
    net = build()
    names = batch_norms(net)
    made = to_pop_norm(net)
    assert len(made) == len(names) == layers and not batch_norms(net)
    assert {name.rpartition(".")[0] for name in made} == {
        name.replace("normalization", "convolution") for name in names
    }
    x = torch.randn(4, 3, 8, 8)
    result = net(x)
    result = result["logits"] if isinstance(result, dict) else result
    result.square().sum().backward()
    assert all(net.get_submodule(name).num_batches_tracked == 1 for name in made)


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel])
def test_wrappers(wrap: Any) -> None:
    net = wrap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert to_pop_norm(net) == {"module.0.norm": "module.0.layer"}


def test_an_optional_argument_and_dropout() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.bn = nn.Conv2d(3, 8, 3), nn.Dropout().eval(), nn.BatchNorm2d(8)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert x.dim() == 4
            y: Tensor = self.bn(self.drop(self.conv(x)))
            return y if mask is None else y * mask

    assert to_pop_norm(Masked()) == {"conv.norm": "conv.layer"}


def test_what_stays_where_it_cannot_be_traced_is_reported() -> None:
    net = HuggingFace()
    net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"stay as they are: 'classifier.3': .*may call one by one.*pairs=") as warned:
        made = to_pop_norm(net)
    assert len(made) == 7 and batch_norms(net) == ["classifier.3"] and warned[0].filename == __file__
    with pytest.raises(RuntimeError, match=r"'classifier' to have a forward that torch.fx can trace"):
        to_pop_norm(net)


# Transposed convolutions.


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}], ids=str)
def test_transposed_convolutions(rank: int, options: dict[str, Any]) -> None:
    """The norm has as many features as the layer reads, which are the first dimension of its weight."""
    layer = getattr(nn, f"ConvTranspose{rank}d")(6, 8, 2, bias=False, dtype=torch.float64, **options)
    weight = layer.weight.detach().clone()
    net = nn.Sequential(layer, getattr(nn, f"BatchNorm{rank}d")(8, eps=0.01).double(), nn.Tanh())
    assert to_pop_norm(net) == {"0.norm": "0.layer"}
    assert type(net[0].norm) is getattr(nk, f"POPNorm{rank}d") and net[0].norm.num_features == 6
    assert net[0].norm.eps == 0.01 and net[0].layer is layer and layer.bias.shape == (8,)
    x = torch.randn(5, 6, *(4, 3, 2)[:rank], dtype=torch.float64)
    expected = getattr(F, f"conv_transpose{rank}d")(popnorm.pop_norm(x, eps=0.01)[0], weight, **options).tanh()
    assert_agree(net(x), expected)


def test_transposed_convolutions_by_name() -> None:
    net = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 8, 2), "bn": nn.BatchNorm2d(8)})
    assert to_pop_norm(net, pairs=[("up", "bn")]) == {"up.norm": "up.layer"}
    wrong = nn.ModuleDict({"up": nn.ConvTranspose2d(8, 4, 2), "bn": nn.BatchNorm2d(8)})
    with pytest.raises(ValueError, match="'bn': expected 4 features as 'up' gives, got 8"):
        to_pop_norm(wrong, pairs=[("up", "bn")])


# The classifier.


def classifying(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, 0.02, 0.3), nn.Flatten(), nn.Linear(128, 6), *last)


@pytest.mark.parametrize("classifier", [True, "5"])
def test_classifier(classifier: bool | str) -> None:
    net = classifying(nn.ReLU(), nn.Linear(6, 4), nn.LogSoftmax(1)).double()
    last = net[5]
    weight, bias = last.weight.detach().clone(), last.bias.detach().clone()
    made = to_pop_norm(net, classifier=classifier, kappa=2.0)
    assert list(made.items()) == [("0.norm", "0.layer"), ("5.norm", "5.layer")]
    norm = net[5].norm
    assert type(norm) is nk.POPNorm1d and net[5].layer is last and type(net[3]) is nn.Linear
    assert (norm.num_features, norm.kappa, norm.eps, norm.momentum) == (6, 2.0, 0.02, 0.3)
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    features = net[:5](x)
    expected = F.linear(popnorm.pop_norm(features, kappa=2.0, eps=0.02)[0], weight, bias).log_softmax(1)
    assert_agree(net(x), expected)


def test_a_classifier_of_a_whole_that_cannot_be_traced() -> None:
    """It is the only linear layer that there is."""
    net = HuggingFace()
    made = to_pop_norm(net, classifier=True)
    assert list(made)[-1] == "classifier.2.norm" and len(made) == 8
    net(torch.randn(4, 3, 8, 8))["logits"].sum().backward()
    net = HuggingFace()
    net.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"classifier: expected one last .*, got 'classifier\.2' .*, 'spare' \(Linear"):
        to_pop_norm(net, classifier=True)


def test_a_classifier_with_a_batchnorm_has_its_norm() -> None:
    net = classifying(nn.BatchNorm1d(6))
    assert to_pop_norm(net, classifier=True) == {"0.norm": "0.layer", "3.norm": "3.layer"}
    assert len(pop_norms(net)) == 2


class Heads(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.body, self.both = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()), both
        self.head, self.other = nn.Linear(128, 4), nn.Linear(128, 4)

    def forward(self, x: Tensor, other: bool = False) -> Any:
        x = self.body(x)
        if self.both:
            return self.head(x) + self.other(x)
        return self.other(x) if other else self.head(x)


class Hidden(nn.Module):
    """A black box with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((2, 3)) if x.sum() < 1e9 else x)
        return y


@pytest.mark.parametrize(
    ("build", "classifier", "error", "said"),
    [
        (lambda: Heads(True), True, ValueError, r"got '(head|other)' \(Linear\), '(head|other)' \(Linear\)"),
        (lambda: Heads(False), True, ValueError, r"one last linear layer, or its name, got 'head' .*'other'"),
        (lambda: classifying()[:3], True, ValueError, r"a last layer that is a Linear.* got Conv2d for '0'"),
        (lambda: Yolo(), True, ValueError, r"a Linear, .* got Conv2d for 'model\.2\.convolution'"),
        (lambda: nn.Sequential(HuggingFace().embedder, Hidden()), True, ValueError, "a Linear, .* got Hidden for '1'"),
        (lambda: classifying(), "0", ValueError, "a Linear, or the name of one, got Conv2d for '0'"),
        (lambda: classifying(), "head", ValueError, "got no module of that name for 'head'"),
        (lambda: classifying(), 3, TypeError, "expected True or False, got 3"),
    ],
)
def test_no_one_classifier(build: Any, classifier: Any, error: type[Exception], said: str) -> None:
    """The model is as it was."""
    net = build()
    before = dict(net.named_modules())
    with pytest.raises(error, match=rf"classifier: .*{said}"):
        to_pop_norm(net, classifier=classifier)
    assert dict(net.named_modules()) == before
