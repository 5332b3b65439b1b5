"""replace: BatchNorm becomes another family and back, and a network keeps all that it had."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import normkernels as nk
from normkernels.convert import replace
from tests.tolerances import assert_agree

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FAMILIES: dict[str, tuple[type[nn.Module], ...]] = {
    "IterNorm": (nk.IterNorm1d, nk.IterNorm2d, nk.IterNorm3d),
    "DBN": (nk.DBN1d, nk.DBN2d, nk.DBN3d),
    "POPNorm": (nk.POPNorm1d, nk.POPNorm2d, nk.POPNorm3d),
    "SyncIterNorm": (nk.SyncIterNorm,) * 3,
    "SyncDBN": (nk.SyncDBN,) * 3,
}
SAME_IN_EVALUATION = [name for name in FAMILIES if name != "POPNorm"]


class Net(nn.Module):
    """A network with BatchNorm2d of its own, in a list, nested, and shared by two branches; and BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)), nn.ReLU()])
        self.left, self.right = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
        self.bn_left = nn.BatchNorm2d(12, affine=False)
        self.branches = nn.ModuleDict({"right": self.bn_left})
        self.fc1, self.bn2, self.fc = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.blocks[1](self.blocks[0](x))
        x = F.relu(self.bn_left(self.left(x)) + self.branches["right"](self.right(x)))
        return self.fc(F.relu(self.bn2(self.fc1(x.mean((2, 3))))))


NAMES = ["bn1", "blocks.0.1", "bn_left", "bn2"]


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=dtype)


def trained(dtype: torch.dtype = torch.float64) -> Net:
    """Return a network whose running statistics and parameters are not the initial ones."""
    net = Net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(3 * images(dtype) + 1).square().mean().backward()
        optimizer.step()
    return net


