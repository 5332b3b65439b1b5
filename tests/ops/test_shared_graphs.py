"""Tensors that depend on each other, layers whose buffers move on, and checkpoints of other origins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk


@pytest.mark.parametrize("shared", ["weight-is-bias", "weight-of-x"])
def test_create_graph_counts_each_path_once(shared: str) -> None:
    """weight and bias may share a graph; the differentiable backward must not walk it a second time."""
    leaf = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(6, 4, dtype=torch.float64)

    def gradient(create_graph: bool) -> Tensor:
        p = leaf[0] if shared == "weight-is-bias" else leaf.square().mean(0)
        y = nk.ops.iter_norm(leaf, 4, weight=p, bias=p if shared == "weight-is-bias" else None)[0]
        return torch.autograd.grad((y * incoming).sum(), leaf, create_graph=create_graph)[0].detach()

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [nk.IterNorm2d, nk.DBN2d])
def test_compiled_training_layer_without_gradients(layer: type[nn.Module]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer(8), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(torch.randn(3, 8, 3, 3)).isfinite().all()


def test_training_step_between_evaluation_and_its_backward() -> None:
    """nn.BatchNorm allows it: the running statistics of the evaluation are not the buffers that move on."""
    layer, x = nk.IterNorm2d(8), torch.randn(4, 8, 3, 3, requires_grad=True)
    layer(x)
    layer.eval()
    y = layer(x)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.train()
    layer(torch.randn(4, 8, 3, 3))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_half_batchnorm_checkpoint_by_assignment() -> None:
    layer = nk.IterNorm2d(8, 4).half()
    layer.load_state_dict(nn.BatchNorm2d(8).half().state_dict(), assign=True)
    assert layer.running_mean.dtype == layer.running_whitening.dtype == torch.float32
    assert layer(torch.randn(4, 8, 3, 3, dtype=torch.float16)).dtype == torch.float16


def test_batchnorm_checkpoint_without_a_counter() -> None:
    state = nn.BatchNorm2d(8).state_dict()
    del state["num_batches_tracked"]
    layer = nk.IterNorm2d(8, 4)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1.0])
def test_frobenius_norm_does_not_underflow(scale: float) -> None:
    y = nk.ops.iter_norm(torch.randn(4, 8, 3, 3) * scale, 8, eps=1e-30, scaling="frobenius")[0]
    assert y.isfinite().all()
