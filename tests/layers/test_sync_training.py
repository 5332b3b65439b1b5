"""Synchronized layers in what people train with: DDP, FSDP2, torch.compile, checkpointing; and their errors."""

from __future__ import annotations

import copy
import inspect
import io
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkernels as nk
from tests.layers.sync_ranks import Problem, counted_collectives, run_on_ranks, step
from tests.tolerances import assert_agree

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

WHOLE = 8
UNLIKE, ALIKE = (5, 3, 7, 8), (5, 5)  # samples of rank 0 in each step; rank 1 has the others
UNEVEN = Problem(splits=(6, 2))
PAGE = Path(__file__).parents[2] / "docs/distributed.md"
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def network(convert: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 8, 3, stride=2),
        norm=nk.IterNorm2d(8, group_size=4),
        relu=nn.ReLU(),
        second=nn.Conv2d(8, 4, 1),
        whiten=nk.DBN2d(4),
        flatten=nn.Flatten(),
        linear=nn.Linear(16, 2),
    )
    model = nn.Sequential(layers).double()
    return nk.SyncIterNorm.convert_sync_iternorm(model) if convert else model


def batch(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(WHOLE, 3, 6, 6, dtype=torch.float64, generator=g) * (step + 1) + 0.5


def loss(model: nn.Module, x: Tensor, share: float = 1.0) -> Tensor:
    """Return the mean over the whole batch; DDP and FSDP divide by the number of ranks, which share undoes."""
    return model(x).sin().sum() / WHOLE * share


def results(model: nn.Module) -> list[Tensor]:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [*(p.detach() for p in whole), *model.buffers()]


def train(model: nn.Module, replica: nn.Module, rank: int | None, first: tuple[int, ...] = UNLIKE) -> list[Tensor]:
    """Train on a rank's share of every batch, or alone on all of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for k, n in enumerate(first):
        optimizer.zero_grad()
        if rank is None:
            loss(replica, batch(k)).backward()
        else:
            loss(replica, share(batch(k), n, rank), 2.0).backward()
        optimizer.step()
    return results(model)


def share(x: Tensor, first: int, rank: int) -> Tensor:
    return x[:first] if rank == 0 else x[first:]


def ddp(rank: int, device: str) -> list[Tensor]:
    model = network()
    return train(model, DistributedDataParallel(model), rank)


def compiled_ddp(rank: int, device: str) -> list[Tensor]:
    torch._dynamo.reset()
    model = network()
    return train(model, torch.compile(DistributedDataParallel(model), backend="aot_eager"), rank, ALIKE)


def fsdp(rank: int, device: str) -> list[Tensor]:
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.norm, model.linear):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, model, rank)


def accumulated(rank: int, device: str) -> list[Tensor]:
    """Add up the gradients of two batches, the first without DDP's collectives; the layer's own are as ever."""
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with replica.no_sync():
        loss(replica, share(batch(0), 5, rank), 2.0).backward()
    loss(replica, share(batch(1), 3, rank), 2.0).backward()
    optimizer.step()
    return results(model)


def compiled(rank: int, device: str) -> dict[str, Any]:
    """Run the same layer as it is and compiled: in training, where nothing needs a gradient, and in evaluation."""
    torch._dynamo.reset()
    warnings.filterwarnings("error", message=".*lru_cache")  # Dynamo warns of a cache that it walks past
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    found = {}
    for name, group in (("own group", dist.new_group([0, 1])), ("default group", None)):
        layers = [UNEVEN.layer(process_group=group) for _ in range(2)]
        layers[1] = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
        found[name] = [step(layer, x, dy) for layer in layers]
    with torch.no_grad():
        found["no_grad"] = [{"y": layer(x)} for layer in layers]
    found["evaluation"] = [step(layer.eval(), x, dy) for layer in layers]
    return found


def batch_sizes(rank: int, device: str) -> list[tuple[Tensor, Tensor, int]]:
    """Run one compiled layer for batches of several sizes; return results, and how often it was compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, other = UNEVEN.layer(), UNEVEN.layer()
    fast = torch.compile(other, fullgraph=True, backend=counter, dynamic=True)
    found = []
    for first in (6, 5, 4, 3):
        x = share(UNEVEN.whole()[0], first, rank)
        found.append((step(layer, x, x)["dx"], step(fast, x, x)["dx"], counter.frame_count))
    return found


def checkpointed(rank: int, device: str) -> tuple[list[Any], list[int]]:
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    layer, other = UNEVEN.layer(), UNEVEN.layer()
    found = [step(layer, x, dy)]
    other(x)  # the comparison of the ranks' layers
    other.reset_running_stats()
    with counted_collectives() as collectives:
        leaf = x.clone().requires_grad_()
        y = checkpoint(other, leaf, use_reentrant=False)
        y.backward(dy)
    found.append({"y": y.detach(), "dx": leaf.grad, "dweight": other.weight.grad, "dbias": other.bias.grad})
    return found, collectives


def copies(rank: int, device: str) -> list[Any]:
    """Copy layers by deepcopy and pickle, with a process group of their own and without.

    Return whether the copies have it, and the results of both.
    """
    x, dy = (UNEVEN.share(t, rank) for t in UNEVEN.whole())
    found: list[Any] = []
    for group in (None, dist.new_group([0, 1])):
        layer = UNEVEN.layer(process_group=group)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            found.append((twin.process_group is group, step(layer, x, dy), step(twin, x, dy)))
            layer = UNEVEN.layer(process_group=group)
    return found


def examples(rank: int, device: str) -> list[list[Tensor]]:
    """Run the code of docs/distributed.md in a process group that is there; return what each block ends with."""
    names: dict[str, Any] = {}
    found = []
    init, dist.init_process_group = dist.init_process_group, lambda: None
    try:
        for block in CODE.findall(PAGE.read_text(encoding="utf-8")):
            exec(compile(block, str(PAGE), "exec"), names)
            found.append(results(names["model"]))
    finally:
        dist.init_process_group = init
    return found


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def comparisons(rank: int, device: str) -> list[int]:
    """Count how often the ranks compare a layer that is called compiled and not, and moves to another group."""
    calls: list[None] = []
    gather = dist.all_gather_object
    layer = nk.SyncIterNorm(8, 4, eps=0.25)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    with patch.object(dist, "all_gather_object", lambda *args: (calls.append(None), gather(*args))):
        for call in (compiled, layer, compiled):
            call(torch.randn(3, 8, 2, 2))
            found.append(len(calls))
        layer.process_group = dist.new_group([0, 1])
        for call in (layer, compiled):
            call(torch.randn(3, 8, 2, 2))
            found.append(len(calls))
    return found


class Block(nn.Module):
    """A block that shares compiled code with blocks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nk.SyncIterNorm(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def blocks(rank: int, device: str) -> int:
    """Count the graphs of as many blocks as Dynamo would not compile apart."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(4, 8, 3, 3)
    for _ in range(2):
        for block in [Block() for _ in range(10)]:
            block.compile(backend=counter)
            x = block(x)
    return counter.frame_count


TYPES = (torch.float32, torch.float64)


def refusals(rank: int, device: str) -> dict[str, Any]:
    """Return what every rank is told. Afterwards the group still works: no rank waits for another."""
    x = torch.randn(4, 8 - 4 * rank, 3, 3)
    found: dict[str, Any] = {
        "channels": raised(lambda: nk.SyncIterNorm(8 - 4 * rank, group_size=4)(x)),
        "group size": raised(lambda: nk.SyncIterNorm(8, group_size=4 - 2 * rank)(torch.randn(4, 8, 3, 3))),
        "method": raised(lambda: (nk.SyncIterNorm if rank else nk.SyncDBN)(8, 4)(torch.randn(4, 8, 3, 3))),
        "type": raised(lambda: nk.SyncIterNorm(8, dtype=TYPES[rank])(torch.randn(4, 8, dtype=TYPES[rank]))),
        "gradient": raised(lambda: nk.SyncIterNorm(8)(torch.randn(4, 8, requires_grad=rank == 0))),
    }
    layer = UNEVEN.layer()
    leaf = torch.randn(3, 8, 2, 2, requires_grad=True)
    found["double backward"] = raised(lambda: torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True))
    ones = torch.ones(1)
    dist.all_reduce(ones)
    found["sum"] = ones.item()
    return found


