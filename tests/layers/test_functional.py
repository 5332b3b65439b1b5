"""torch.func: a network as a function of its parameters and buffers, and many models in one call."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from tests.layers.networks import EVERY_NETWORK, batch, build, loss_of, memory, norm_of, step
from tests.tolerances import assert_agree

# torch's own warnings, of operators without a batching rule and of what forward mode touches
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop.*lerp_"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"),
]


def state(net: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of parameters and buffers."""
    both = net.named_parameters(), net.named_buffers()
    parameters, buffers = ({name: value.detach().clone() for name, value in each} for each in both)
    return parameters, buffers


@EVERY_NETWORK
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_functional_call(name: str, training: bool) -> None:
    """Gradients go to the given parameters, running statistics to the given buffers, and the module stays."""
    net, other = build(name).train(training), build(name).train(training)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    other(batch(3))
    parameters, buffers = state(other)
    leaves = {key: value.requires_grad_() for key, value in parameters.items()}
    x = batch(1).requires_grad_()
    before = memory(net)
    y = functional_call(net, (leaves, buffers), (x,))
    got = [y.detach(), *torch.autograd.grad(loss_of(y), [x, *leaves.values()])]
    assert_agree(got, step(other, batch(1)))
    assert_agree(list(buffers.values()), memory(other))
    assert all(torch.equal(a, b) for a, b in zip(memory(net), before, strict=True))


@EVERY_NETWORK
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_vmap_over_models(name: str, training: bool) -> None:
    """An ensemble in one call, each model with its data, has the outputs, gradients and statistics of each."""
    nets = [build(name).train(training) for _ in range(3)]
    for i, net in enumerate(nets):
        net(batch(i + 7))
        with torch.no_grad():
            for value in net.parameters():
                value.add_(0.1 * i)
    parameters, buffers = stack_module_state(nets)  # type: ignore[arg-type]
    x = torch.stack([batch(i) for i in range(3)])
    base = build(name).train(training)
    y = vmap(lambda *given: functional_call(base, given[:2], given[2]))(parameters, buffers, x)
    found = torch.autograd.grad(torch.stack([loss_of(each) for each in y]).sum(), list(parameters.values()))

    expected = [step(net, batch(i)) for i, net in enumerate(nets)]
    assert_agree(y.detach(), torch.stack([each[0] for each in expected]))
    assert_agree(list(found), [torch.stack(each) for each in zip(*[each[2:] for each in expected], strict=True)])
    assert_agree(list(buffers.values()), [torch.stack(each) for each in zip(*map(memory, nets), strict=True)])


@EVERY_NETWORK
def test_gradient_of_each_sample(name: str) -> None:
    """In evaluation each sample has its gradient, as samples do not meet in the statistics."""
    net = build(name)
    net(batch())
    net.eval()
    parameters, buffers = state(net)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(functional_call(net, (parameters, buffers), (x.unsqueeze(0),)))

    got = vmap(grad(loss), (None, 0))(parameters, batch(1))
    expected = [step(net, x.unsqueeze(0))[2:] for x in batch(1)]
    assert_agree(list(got.values()), [torch.stack(each) for each in zip(*expected, strict=True)])


@pytest.mark.parametrize("name", ["IterNorm2d", "DBN2d", "POPNorm2d"])
def test_vmap_needs_statistics_for_each(name: str) -> None:
    """One set of running statistics for several batches at once is refused, as BatchNorm does, and stays as it was."""
    norm = norm_of(build(name))
    before = memory(norm)
    x = torch.randn(3, 6, norm.num_features, 4, 4)
    with pytest.raises(RuntimeError, match=r"expected running statistics for each batch .*, got one set for all"):
        vmap(norm)(x)
    assert all(torch.equal(a, b) for a, b in zip(memory(norm), before, strict=True))
    norm.eval()
    assert_agree(vmap(norm)(x).detach(), torch.stack([norm(each) for each in x]).detach())


@pytest.mark.parametrize("name", ["IterNorm2d", "DBN2d", "POPNorm2d", "ConvNorm2d"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_mode_is_refused(name: str, compiled: bool) -> None:
    """Compiled code would otherwise drop the tangents where nothing needs a gradient."""
    net = build(name).eval().requires_grad_(False)
    call = torch.compile(net, backend="aot_eager") if compiled else net
    with pytest.raises(NotImplementedError, match="forward mode AD"), forward_ad.dual_level():
        call(forward_ad.make_dual(batch(), batch(1)))
