"""replace names what it refuses, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

import normkernels as nk
from normkernels.convert import replace


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with an activation, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class MyIterNorm2d(nk.IterNorm2d):
    pass


def net(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), *last)


def refused(model: Any, error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    """Check that replace raises, and that nothing of the model has changed."""
    before = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    state = {name: value.clone() for name, value in model.state_dict().items()} if before else {}
    attributes = set(vars(model)) if before else set()
    with pytest.raises(error, match=match):
        replace(model, *(args or ("IterNorm",)), **options)
    if before:
        assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in before.items()}
        assert set(vars(model)) == attributes
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("norm", "error", "match"),
    [
        ("iternorm", ValueError, "norm: expected a layer class of this package, or one of 'BatchNorm', .*, got 'iter"),
        ("", ValueError, "norm: expected"),
        (nn.GroupNorm, ValueError, "norm: expected .*got <class 'torch.nn.modules.normalization.GroupNorm'>"),
        (MyIterNorm2d, ValueError, "norm: expected .*MyIterNorm2d"),
        (nk.IterNorm2d(8), TypeError, "norm: expected .*got IterNorm2d"),
        (None, TypeError, "norm: expected .*got NoneType"),
    ],
)  # fmt: skip
def test_norm(norm: Any, error: type[Exception], match: str) -> None:
    refused(net(), error, match, norm)


@pytest.mark.parametrize(
    ("where", "error", "match"),
    [
        ("last", ValueError, "where: expected one of all, first, got 'last'"),
        (1, TypeError, 'where: expected "all", "first" or a function of name and module, got 1'),
        (None, TypeError, "where: expected .*got None"),
        (lambda name, m: None, TypeError, "where: expected True or False for '1', got None"),
        (lambda name, m: 1, TypeError, "where: expected True or False for '1', got 1"),
        (lambda name, m: False, ValueError, "where: expected True for some of '1', '3', got none"),
    ],
)
def test_where(where: Any, error: type[Exception], match: str) -> None:
    refused(net(nn.BatchNorm2d(8)), error, match, "IterNorm", where)


@pytest.mark.parametrize(
    ("norm", "options", "error", "match"),
    [
        ("IterNorm", {"kappa": 2.0}, TypeError, "'1': options: expected some of num_iter.* of IterNorm2d, got 'k"),
        ("IterNorm", {"device": "cpu"}, TypeError, "'1': options: expected .*got 'device'"),
        ("IterNorm", {"process_group": None}, TypeError, "'1': options: expected .*got 'process_group'"),
        ("SyncIterNorm", {"process_group": 3}, TypeError, "'1': process_group: expected"),
        ("IterNorm", {"eps": -1.0}, ValueError, "'1': eps: expected .* got -1"),
        ("IterNorm", {"momentum": "x"}, TypeError, "'1': momentum: expected a number, got 'x'"),
        ("IterNorm", {"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
        ("IterNorm", {"group_size": 2.0}, TypeError, "group_size: expected an int, got 2.0"),
        ("POPNorm", {"group_size": 4}, ValueError, "group_size: expected None for POPNorm, .* no groups, got 4"),
        ("ConvNorm", {"group_size": 4}, ValueError, "group_size: expected None for ConvNorm, .* got 4"),
        ("ConvNorm", {"stride": 2}, TypeError, "'0': options: .* affine, eps, detach_spectrum of ConvNorm2d, got 's"),
        ("ConvNorm", {"eps": "x"}, TypeError, "'0': eps: expected"),
        ("POPNorm", {"decorrelate_features": True}, ValueError, "decorrelate_features: expected IterNorm, .*got P"),
        ("ConvNorm", {"decorrelate_features": True}, ValueError, "decorrelate_features: expected .*got ConvNorm"),
        ("IterNorm", {"decorrelate_features": None}, TypeError, "decorrelate_features: expected True or False, got N"),
    ],
)  # fmt: skip
def test_options(norm: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    refused(net(), error, match, norm, **options)


def test_the_model() -> None:
    refused("net", TypeError, "model: expected nn.Module, got str")
    nothing = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(8)))
    expected = "model: expected BatchNorm or another normalization of batches to make DBN of, got layers of the kinds "
    refused(nothing, ValueError, expected + "Conv2d, GroupNorm, InstanceNorm2d, ReLU$", "DBN")
    refused(
        nn.Sequential(nn.Linear(3, 4)), ValueError, "expected Conv1d or Conv2d to make ConvNorm .*Linear$", "ConvNorm"
    )
    refused(nn.Sequential(nn.Conv3d(3, 4, 1)), ValueError, "expected Conv1d or Conv2d .*Conv3d$", nk.ConvNorm2d)


@pytest.mark.parametrize(
    ("layer", "family", "options"),
    [
        (nn.BatchNorm2d(8), "BatchNorm", {}),
        (nk.IterNorm2d(8), "IterNorm", {"group_size": 4}),
        (nk.ConvNorm2d(3, 8, 1), "ConvNorm", {}),
        (nn.SyncBatchNorm(8), "BatchNorm", {}),
        (nk.SyncIterNorm(8), "IterNorm", {}),
    ],
)  # fmt: skip
def test_all_of_the_family_already(layer: nn.Module, family: str, options: dict[str, Any]) -> None:
    kind = type(layer).__name__
    match = f"model: expected layers of another family to make {family} of, got {kind}, of that family already"
    back = "; of those that synchronize the only way back is a new network that loads the state_dict"
    refused(nn.Sequential(layer), ValueError, f"^{match}{back if 'Sync' in kind else ''}$", family, **options)


def test_the_way_back_of_those_that_synchronize() -> None:
    source, new = nk.SyncIterNorm(8), nk.IterNorm2d(8)
    source.running_whitening.mul_(3)
    new.load_state_dict(source.state_dict())
    assert torch.equal(new.running_whitening, source.running_whitening)


@pytest.mark.parametrize("held", [
    lambda m: [m["conv"], m["bn"]], lambda m: (torch.relu, m["bn"]), lambda m: {"norm": m["bn"]},
    lambda m: {"a": [m["bn"]]}, lambda m: [(m["conv"], m["bn"])],
])  # fmt: skip
def test_references_beside_the_submodules(held: Callable[[nn.ModuleDict], Any]) -> None:
    """A forward may go over such a list, and would go on with the old layer."""
    inner = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "bn": nn.BatchNorm2d(8)})
    inner.path = held(inner)
    match = "'3': expected '3.bn' as a submodule alone, got it in 'path', too, which would keep the old layer"
    refused(net(inner), ValueError, match)
    replace(net(inner), "IterNorm", "first")  # the first norm is another one
    inner.path = [inner["conv"]]
    replace(net(inner), "IterNorm")


def test_references_in_the_model_itself() -> None:
    model = net()
    object.__setattr__(model, "first", model[1])
    refused(model, ValueError, "'model': expected '1' as a submodule alone, got it in 'first', too")
    model = net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model.heads = [model[5]]
    match = "'model': expected '5' as a submodule alone, got it in 'heads'"
    refused(model, ValueError, match, "IterNorm", decorrelate_features=True)


def test_a_model_that_is_wrapped_already() -> None:
    """DDP synchronizes a list of buffers made at the beginning, FSDP puts parameters into the modules there were."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        match = "expected a model that is wrapped afterwards, got one inside of"
        refused(wrapped, ValueError, f"'model': {match} DistributedDataParallel")
        refused(nn.Sequential(wrapped), ValueError, f"'0': {match} DistributedDataParallel")
        sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=f"'model': {match} FSDPModule"):
            replace(sharded, "IterNorm")
    finally:
        dist.destroy_process_group()


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    parametrize.register_parametrization(layer, "weight", nn.Softplus(), unsafe=True)
    return layer