CASES = {
    case.__name__: case
    for case in (
        ddp,
        compiled_ddp,
        fsdp,
        accumulated,
        compiled,
        batch_sizes,
        checkpointed,
        copies,
        comparisons,
        blocks,
        examples,
        refusals,
    )
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(CASES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "first"), [("ddp", UNLIKE), ("compiled_ddp", ALIKE), ("fsdp", UNLIKE)])
def test_training_is_that_of_one_process(ranks: list[dict[str, Any]], name: str, first: tuple[int, ...]) -> None:
    """SGD steps, parameters and running statistics are those of one process.

    Shares are unlike, and in the last of four steps one rank has none.
    """
    one, other = (rank[name] for rank in ranks)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    model = network(convert=False)
    assert_agree(one, train(model, model, None, first))


def test_gradient_accumulation(ranks: list[dict[str, Any]]) -> None:
    model = network(convert=False)
    for k in range(2):
        loss(model, batch(k)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for rank in ranks:
        assert_agree(rank["accumulated"], results(model))


def test_compiled_in_one_graph(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["compiled"]) == 4
        for plain, fast in rank["compiled"].values():
            for key, value in plain.items():
                assert_agree(fast[key], value)


def test_compiled_once_for_all_batch_sizes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for plain, fast, compilations in rank["batch_sizes"]:
            assert_agree(fast, plain)
            assert compilations == rank["batch_sizes"][0][2]


def test_activation_checkpointing(ranks: list[dict[str, Any]]) -> None:
    """The forward pass runs twice, and so its collective does, on all ranks."""
    for rank in ranks:
        (plain, again), collectives = rank["checkpointed"]
        assert collectives == [UNEVEN.forward_bytes()] * 2 + [UNEVEN.backward_bytes()]
        for key, value in again.items():
            assert torch.equal(value, plain[key])


def test_copies_have_the_process_group(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["copies"]) == 4
        for kept, plain, twin in rank["copies"]:
            assert kept
            assert all(torch.equal(plain[key], twin[key]) for key in plain)


def test_examples_of_the_documentation(ranks: list[dict[str, Any]]) -> None:
    """DDP and FSDP2 both train, and keep the ranks alike."""
    (ddp, fsdp), other = (rank["examples"] for rank in ranks)
    for mine, theirs in zip((ddp, fsdp), other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert mine[-1] == 3  # batches


def test_blocks_share_compiled_code(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["blocks"] == 2  # the first one's input needs no gradient


def test_ranks_compare_once_in_each_group(ranks: list[dict[str, Any]]) -> None:
    """They do so while Dynamo traces, too: a rank that falls back to eager must not ask what others do not answer."""
    for rank in ranks:
        assert rank["comparisons"] == [1, 1, 1, 2, 2]


def test_ranks_that_disagree_are_told(ranks: list[dict[str, Any]]) -> None:
    """All ranks are told, with both layers, instead of waiting for each other or adding unlike sums."""
    for rank in ranks:
        found = rank["refusals"]
        for name, parts in {
            "channels": ("SyncIterNorm(8,", "SyncIterNorm(4,"),
            "group size": ("group_size=4", "group_size=2"),
            "method": ("SyncDBN(8", "SyncIterNorm(8"),
            "type": ("on torch.float32", "on torch.float64"),
            "gradient": ("gradient needed", "gradient not needed"),
        }.items():
            message = found[name]
            assert message.startswith("ValueError") and "expected the same on all ranks" in message, message
            assert all(part in message for part in parts), message
        assert found["double backward"].startswith("NotImplementedError: sync_iter_norm: expected a first derivative")
        assert found["sum"] == 2.0


# In one process.


def test_training_without_a_process_group() -> None:
    x = torch.randn(4, 8, 3, 3)
    for layer in (nk.SyncIterNorm(8), nk.SyncDBN(8)):
        name = type(layer).__name__
        with pytest.raises(RuntimeError, match=rf"{name}\(8, .*expected torch.distributed.init_process_group"):
            layer(x)
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.eval()(x), x)  # evaluation needs no process group


def test_process_group_of_another_type() -> None:
    for group in ("default", 0, [0, 1], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(
            TypeError, match=r"process_group: expected None or a torch\.distributed\.ProcessGroup .*, got"
        ):
            nk.SyncIterNorm(8, process_group=group)
        layer = nk.SyncDBN(8)
        with pytest.raises(TypeError, match="process_group"):
            layer.process_group = group
        model = nn.Sequential(nk.IterNorm2d(8))
        with pytest.raises(TypeError, match="process_group"):
            nk.SyncIterNorm.convert_sync_iternorm(model, group)
        assert type(model[0]) is nk.IterNorm2d


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (8,), (1, 8, 1, 1, 1, 1)])
def test_input_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        nk.SyncIterNorm(8)(torch.randn(shape))


def test_conversion_keeps_everything() -> None:
    shared = nk.IterNorm1d(8, 4, num_iterations=3, scaling="frobenius", momentum=None)
    model = nn.ModuleDict(
        {"a": shared, "b": nn.Sequential(shared, nk.DBN2d(8), nk.IterNorm3d(8)), "c": nn.BatchNorm2d(8)}
    )
    calls: list[str] = []
    shared.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = dict(model.named_modules(remove_duplicate=False))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = repr(shared).partition("(")[2]

    model.eval()
    assert nk.SyncIterNorm.convert_sync_iternorm(model) is model
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert [type(m) for m in (model["a"], *model["b"], model["c"])] == [
        nk.SyncIterNorm, nk.SyncIterNorm, nk.SyncDBN, nk.SyncIterNorm, nn.BatchNorm2d,
    ]  # fmt: skip
    assert repr(shared) == f"SyncIterNorm({options}"
    assert not shared.training and shared.process_group is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model["a"](torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert calls == ["hook"] and (shared.bias == -3.0).all()
    assert nk.SyncIterNorm.convert_sync_iternorm(model) is model  # once more changes nothing
    assert type(shared) is nk.SyncIterNorm

    assert isinstance(nk.SyncIterNorm.convert_sync_iternorm(nk.DBN1d(8)), nk.SyncDBN)


def test_conversion_with_nothing_to_convert() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="module: expected IterNorm or DBN layers in it, got none in Sequential"):
        nk.SyncIterNorm.convert_sync_iternorm(model)


class Frozen(nk.IterNorm2d):
    """A subclass that does something else, which another class would not do."""


@pytest.mark.parametrize(
    "made", [lambda: Frozen(8), lambda: nn.utils.parametrizations.weight_norm(nk.DBN2d(8))], ids=["own", "parametrized"]
)
def test_conversion_of_a_subclass_is_refused(made: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nk.IterNorm2d(8), made())
    before = type(model[1])
    with pytest.raises(ValueError, match=rf"'1': expected IterNorm1d, .*, got {before.__name__}, which may do more"):
        nk.SyncIterNorm.convert_sync_iternorm(model)
    assert type(model[0]) is nk.IterNorm2d and type(model[1]) is before
    with pytest.raises(TypeError, match=r"module: expected nn\.Module, got int"):
        nk.SyncIterNorm.convert_sync_iternorm(5)  # type: ignore[arg-type]


def test_conversion_without_a_group_keeps_the_groups_that_there_are() -> None:
    model = nn.Sequential(nk.SyncIterNorm(8), nk.IterNorm2d(8))
    model[0]._group_name = "some"
    nk.SyncIterNorm.convert_sync_iternorm(model)
    assert model[0]._group_name == "some" and model[1]._group_name is None


def test_checkpoints_are_those_of_the_plain_layers() -> None:
    x = torch.randn(6, 8, 5, 3)
    for plain, layer in ((nk.IterNorm2d(8, 4), nk.SyncIterNorm(8, 4)), (nk.DBN2d(8, 4), nk.SyncDBN(8, 4))):
        plain(x)
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.eval()(x), plain.eval()(x))
        back = type(plain)(8, 4)
        back.load_state_dict(layer.state_dict())
        assert torch.equal(back.eval()(x), plain(x))


def test_signature_is_the_plain_layer_s_and_a_process_group() -> None:
    layer = nk.SyncIterNorm(8, 4, 3, 1e-3, None, False, False, scaling="frobenius", process_group=None)
    plain = nk.IterNorm2d(8, 4, 3, 1e-3, None, False, False, scaling="frobenius")
    assert repr(layer).partition("(")[2] == repr(plain).partition("(")[2]
    with pytest.raises(ValueError, match="group_size: expected a divisor"):
        nk.SyncIterNorm(8, 3)
    for kind, other in ((nk.SyncIterNorm, nk.IterNorm2d), (nk.SyncDBN, nk.DBN2d)):
        own, like = (list(inspect.signature(each).parameters.values()) for each in (kind, other))
        assert own[:-1] == like and own[-1].name == "process_group"
