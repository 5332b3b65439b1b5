"""Condition numbers: of the covariance that a normalization leaves, of the Hessian that BNP preconditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkernels._checks import DTYPES, check_integer, check_like, statistics_dtype
from normkernels.analysis._checks import check_callable, check_finite, check_floating, check_loss
from normkernels.analysis._progress import track
from normkernels.eager.devices import in_float64


@torch.no_grad()
def covariance_condition(x: Tensor) -> Tensor:
    r"""Return the condition number of the covariance matrix of samples (IterNorm, Figure 4a).

    .. math:: \kappa(\Sigma) = \left( \sigma_{\max}(x_c) / \sigma_{\min}(x_c) \right)^2, \quad
        x_c = x - \frac{1}{N} \mathbf 1 \mathbf 1^\top x

    It is computed from singular values of the centered samples in float64. The covariance matrix has their squares, of
    which the smallest would be lost from :math:`\kappa = 10^{16}` on.

    Args:
        x: (..., N, d), N samples of d features, any floating-point type; leading dimensions are problems of their own.

    Returns:
        (...), float32 (float64 for float64 x), no gradient. Infinite where the covariance has not full rank: where
        N <= d, or where the smallest singular value is within rounding, in float64, of zero.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has fewer than two dimensions, no samples or no features, or is not finite.
    """
    check_floating("x", x)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x: expected shape (..., N, d) with N and d at least 1, got {tuple(x.shape)}")
    check_finite("x", x)
    (n, d), dtype, device = x.shape[-2:], statistics_dtype(x.dtype), x.device
    if n <= d:
        return x.new_full(x.shape[:-2], math.inf, dtype=dtype)
    x = in_float64(x)
    values = torch.linalg.svdvals(x - x.mean(-2, keepdim=True))
    largest, smallest = values[..., 0], values[..., -1]
    # The error of the decomposition, and the rounding of the mean and of x - mean, u |x| for each entry.
    eps = torch.finfo(x.dtype).eps
    zero = eps * (n * largest + (n * d) ** 0.5 * x.abs().flatten(-2).amax(-1))
    return torch.where(smallest > zero, largest / smallest, math.inf).square().to(dtype).to(device)


class HessianCondition(NamedTuple):
    """The result of hessian_condition."""

    plain: float  # kappa(H)
    preconditioned: float | None  # kappa(P^T H P)
    scaling: float | None  # kappa(D)


def hessian_condition(
    loss: Callable[[], Tensor],
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
    unit: int = 0,
    *,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    progress: bool = False,
) -> HessianCondition:
    r"""Return the condition number of the Hessian of one unit's weights, plain and preconditioned (BNP, Figure 8).

    .. math::
        H = \nabla^2_{\hat w} L, \quad \hat w = [b_i, w_i], \quad
        \kappa(H) = \max_j \lvert \lambda_j \rvert / \min_{\lambda_j \ne 0} \lvert \lambda_j \rvert

    and of :math:`P^\top H P` with P = U D of eq. 12: U centers by the mean of the layer's input, D divides by its
    standard deviation. For a convolution (Proposition 9) w_i is the kernel of output channel i, and every tap of an
    input channel has that channel's mean and variance (eq. 21, 22). Without a bias w^ = w_i, and D scales, but
    nothing centers.

    All of H is formed, by one Hessian-vector product for each of its n + 1 rows. They are made of backward passes only:
    layers need no forward-mode derivative, but a second derivative. DBN, which has none, raises NotImplementedError.

    Args:
        loss: runs the forward pass and returns the loss, a scalar. It is called once, and does to running statistics
            what a forward pass does.
        layer: the layer of the unit. It may be parametrized: w_i is of the weight that it uses.
        unit: i, the row of the weight.
        mean: mu of the layer's input, (in_features,) or, for convolutions, (in_channels,) of all groups. Given
            together with variance; of no effect without a bias.
        variance: sigma^2, likewise. For BNP's own, add its regularization
            (:math:`\epsilon_1 \max \sigma^2 + \epsilon_2`). None: only the plain condition number.
        progress: shows a bar; needs tqdm.

    Returns:
        HessianCondition(plain, preconditioned, scaling), floats; scaling is :math:`\kappa(D)`, where with a bias one
        diagonal entry of D is 1. NaN where H is zero. An eigenvalue counts as zero within

        .. math:: \epsilon (4 + \sqrt{n + 1}) \sum_j a_j^2, \quad
            a_j = \sum_i \lvert P_{ij} \rvert \left( \lvert H \rvert_{ii} \right)^{1/2}

        which is what the rounding of H, in the parameters' type with its :math:`\epsilon`, may make of it. Use a
        float64 model where condition numbers are large.

    Raises:
        TypeError: loss is no function, or layer, mean or variance has another type.
        ValueError: there is no such unit, mean or variance has another shape or only one of them is there, a variance
            is not positive, the loss is no scalar or does not depend on the layer, or a derivative is not finite.
        NotImplementedError: an operation of the forward pass has no second derivative.
    """
    check_callable("loss", loss)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"layer: expected nn.Linear or nn.Conv1d, 2d or 3d, got {type(layer).__name__}")
    P = _preconditioner(layer, unit, mean, variance)
    with torch.enable_grad(), parametrize.cached():  # cached: the weight here is the one that loss uses
        H = in_float64(_hessian(loss, layer.weight, layer.bias, unit, progress))
    check_finite("second derivative of the loss", H)
    H, eps = 0.5 * (H + H.mT), torch.finfo(layer.weight.dtype).eps
    plain = _condition(H, torch.eye(len(H), dtype=H.dtype, device=H.device), eps)
    if P is None:
        return HessianCondition(plain, None, None)
    D = P.diagonal()
    return HessianCondition(plain, _condition(H, P, eps), (D.max() / D.min()).item())


def _hessian(loss: Callable[[], Tensor], weight: Tensor, bias: Tensor | None, unit: int, progress: bool) -> Tensor:
    """Return the Hessian (n + 1, n + 1) of [b_i, w_i], computed row by row; (n, n) without a bias."""
    parameters = [weight] if bias is None else [bias, weight]
    if not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("layer: expected parameters with requires_grad=True, got frozen ones")
    value = loss()
    check_loss("loss()", value)
    first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    if first[-1] is None:
        raise ValueError("loss: expected one that depends on the layer's weight, got one that does not")
    pairs = zip(parameters, first, strict=True)
    gradient = _of_unit([torch.zeros_like(p) if g is None else g for p, g in pairs], unit)
    if not gradient.requires_grad:  # linear in the parameters
        return gradient.new_zeros(gradient.numel(), gradient.numel())
    rows = [
        _of_unit(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True), unit)
        for entry in track(gradient.unbind(), len(gradient), "Hessian", progress)
    ]
    return torch.stack(rows)


def _of_unit(gradients: Sequence[Tensor], unit: int) -> Tensor:
    """Return one output's part [b_i, w_i] of the gradients of bias and weight, flat."""
    return torch.cat([gradient[unit].flatten() for gradient in gradients])