def hooked(register: str, *args: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.BatchNorm2d(8)
        getattr(layer, register)(*args or (lambda *_: None,))
        return layer

    return make


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.forward = torch.relu
    return layer


def extended() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.register_buffer("seen", torch.zeros(8))
    return layer


def noted() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.note = 3
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.BatchNorm2d(8), "weight", 0.5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BatchNormAct2d(8), "expected a class of torch or normkernels itself, got BatchNormAct2d, which may"),
        (parametrized, "got ParametrizedBatchNorm2d"),
        (lambda: nn.LazyBatchNorm2d(), "expected a layer with parameters, got LazyBatchNorm2d before its first batch"),
        (hooked("register_forward_hook"), "expected a plain BatchNorm2d, got one with forward hooks of its own"),
        (hooked("register_forward_pre_hook"), "got one with forward pre hooks"),
        (hooked("register_full_backward_hook"), "got one with backward hooks"),
        (hooked("register_full_backward_pre_hook"), "got one with backward pre hooks"),
        (hooked("register_state_dict_post_hook"), "got one with state dict hooks"),
        (hooked("register_state_dict_pre_hook"), "got one with state dict pre hooks"),
        (hooked("register_load_state_dict_pre_hook"), "got one with load state dict pre hooks"),
        (hooked("register_load_state_dict_post_hook"), "got one with load state dict post hooks"),
        (patched, "got one with forward of its own"),
        (extended, "got one with seen of its own"),
        (noted, "got one with note of its own"),
        (pruned, "got one with forward pre hooks, weight, weight_mask, weight_orig of its own"),
    ],
)  # fmt: skip
def test_a_layer_that_does_more(make: Callable[[], nn.Module], match: str) -> None:
    model = net(nn.Sequential(make()))
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"'3.0': .*{match}"):
        replace(model, "IterNorm")
    assert {name: id(m) for name, m in model.named_modules()} == before
    replace(model, "IterNorm", lambda name, m: name == "1")
    assert type(model[1]) is nk.IterNorm2d
    assert id(model[3][0]) == before["3.0"]


