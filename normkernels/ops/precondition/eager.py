"""Plain PyTorch implementation of BNP's change of the gradients, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkernels.ops._checks import statistics_dtype


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
    """One layer, in place; the number of rows that are left as they are, () int32."""
    dtype = statistics_dtype(weight_grad.dtype)
    Gw = weight_grad.unflatten(0, (groups, -1))  # (G, O, I, *k)
    Gb = bias_grad.view(groups, -1).to(dtype) if len(bias_grad) else None
    mean, var = mean.view(groups, -1), var.view(groups, -1)
    factor = 1 / (q2 * (var + eps1 * var.amax(1, keepdim=True) + eps2))

    # Step 5 from the old Gw, so that a row can be judged before it is changed:
    # sum mu new Gw = sum mu factor Gw - Gb sum mu^2 factor.
    old = Gw.to(dtype)
    sums = old.flatten(3).sum(3) if Gw.dim() > 3 else old
    product = torch.bmm(sums, (mean * factor).unsqueeze(2)).squeeze(2)
    if Gb is not None:
        taps = Gw[0, 0, 0].numel()
        product = Gb / q2 - (product - Gb * taps * (mean.square() * factor).sum(1, keepdim=True))
    # An entry that is not finite makes the row's sum so: 0 * inf is NaN.
    finite = product.isfinite()

    channel = (groups, 1, -1, *[1] * (Gw.dim() - 3))
    row = (groups, -1, 1, *[1] * (Gw.dim() - 3))
    new = old
    if old is Gw and not (Gw.is_cpu and finite.all()):  # elsewhere the host would wait for the answer
        new = Gw.clone()
    if Gb is not None:
        new.addcmul_(Gb.view(row), mean.view(channel), value=-1)
    new.mul_(factor.view(channel))
    if new is not Gw:
        Gw.copy_(torch.where(finite.view(row), new, Gw))
    if Gb is not None:
        bias_grad.copy_(torch.where(finite, product, Gb).flatten())
    return (~finite).sum(dtype=torch.int32)