def _preconditioner(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, unit: int, mean: Tensor | None, variance: Tensor | None
) -> Tensor | None:
    """Return P = U D of eq. 12, (n + 1, n + 1); D alone, (n, n), for a layer without a bias. None without a variance.

    The arguments are checked.
    """
    rows, columns = layer.weight.shape[:2]
    if check_integer("unit", unit, minimum=0) >= rows:
        raise ValueError(f"unit: expected less than the layer's {rows} outputs, got {unit}")
    if variance is None:
        if mean is not None:
            raise ValueError("variance: expected one beside mean, got None")
        return None
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    for name, value in (("variance", variance), ("mean", mean)):
        if value is not None:
            check_like(name, value, (columns * groups,), (*DTYPES,), layer.weight)
            check_finite(name, value)
    if not (variance > 0).all():
        raise ValueError(f"variance: expected positive values, got {variance.min().item():g}")
    group, taps = unit // (rows // groups), layer.weight[0, 0].numel()
    channels = slice(group * columns, (group + 1) * columns)
    D = in_float64(variance[channels].detach()).rsqrt().repeat_interleave(taps)
    if layer.bias is None:
        return D.diag()
    if mean is None:
        raise ValueError("mean: expected one beside variance, for a layer with a bias, got None")
    P = torch.cat([D.new_ones(1), D]).diag()
    P[0, 1:] = -in_float64(mean[channels].detach()).repeat_interleave(taps) * D
    return P


def _condition(H: Tensor, P: Tensor, eps: float) -> float:
    """Return kappa(P^T H P), for H in float64 that was computed in a type with this eps.

    An entry of H is a sum over samples whose terms add up to no more than sqrt(|H|_ii |H|_jj), with |H| the positive
    semidefinite factor of H: its error E_ij is some eps of that. So |P^T E P|_jk <= eps a_j a_k, with the norm
    eps sum a_j^2 at most; 4 + sqrt(n) is for the sums. A bound from |P|^2 |H| would take for zero what P only scales.
    """
    values, vectors = torch.linalg.eigh(H)
    a = P.abs().mT @ (vectors.square() @ values.abs()).sqrt()
    zero = eps * (4 + len(H) ** 0.5) * a.square().sum()
    values = torch.linalg.eigvalsh(P.mT @ H @ P).abs()
    values = values[values > zero]
    return (values.max() / values.min()).item() if len(values) else math.nan
