"""Loss terms on weights: convolutional orthogonality (OCNN)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkernels._checks import DTYPES, statistics_dtype
from normkernels.dispatch.precision import traceable_full_precision

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def orthogonality(conv: nn.Module) -> Tensor:
    r"""Return how far a layer is from preserving lengths (OCNN; Wang et al., 2020), to be added to the loss.

    With A the layer as a matrix from inputs to outputs, in the interior of a large plane and for one output position,

    .. math::
        C_O \le C_I S: \quad \lVert A A^\top - I \rVert_F^2 =
            \lVert \mathrm{Conv}(K, K, \text{padding} = \lfloor (k - 1) / s \rfloor s, \text{stride} = s)
            - I_{r0} \rVert_F^2

    where s is the stride and S the product of its strides. It is zero where rows, the responses of one output to all
    inputs, are orthonormal. Where C_O > C_I S they cannot be, and columns are taken,
    :math:`\lVert A^\top A - I \rVert_F^2`: for s = 1 the same on K transposed. The two differ by the constant
    C_O - C_I S, so they have the same gradient, but only the one that is taken here can be zero. Inputs that a stride
    greater than the kernel leaves unread do not count: S is the product of min(s, k).

    Args:
        conv: a convolution of any rank, kernel, stride, dilation and groups (blocks are summed), its transpose (the
            adjoint of A, so the same value), or a linear layer (:math:`\lVert W W^\top - I \rVert_F^2` or
            :math:`\lVert W^\top W - I \rVert_F^2`). Its weight may be parametrized. Padding does not matter: at a
            zero-padded border rows are shorter.

    Returns:
        The scalar, float32 (float64 for float64 weights), on the weight's device and differentiable, also under
        autocast.

    Raises:
        TypeError: conv is no nn.Module, or its weight is not a floating-point tensor.
        ValueError: the weight is not that of a linear layer or a convolution, or is empty.
    """
    weight, stride, dilation, groups = _geometry(conv)
    weight = weight.to(statistics_dtype(weight.dtype)).unflatten(0, (groups, -1))
    return _gram_error(_polyphase(weight, stride, dilation))


def _geometry(conv: nn.Module) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], int]:
    """Return weight, stride, dilation and groups of a layer; a ConvTranspose has the weight of what it transposes."""
    if not isinstance(conv, nn.Module):
        raise TypeError(f"conv: expected an nn.Module, got {type(conv).__name__}")
    weight = getattr(conv, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"conv.weight: expected a tensor of a floating-point type, got {got}")
    convolves = hasattr(conv, "stride") and hasattr(conv, "dilation") and hasattr(conv, "groups")
    rank = weight.dim() - 2
    if rank not in ((1, 2, 3) if convolves else (0,)) or weight.numel() == 0:
        raise ValueError(
            f"conv: expected a linear layer or a convolution of rank 1 to 3 with a non-empty weight, "
            f"got {type(conv).__name__} with weight of shape {tuple(weight.shape)}"
        )
    if not convolves:
        return weight, (), (), 1
    layer: Any = conv
    stride, dilation = (
        (value,) * rank if isinstance(value, int) else tuple(value) for value in (layer.stride, layer.dilation)
    )
    return weight, stride, dilation, layer.groups


def _polyphase(weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Return the same layer without a stride: (g, O, I, *k) -> (g, O, I S, *ceil(k / s)).

    The inputs of each phase become a channel: a strided convolution is an unstrided one of the inputs taken s at a
    time. Its taps at dilation * j meet those of another output only where s divides dilation * (j' - j), so dilation
    only takes its common factor out of s.
    """
    rank = len(stride)
    for i, (s, dilated) in enumerate(zip(stride, dilation, strict=True)):
        dim, k = 3 + i, weight.shape[3 + i]
        s = min(s // math.gcd(s, dilated), k)
        if s > 1:
            blocks = -(-k // s)
            weight = F.pad(weight, [0, 0] * (rank - 1 - i) + [0, blocks * s - k])
            weight = weight.unflatten(dim, (blocks, s)).movedim(dim + 1, 3).flatten(2, 3)
    return weight


@traceable_full_precision
def _gram_error(K: Tensor) -> Tensor:
    """Return the sum over groups and lags of |sum_j K[j] K[j + lag]^T - I delta(lag)|_F^2 for K (g, O, I, *k).

    It is taken on the smaller side of K. The Gram matrix at -lag is the transpose of that at lag, so only half of the
    lags of the first dimension are formed.
    """
    if K.shape[1] > K.shape[2]:
        K = K.transpose(1, 2)
    groups, rows, _, *kernel = K.shape
    eye = torch.eye(rows, dtype=K.dtype, device=K.device)
    if math.prod(kernel) == 1:
        K = K.flatten(2)
        return (K @ K.mT - eye).square().sum()
    # Sample n has row n of every group, so that one grouped convolution makes all blocks.
    samples = F.pad(K.transpose(0, 1).flatten(1, 2), [0, 0] * (len(kernel) - 1) + [0, kernel[0] - 1])
    reach = (0, *(k - 1 for k in kernel[1:]))
    gram = _CONVOLUTIONS[len(kernel) - 1](samples, K.flatten(0, 1), padding=reach, groups=groups)
    gram = gram.unflatten(1, (groups, rows)).movedim(1, 0).reshape(groups, rows, rows, kernel[0], -1)
    first, others = gram[:, :, :, 0], gram[:, :, :, 1:]  # lag 0 of the first dimension with all lags of the others
    middle = first.shape[3] // 2
    error = first - F.pad(eye.unsqueeze(-1), [middle, middle])
    return error.square().sum() + 2 * others.square().sum()