def norm(rank: int = 2, channels: int = 8, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    layer = BATCH_NORMS[rank - 1](channels, dtype=dtype, **options)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    for _ in range(2):
        layer(5 * torch.randn(16, channels, *[3] * (rank if rank > 1 else 0), dtype=dtype) - 2)
    return layer


def data(rank: int, channels: int = 8) -> Tensor:
    return torch.randn(16, channels, *[3] * (rank if rank > 1 else 0), dtype=torch.float64)


@pytest.fixture
def process_group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("family", SAME_IN_EVALUATION)
def test_evaluation_stays_the_same_function(family: str) -> None:
    net = trained().eval()
    x = images()
    before = net(x)
    assert replace(net, family) is net
    assert_agree(net(x), before)
    assert [type(net.get_submodule(name)) for name in NAMES] == [FAMILIES[family][i] for i in (1, 1, 1, 0)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_by_name_and_by_class(family: str, rank: int) -> None:
    for asked in {family, *FAMILIES[family]}:
        bn, x = norm(rank).eval(), data(rank)
        new = replace(bn, asked)
        assert type(new) is FAMILIES[family][rank - 1]
        assert new(x).shape == x.shape
        if family in SAME_IN_EVALUATION:
            assert_agree(new(x), bn(x))


def test_the_model_itself_is_the_layer() -> None:
    bn, x = norm().eval(), data(2)
    before = bn(x)
    new = replace(bn, "IterNorm")
    assert isinstance(new, nk.IterNorm2d)
    assert isinstance(bn, nn.BatchNorm2d)
    assert_agree(new(x), before)


def test_training_is_the_new_layers() -> None:
    """The layer is not BatchNorm under another name: it whitens, and its running matrices leave the diagonal."""
    net = nn.Sequential(norm())
    x = torch.randn(64, 8, 3, 3, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    replace(net, "DBN", affine=False, eps=0.0)
    covariance = net(x).movedim(1, 0).flatten(1).cov(correction=0)
    assert_agree(covariance, torch.eye(8, dtype=torch.float64))
    assert net[0].running_whitening[0, 0, 1].abs() > 1e-3


def test_options_and_state_are_kept() -> None:
    net = trained()
    net.bn1.weight.requires_grad_(False)
    net.blocks.eval()
    old = {name: net.get_submodule(name) for name in NAMES}
    parameters = dict(net.named_parameters())
    names = [name for name, _ in net.named_modules(remove_duplicate=False)]
    replace(net, "IterNorm")
    assert [name for name, _ in net.named_modules(remove_duplicate=False)] == names
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert not net.bn1.weight.requires_grad
    for name, bn in old.items():
        new: Any = net.get_submodule(name)
        for option in ("eps", "momentum", "affine", "track_running_stats", "training", "num_features"):
            assert getattr(new, option) == getattr(bn, option), f"{name}.{option}"
        assert torch.equal(new.running_mean, bn.running_mean)
        assert torch.equal(new.num_batches_tracked, bn.num_batches_tracked)
        assert new.num_batches_tracked == (6 if name == "bn_left" else 3)
        scale = (bn.running_var + bn.eps).rsqrt()
        assert torch.equal(new.running_whitening.view(new.num_features, -1).sum(1), scale)
    assert net.bn_left is net.branches["right"]


def test_what_was_does_not_move_with_what_is() -> None:
    bn = norm()
    mean = bn.running_mean.clone()
    new = replace(bn, "IterNorm")
    new(data(2) + 100)
    assert torch.equal(bn.running_mean, mean)


def test_an_optimizer_goes_on() -> None:
    net = trained(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x, target = images(torch.float32), torch.arange(12) % 4
    losses = []
    for step in range(60):
        if step == 2:
            replace(net, nk.IterNorm2d)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        gamma = net.bn1.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(net.bn1.weight, gamma)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_before_loads(family: str) -> None:
    net = trained()
    checkpoint = copy.deepcopy(net.state_dict())
    converted, fresh = replace(net, family), replace(Net().double(), family)
    fresh.load_state_dict(checkpoint)
    x = images()
    assert_agree(fresh.eval()(x), converted.eval()(x))
    assert fresh.state_dict().keys() == converted.state_dict().keys()
    second = "running_var" if family == "POPNorm" else "running_whitening"
    assert converted.state_dict().keys() == {key.replace("running_var", second) for key in checkpoint}
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str) -> None:
    net = trained().eval()
    original, x = copy.deepcopy(net), images()
    net = replace(replace(net, family, group_size=None if family == "POPNorm" else 2), "BatchNorm")
    kinds = [type(net.get_submodule(name)) for name in NAMES]
    synchronized = family.startswith("Sync")
    assert kinds == [nn.SyncBatchNorm if synchronized else type(original.get_submodule(name)) for name in NAMES]
    assert net.state_dict().keys() == original.state_dict().keys()
    assert_agree(list(net.state_dict().values()), list(original.state_dict().values()))
    assert_agree(net(x), original(x))


def test_back_where_a_channel_never_varied() -> None:
    """(0 + eps)^(-1/2) is rounded: its square may be above 1 / eps, and the variance below 0."""
    bn = nn.BatchNorm2d(64)
    bn.running_var.zero_()
    for eps in (1e-5, 1e-3, 3e-4, 0.1):
        bn.eps = eps
        new: Any = replace(replace(bn, "IterNorm"), "BatchNorm")
        assert (new.running_var >= 0).all()
        assert (new.running_var <= 4 * torch.finfo(torch.float32).eps * eps).all()


def test_back_after_training_with_groups_of_one() -> None:
    layer = nk.IterNorm2d(8, 1, dtype=torch.float64)
    layer(data(2) * 3)
    x = data(2)
    before = layer.eval()(x)
    assert_agree(replace(layer, nn.BatchNorm2d)(x), before)


def test_between_families() -> None:
    layer = nk.IterNorm2d(8, 4, num_iterations=7, eps=1e-4, scaling="frobenius", dtype=torch.float64)
    layer(data(2))
    x = data(2)
    before = layer.eval()(x)
    sync: Any = replace(layer, "SyncIterNorm")
    assert (sync.group_size, sync.num_iterations, sync.eps, sync.scaling) == (4, 7, 1e-4, "frobenius")
    assert torch.equal(sync.running_whitening, layer.running_whitening)
    dbn: Any = replace(layer, "DBN", group_size=8)  # two blocks lie in one
    assert (type(dbn), dbn.group_size) == (nk.DBN2d, 8)
    assert_agree(dbn(x), before)
    assert_agree(replace(dbn, "IterNorm", group_size=4)(x), before)
    pop: Any = replace(nk.POPNorm1d(8, kappa=2.0, center=False), "IterNorm")
    assert (type(pop), pop.bias) == (nk.IterNorm1d, None)
    assert pop(torch.randn(4, 8)).shape == (4, 8)


def test_sync_batch_norm_keeps_its_process_group(process_group: Any) -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(trained().eval(), process_group)
    x = images()
    before = net(x)
    replace(net, nk.IterNorm2d)
    layers = [net.get_submodule(name) for name in NAMES]
    assert [type(layer) for layer in layers] == [nk.SyncIterNorm] * 4
    assert all(layer.process_group is process_group for layer in layers)
    assert_agree(net(x), before)
    replace(net, "BatchNorm")
    layers = [net.get_submodule(name) for name in NAMES]
    assert [type(layer) for layer in layers] == [nn.SyncBatchNorm] * 4
    assert all(layer.process_group is process_group for layer in layers)
    new: Any = replace(norm(), "SyncDBN", process_group=process_group)
    assert new.process_group is process_group


def test_where() -> None:
    net = replace(trained(), "IterNorm", "first")
    assert [name for name, m in net.named_modules() if isinstance(m, nk.IterNorm2d)] == ["bn1"]
    replace(net, "IterNorm", "first")  # bn1 is one already
    assert [name for name, m in net.named_modules() if isinstance(m, nk.IterNorm2d)] == ["bn1", "blocks.0.1"]
    asked = []

    def where(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "bn2"

    net = replace(trained(), "DBN", where)
    assert asked == [(name, nn.BatchNorm1d if name == "bn2" else nn.BatchNorm2d) for name in NAMES]
    assert [name for name, m in net.named_modules() if isinstance(m, nk.DBN1d)] == ["bn2"]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 3


def test_options_override() -> None:
    new: Any = replace(norm(), "IterNorm", num_iterations=3, scaling="frobenius", eps=0.5, momentum=None, group_size=4)
    assert (new.num_iterations, new.scaling, new.eps, new.momentum, new.group_size) == (3, "frobenius", 0.5, None, 4)
    new = replace(norm(), "POPNorm", kappa=2.0, scale=False)
    assert (new.kappa, new.weight) == (2.0, None)
    assert new.bias is not None
    new = replace(norm(), "IterNorm", affine=False, track_running_stats=False)
    assert (new.weight, new.running_mean) == (None, None)
    new = replace(norm(affine=False, track_running_stats=False), "IterNorm", affine=True, track_running_stats=True)
    assert new.weight.dtype == torch.get_default_dtype()  # nothing says another
    assert torch.equal(new.running_mean, torch.zeros(8))


@pytest.mark.parametrize(
    ("channels", "asked", "size"), [(96, 64, 48), (96, None, 48), (96, 32, 32), (32, 64, 32), (7, 4, 1), (7, 7, 7)]
)
def test_the_largest_divisor(channels: int, asked: int | None, size: int) -> None:
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(channels))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replace(net, "IterNorm", group_size=asked)
    assert net[1].group_size == size
    expected = f"group_size {asked or 64} does not divide {channels} channels: {size} in '1'"
    assert [str(w.message) for w in caught] == ([expected] if size < min(asked or 64, channels) else [])
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)


def test_one_warning_names_all_layers() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(*(nn.BatchNorm1d(c) for c in (96, 64, 160, 96)))

    expected = r"^group_size 64 does not divide 96 channels: 48 in '0', '3'; 160 channels: 40 in '2'$"
    with pytest.warns(UserWarning, match=expected) as caught:
        replace(net(), "IterNorm")
    assert len(caught) == 1
    before = net()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=expected):
        warnings.simplefilter("error")
        replace(before, "IterNorm")
    assert all(type(m) is nn.BatchNorm1d for m in before)
    with pytest.warns(UserWarning, match="group_size 50 does not divide 96 channels: 48 in 'model'"):
        replace(nk.IterNorm2d(96, 48), "DBN", group_size=50)
    assert replace(nk.IterNorm2d(90, 9), "DBN").group_size == 9  # nobody asked for more


def test_the_log_says_what_became_what(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "normkernels.convert"):
        net = replace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "IterNorm", group_size=4)
        replace(net, "ConvNorm")
        replace(nn.BatchNorm2d(8), "POPNorm")
    assert [record.getMessage() for record in caplog.records] == [
        "1: BatchNorm2d(8) -> IterNorm2d(8, group_size=4)",
        "0: Conv2d(3, 8) -> ConvNorm2d(3, 8)",
        "model: BatchNorm2d(8) -> POPNorm2d(8)",
    ]
    assert {(record.name, record.levelname) for record in caplog.records} == {("normkernels.convert", "INFO")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    for affine in (True, False):
        bn = norm(dtype=torch.float64, affine=affine).to(dtype)
        new: Any = replace(bn, "IterNorm")
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        assert (new.running_mean.dtype, new.running_whitening.dtype) == (statistics, statistics)
        assert torch.equal(new.running_mean, bn.running_mean.to(statistics))
        assert new.weight is bn.weight
        assert new(data(2).to(dtype)).dtype == dtype
        back: Any = replace(replace(bn, "IterNorm"), "BatchNorm")
        assert back.weight is bn.weight
        assert torch.equal(back.running_mean.to(dtype), bn.running_mean)


def test_meta() -> None:
    with torch.device("meta"):
        net = Net()
    replace(replace(net, "IterNorm", group_size=1), "DBN", group_size=2)
    replace(replace(net, "BatchNorm"), "POPNorm")
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}
    assert type(net.bn2) is nk.POPNorm1d


