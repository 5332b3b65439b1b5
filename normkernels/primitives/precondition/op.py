"""precondition: BNP's change of the gradients of all layers. Algebra in DERIVATION.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkernels._checks import DTYPES, check_integer, check_like, check_number, check_tensor, statistics_dtype
from normkernels.dispatch.define import define
from normkernels.dispatch.record import Op, Request
from normkernels.primitives.precondition import eager, reference


@torch.no_grad()
def precondition(
    weight_grads: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    groups: Sequence[int],
    q2: Sequence[float],
    eps1: float = 1e-2,
    eps2: float = 1e-4,
) -> list[Tensor]:
    r"""Multiply the gradients of layers by BNP's preconditioner P P^T / q^2, in place (BNP, eq. 15 and 23).

    .. math:: \tilde\sigma^2_j = \sigma^2_j + \epsilon_1 \max \sigma^2 + \epsilon_2, \qquad
              G_w \leftarrow \frac{G_w - \mu_j G_b}{q^2 \tilde\sigma^2_j}, \qquad
              G_b \leftarrow \frac{G_b}{q^2} - \sum_j \mu_j G_w

    for each output and all taps of a kernel, the sum with the new G_w (steps 3 to 5 of Algorithms 2 and 3). A grouped
    convolution is as many layers side by side: j and the maximum run over the output's own input channels. All layers
    of one device and type are one multi-tensor operation.

    A row (the weights of one output, and its bias) whose result is not finite in the gradients' type is left as it is,
    as a whole.

    Args:
        weight_grads: of each layer, (O, I / groups, *k) float16, bfloat16, float32 or float64; changed in place.
        bias_grads: (O,) of the weight gradient's type, changed in place, or None: then the weights are only scaled.
        means, variances: (I,) of the layers' inputs, float32 (float64 for float64 gradients).
        groups: of each layer; 1 but for grouped convolutions.
        q2: q^2 of each layer, above 0.
        eps1, eps2: of step 3; eps1 has no unit, eps2 has that of the variances.

    Returns:
        How many rows of each layer were left, () int32, on the layer's device. Not differentiable.

    Raises:
        TypeError, ValueError: a type, shape, device or number other than the ones above, or lists of unequal length.
    """
    lists = {"bias_grads": bias_grads, "means": means, "variances": variances, "groups": groups, "q2": q2}
    for name, values in lists.items():
        if len(values) != len(weight_grads):
            raise ValueError(f"{name}: expected one for each of the {len(weight_grads)} layers, got {len(values)}")
    check_number("eps1", eps1)
    check_number("eps2", eps2)
    batches: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, Gw in enumerate(weight_grads):
        _check_layer(i, Gw, bias_grads[i], means[i], variances[i], groups[i], q2[i])
        batches.setdefault((Gw.device, Gw.dtype), []).append(i)
    left: dict[int, Tensor] = {}
    for layers in batches.values():
        rows = torch.ops.normkernels.precondition(
            [weight_grads[i] for i in layers],
            [weight_grads[i].new_empty(0) if bias_grads[i] is None else bias_grads[i] for i in layers],
            [means[i] for i in layers],
            [variances[i] for i in layers],
            [int(groups[i]) for i in layers],
            [float(q2[i]) for i in layers],
            float(eps1),
            float(eps2),
        )
        left.update(zip(layers, rows.unbind(), strict=True))
    return [left[i] for i in range(len(weight_grads))]


def _check_layer(i: int, Gw: Tensor, Gb: Tensor | None, mean: Tensor, var: Tensor, groups: int, q2: float) -> None:
    check_tensor(f"weight_grads[{i}]", Gw)
    if Gw.dtype not in DTYPES:
        raise TypeError(f"weight_grads[{i}]: expected float16, bfloat16, float32 or float64, got {Gw.dtype}")
    if Gw.dim() < 2 or Gw.numel() == 0:
        raise ValueError(f"weight_grads[{i}]: expected a non-empty shape (O, I / groups, *k), got {tuple(Gw.shape)}")
    check_integer(f"groups[{i}]", groups, minimum=1)
    if Gw.shape[0] % groups:
        raise ValueError(f"groups[{i}]: expected a divisor of the {Gw.shape[0]} outputs, got {groups}")
    if Gb is not None:
        check_like(f"bias_grads[{i}]", Gb, (Gw.shape[0],), (Gw.dtype,), Gw)
    for name, value in ((f"means[{i}]", mean), (f"variances[{i}]", var)):
        check_like(name, value, (Gw.shape[1] * groups,), (statistics_dtype(Gw.dtype),), Gw)
    check_number(f"q2[{i}]", q2)
    if q2 == 0:
        raise ValueError(f"q2[{i}]: expected a number above 0, got 0")


def _fake(weight_grads: Sequence[Tensor], *_: Any) -> Tensor:
    device = weight_grads[0].device if weight_grads else "cpu"
    return torch.empty(len(weight_grads), dtype=torch.int32, device=device)


PRECONDITION = define(
    Op(
        schema="precondition(Tensor(a!)[] weight_grads, Tensor(b!)[] bias_grads, Tensor[] means, Tensor[] variances, "
        "int[] groups, float[] q2, float eps1, float eps2) -> Tensor",
        eager=eager.precondition,
        kernels=("precondition",),
        fake=_fake,
        request=lambda weight_grads, *_: Request(weight_grads[0]),
        reference=reference.precondition,
        tolerance=reference.tolerance,
        samples=reference.samples,
        flops=lambda weight_grads, *_: 6 * sum(map(math.prod, weight_grads)),
    )
)
