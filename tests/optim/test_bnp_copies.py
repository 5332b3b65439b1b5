"""BNP with copies, checkpoints, models that change, other devices and torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, prune

from normkernels.optim import BNP
from tests.optim.bnp_networks import assert_identical, batch, loss_of, network, sgd, train, values
from tests.tolerances import assert_agree


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copied_model_gathers_nothing(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    bnp = BNP(model)
    loss_of(model).backward()
    other = duplicate(model)
    loss_of(other, 1).backward()
    bnp.step()
    assert bnp.state_dict()["0"]["samples"] == 6
    with pytest.raises(RuntimeError, match="forward pass"):
        loss_of(other, 1)
        bnp.step()
    BNP(other)  # and may have one of its own


def test_bnp_itself_is_not_copied() -> None:
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one for the copy of the model"):
            duplicate(BNP(network()))


def test_training_continues_bit_by_bit() -> None:
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    train(model, optimizer, bnp.step, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), bnp.state_dict()], file)
    assert file.tell() < 20_000  # not the buffers of all layers with each
    snapshot = bnp.state_dict()["3"]
    train(model, optimizer, bnp.step, range(3, 6))
    for key in ("mean", "variance"):
        assert not torch.equal(snapshot[key], bnp.state_dict()["3"][key])

    other = nn.Sequential(*[copy.deepcopy(module) for module in network()])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again, restored = sgd(other), BNP(other)
    train(other, again, restored.step, range(7, 8))
    file.seek(0)
    for target, state in zip((other, again, restored), torch.load(file), strict=True):
        target.load_state_dict(state)
    train(other, again, restored.step, range(3, 6))
    assert_identical(values(other, restored), values(model, bnp))


def test_load_before_the_first_step_and_over_what_was_gathered() -> None:
    model = network()
    bnp = BNP(model)
    state = bnp.state_dict()
    state["0"] = {"mean": torch.arange(3), "variance": torch.full((3,), 2.0), "samples": 5, "positions": 9}
    loss_of(model)
    bnp.load_state_dict(state)
    with pytest.raises(RuntimeError, match="forward pass"):
        bnp.step()
    assert_identical([bnp.state_dict()["0"]["mean"]], [torch.arange(3).double()])
    assert bnp.state_dict()["0"]["positions"] == 9.0


def test_load_refuses() -> None:
    bnp = BNP(network())
    good = bnp.state_dict()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"0": good["0"]}, ValueError, "expected the layers 0, 3, got one that lacks 3 and has none besides"),
        (good | {"x": good["0"]}, ValueError, "lacks none and has x besides"),
        (good | {"3": good["0"]}, ValueError, r"3.mean: expected shape \(32,\), got \(3,\)"),
        (good | {"3": good["3"] | {"variance": 1.0}}, TypeError, "3.variance: expected a torch.Tensor, got float"),
        (good | {"3": good["3"] | {"samples": -1}}, ValueError, "3.samples: expected at least 0, got -1"),
        (good | {"3": good["3"] | {"samples": 1.5}}, TypeError, "3.samples: expected an int"),
        (good | {"3": good["3"] | {"positions": float("nan")}}, ValueError, "3.positions: expected a finite number"),
        (good | {"3": {"mean": good["3"]["mean"]}}, ValueError, "3: expected variance in its state, got mean"),
        (good | {"3": None}, TypeError, "3: expected a mapping as its state, got NoneType"),
        (good | {1: None, None: 1}, ValueError, "lacks none and has 1, None besides"),  # type: ignore[dict-item]
        (good | {"3": good["3"] | {"mean": torch.full((32,), float("inf"))}}, ValueError, "3.mean: expected finite"),
        (good | {"3": good["3"] | {"variance": torch.full((32,), float("nan"))}}, ValueError, "3.variance: .* finite"),
        (good | {"3": good["3"] | {"variance": -torch.ones(32)}}, ValueError, "3.variance: .* numbers at least 0"),
        (good | {"3": good["3"] | {"mean": torch.ones(32) * 1j}}, TypeError, "3.mean: expected real numbers"),
    ]
    changed = copy.deepcopy(good["0"])
    changed["mean"] += 1
    for state, error, message in bad:
        if "0" in state:
            state = state | {"0": changed}
        with pytest.raises(error, match=message):
            bnp.load_state_dict(state)
        assert torch.equal(bnp.state_dict()["0"]["mean"], good["0"]["mean"])  # nothing was taken over
    with pytest.raises(TypeError, match="state_dict: expected a mapping, got NoneType"):
        bnp.load_state_dict(None)  # type: ignore[arg-type]


def test_a_model_without_a_name_is_called_model() -> None:
    layer = nn.Linear(5, 4)
    bnp = BNP(layer)
    with pytest.raises(ValueError, match="got one on model; remove"):
        BNP(layer)
    with pytest.raises(ValueError, match="without those of model; put"):
        bnp.attach(torch.optim.SGD([layer.bias]))
    with pytest.raises(ValueError, match="expected the layers model, got one that lacks model and has x besides"):
        bnp.load_state_dict({"x": {}})
    with pytest.raises(ValueError, match="model: expected mean in its state, got nothing"):
        bnp.load_state_dict({"": {}})
    with pytest.raises(ValueError, match="got 'x'; its layers are model"):
        BNP(layer, skip=["x"])
    layer(torch.ones(3, 5)).sum().backward()
    layer.weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="as they are in model;"):
        bnp.step()


def test_model_may_change_its_type() -> None:
    model = network().float()
    bnp, optimizer = BNP(model, rho=0.5), sgd(model)
    x, target = batch()
    F.cross_entropy(model(x.float()), target).backward()
    bnp.step()
    before = bnp.state_dict()["0"]["mean"]
    model.double()
    train(model, optimizer, bnp.step, range(1))
    after = bnp.state_dict()["0"]["mean"]
    assert before.dtype == torch.float32 and after.dtype == torch.float64
    torch.testing.assert_close(after, before.double() * 1.5, rtol=1e-6, atol=0)  # the same batch weighs 1/2, then 3/4


def test_a_weight_may_be_replaced() -> None:
    """It is replaced as when a new head is put into a network."""
    model = network()
    bnp, optimizer = BNP(model), sgd(model)
    train(model, optimizer, bnp.step, range(2))
    old = model[3].weight
    model[3].weight = nn.Parameter(torch.ones_like(old))
    train(model, sgd(model), bnp.step, range(2))
    assert not old._post_accumulate_grad_hooks
    loss_of(model, 2).backward()
    model.zero_grad()
    loss_of(model, 3).backward()
    bnp.step()
    assert bnp.state_dict()["3"]["samples"] == 6  # gradients of the new one are dropped as well


def test_a_weight_of_another_shape_is_refused() -> None:
    model = network()
    bnp = BNP(model)
    message = "3: expected a weight for 32 input channels, as when BNP was made, got one for 7"
    loss_of(model).backward()
    model[3].weight = nn.Parameter(torch.ones(4, 7).double())
    with pytest.raises(ValueError, match=message):
        bnp.step()
    with pytest.raises(ValueError, match=message):
        model[3](torch.ones(2, 7).double())


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: parametrize.register_parametrization(module, "bias", nn.Identity()),
    ],
)
def test_a_weight_that_is_computed_afterwards_is_refused(change: Callable[[nn.Module], object]) -> None:
    model = network()
    bnp = BNP(model)
    loss_of(model).backward()
    change(model[3])
    message = r"3: expected (weight|bias) to be a parameter of the layer, got one that is computed from others"
    with pytest.raises(ValueError, match=message):
        bnp.step()
    with pytest.raises(ValueError, match=message):
        loss_of(model)
    model.eval()
    loss_of(model)


@pytest.mark.gpu
def test_on_a_gpu_with_a_model_that_moved() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = network()
        bnp = BNP(model)
        model.to(device)
        optimizer = sgd(model)
        for seed in range(3):
            optimizer.zero_grad()
            x, target = (value.to(device) for value in batch(seed))
            F.cross_entropy(model(x), target).backward()
            bnp.step()
            optimizer.step()
        assert bnp.state_dict()["0"]["mean"].device.type == device
        results.append([value.cpu() for value in values(model, bnp)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_warning_on_a_gpu_comes_later() -> None:
    model = network().cuda()
    bnp = BNP(model)
    x, target = (value.cuda() for value in batch())
    F.cross_entropy(model(x), target).backward()
    model[3].weight.grad[1, 2] = float("nan")
    model(x)
    bnp.step()
    torch.cuda.synchronize()
    model(x)
    with pytest.warns(UserWarning, match="not finite as they are in 3"):
        bnp.step()


# torch.compile's own, the last about activations between two graphs.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:The .grad attribute of a Tensor"
)
@pytest.mark.parametrize("attach", [False, True])
def test_compiled_model(attach: bool) -> None:
    results = []
    for compiled in (True, False):
        torch.compiler.reset()
        model = network()
        bnp, optimizer = BNP(model), sgd(model)
        if attach:
            bnp.attach(optimizer)
        counter = CompileCounterWithBackend("aot_eager")
        called = torch.compile(model, backend=counter) if compiled else model
        train(called, optimizer, None if attach else bnp.step, range(2))
        graphs = counter.frame_count
        loss_of(called).backward()  # a micro-batch more
        train(called, optimizer, None if attach else bnp.step, range(2, 4))
        assert counter.frame_count == graphs  # nothing is compiled again
        assert bnp.state_dict()["0"]["samples"] == 6
        results.append(values(model, bnp))
    assert_agree(*results)