@pytest.mark.parametrize("family", ["IterNorm", "POPNorm"])
def test_parts_removed_or_frozen_by_hand(family: str) -> None:
    removed = norm()
    removed.running_mean = removed.running_var = None
    new: Any = replace(removed, family)
    assert (new.running_mean, new.track_running_stats) == (None, False)
    new(data(2))
    removed = norm()
    removed.weight = removed.bias = None
    new = replace(removed, family)
    assert (new.weight, new.bias, new.affine) == (None, None, False)
    frozen = norm()
    frozen.track_running_stats = False
    new = replace(frozen, family)
    new(data(2) + 100)
    assert torch.equal(new.running_mean, frozen.running_mean)


def test_a_batch_norm_without_beta() -> None:
    bn = norm().eval()
    bn.bias = None
    x = data(2)
    before = bn(x)
    new: Any = replace(bn, "IterNorm")
    assert new.bias is None
    assert new.weight is bn.weight
    assert_agree(new(x), before)
    assert replace(new, "BatchNorm").bias is None


def test_pop_norm_takes_mean_and_variance_as_they_are() -> None:
    bn = norm()
    new: Any = replace(bn, "POPNorm")
    assert torch.equal(new.running_var, bn.running_var)
    assert torch.equal(new.running_mean, bn.running_mean)
    assert (new.weight is bn.weight, new.bias is bn.bias) == (True, True)


def test_data_parallel() -> None:
    net = nn.DataParallel(trained().eval())
    x = images()
    before = net(x)
    replace(net, "IterNorm")
    assert type(net.module.bn1) is nk.IterNorm2d
    assert_agree(net(x), before)