@pytest.mark.parametrize("family", ["BatchNorm", "DBN", "POPNorm"])
def test_what_every_layer_has_is_not_its_own(family: str) -> None:
    """Neither that nor marks that libraries leave keep a layer from being replaced."""
    model = net(nk.IterNorm1d(8, 1), nk.DBN3d(8, 1), nk.POPNorm2d(8), nn.BatchNorm1d(8))
    model.apply(lambda m: setattr(m, "_is_hf_initialized", True))
    replace(model, family)
    assert [type(m).__name__ for m in model[3:]] == [family + rank for rank in ("1d", "3d", "2d", "1d")]
    model = net(nk.SyncIterNorm(8, 1), nk.SyncDBN(8, 1))
    assert type(replace(model, "SyncBatchNorm")[4]) is nn.SyncBatchNorm
    assert type(replace(model, "SyncDBN")[4]) is nk.SyncDBN
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"))
    assert type(replace(model, "ConvNorm")[0]) is nk.ConvNorm1d


def test_a_lazy_layer_after_its_first_batch() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(4, 8, 2, 2))
    assert type(replace(model, "IterNorm")[0]) is nk.IterNorm2d


def test_convolutions_that_do_more() -> None:
    class Standardized(nn.Conv2d):
        pass

    refused(net(Standardized(8, 8, 1)), ValueError, "'3': expected a class of torch .*got Standardized", "ConvNorm")
    weighted = net(parametrizations.weight_norm(nn.Conv2d(8, 8, 1)))
    refused(weighted, ValueError, "'3': .*got ParametrizedConv2d", "ConvNorm")
    with pytest.raises(
        ValueError, match="'0': expected a layer with parameters, got LazyConv2d before its first batch"
    ):
        replace(nn.Sequential(nn.LazyConv2d(8, 1)), "ConvNorm")
    pruned = net(prune.l1_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.5))
    refused(
        pruned, ValueError, "'3': expected a plain Conv2d, got one with forward pre hooks, weight, weight_m", "ConvNorm"
    )
    complex_net = nn.Sequential(nn.Conv2d(3, 8, 1, dtype=torch.complex64))
    refused(complex_net, TypeError, "'0': parameters of the layer: expected float16, ", "ConvNorm")


def test_pop_norm_does_not_synchronize() -> None:
    match = "'0': expected a family that synchronizes in place of SyncBatchNorm, got POPNorm, which does not"
    refused(nn.Sequential(nn.SyncBatchNorm(8)), ValueError, match, "POPNorm")
    refused(nn.Sequential(nk.SyncDBN(8)), ValueError, "in place of SyncDBN", "POPNorm")


def test_whitening_that_batch_norm_cannot_do() -> None:
    layer = nk.IterNorm2d(8, 4, dtype=torch.float64)
    layer(torch.randn(9, 8, 3, 3, dtype=torch.float64))
    model = net(layer)
    match = r"'3': expected running_whitening with no entries outside of blocks of 1 channels, got some of up to 0\.\d"
    refused(model, ValueError, match, "BatchNorm")
    refused(model, ValueError, "'3': expected running_whitening with no .* blocks of 2 channels", "DBN", group_size=2)
    replace(model, "BatchNorm", lambda *_: True, track_running_stats=False)
    assert type(model[3]) is nn.BatchNorm2d


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf"), 400.0])
def test_whitening_of_no_variance(value: float) -> None:
    """400 > eps^-1/2 = 316 would need a variance below 0."""
    layer = nk.IterNorm2d(8, 1)
    layer.running_whitening[3] = value
    model = net(layer)
    with pytest.raises(ValueError, match=r"'3': .*running_whitening .* of a variance of at least 0 with eps=1e-05"):
        replace(model, "BatchNorm")
    assert model[3] is layer


def test_statistics_beyond_the_new_layers_type() -> None:
    """A variance of 400^2 is above float16's largest number."""
    layer = nk.IterNorm2d(8, 8).half()
    layer.running_whitening /= 400
    match = r"'3': expected running_var that is finite in torch\.float16, got inf"
    refused(net().half().append(layer), ValueError, match, "BatchNorm", lambda name, _: name == "3")
    new: Any = replace(nn.Sequential(layer.bfloat16()), "BatchNorm")[0]
    assert torch.equal(new.running_var, torch.full((8,), 160000.0).bfloat16())  # rounded
    broken = nn.BatchNorm2d(8)
    broken.running_mean[1] = float("nan")
    with pytest.raises(ValueError, match=r"'model': expected running_mean that is finite in torch\.float32, got nan"):
        replace(broken, "IterNorm")


def test_an_error_in_the_last_layer_leaves_the_first_as_it_was() -> None:
    refused(net(nn.BatchNorm2d(8, momentum=3.0)), ValueError, "'3': momentum: expected a finite number within")
