"""Plain PyTorch implementation of BNP's change of the gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkernels._checks import statistics_dtype


def precondition(
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    groups: Sequence[int],
    q2: Sequence[float],
    eps1: float,
    eps2: float,
) -> Tensor:
    tensors = zip(weight_grads, bias_grads, means, variances, strict=True)
    numbers = zip(groups, q2, strict=True)
    left = [_precondition(*layer, *rest, eps1, eps2) for layer, rest in zip(tensors, numbers, strict=True)]
    return torch.stack(left) if left else torch.empty(0, dtype=torch.int32)


def _precondition(
    weight_grad: Tensor, bias_grad: Tensor, mean: Tensor, var: Tensor, groups: int, q2: float, eps1: float, eps2: float
) -> Tensor:
    """Change one layer's gradients in place; return the number of rows that are left as they are, () int32."""
    dtype = statistics_dtype(weight_grad.dtype)
    Gw = weight_grad.unflatten(0, (groups, -1))  # (G, O, I, *k)
    Gb = bias_grad.view(groups, -1).to(dtype) if len(bias_grad) else None
    mean, var = mean.view(groups, -1), var.view(groups, -1)
    factor = 1 / (q2 * (var + eps1 * var.amax(1, keepdim=True) + eps2))

    old = Gw.to(dtype)
    new = old
    if old is Gw and not (Gw.is_cpu and _bounded(Gw, Gb, mean, factor, q2)):  # on other devices the host would wait
        new = Gw.clone()
    channel = (groups, 1, -1, *[1] * (Gw.dim() - 3))
    if Gb is not None:
        new.addcmul_(Gb.view(groups, -1, 1, *channel[3:]), mean.view(channel), value=-1)
    new.mul_(factor.view(channel))
    sums = new.flatten(3).sum(3) if Gw.dim() > 3 else new
    product = torch.bmm(sums, mean.unsqueeze(2)).squeeze(2)
    if Gb is not None:
        product = Gb / q2 - product  # step 5, with the new Gw
    if new is Gw:
        if Gb is not None:
            bias_grad.copy_(product.flatten())
        return torch.zeros((), dtype=torch.int32)
    rounded = new.to(Gw.dtype)
    finite = rounded.isfinite().flatten(2).all(2) & product.isfinite()
    if Gb is not None:
        finite &= product.to(bias_grad.dtype).isfinite()
        bias_grad.copy_(torch.where(finite, product, Gb).flatten())
    Gw.copy_(torch.where(finite.view(groups, -1, *[1] * (Gw.dim() - 2)), rounded, Gw))
    return (~finite).sum(dtype=torch.int32)


def _bounded(Gw: Tensor, Gb: Tensor | None, mean: Tensor, factor: Tensor, q2: float) -> bool:
    """Return whether every number on the way is surely finite, so that the gradients may be changed in place."""
    largest = max(value.abs().item() for value in Gw.aminmax())
    of_bias = 0.0 if Gb is None else Gb.abs().max().item()
    mu = mean.abs().max().item()
    new = (largest + mu * of_bias) * factor.max().item()
    return new + mu * new * Gw[0, 0].numel() + of_bias / q2 < torch.finfo(Gw.dtype).max / 2
