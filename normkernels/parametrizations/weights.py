"""ONI, weight standardization and centered weight normalization, which compute a layer's weight from parameters.

All three see the weight as a matrix of rows, one for each output channel: (n, d) with n = C_O and d the fan-in.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkernels._checks import DTYPES, check_integer, check_number, statistics_dtype
from normkernels.dispatch.precision import traceable_full_precision
from normkernels.primitives.inverse_sqrt.op import inverse_sqrt


def oni(module: nn.Module, name: str = "weight", num_iterations: int = 5, scale: float = 1.0) -> nn.Module:
    r"""Make a weight's rows, or columns, orthogonal by Newton's iteration (ONI; Huang et al., 2020).

    .. math::
        W = a B_T V, \quad V = Z_c / \sqrt{\lVert Z_c Z_c^\top \rVert_F}, \quad
        B_0 = I, \quad B_t = \tfrac12 (3 B_{t-1} - B_{t-1}^3 V V^\top)

    Z (n, d) is the stored parameter, one row for each output channel. n <= d gives rows, W W^T -> a^2 I; n > d gives
    columns, W^T W -> a^2 I, from V^T V (d, d) as p(V V^T) V = V p(V^T V): the Gram matrix is never the singular one.
    Z_c is Z minus its mean along the longer side (the paper's row mean for n < d), whereby W has it zero, too. A square
    Z is not centred: centred it would be singular, and W not orthogonal.

    T controls how orthogonal they are: an iteration multiplies small singular values of V by 1.5, and none exceeds 1.
    For N(0, 1) of (64, 576) those of W are at least .96 after T = 5 and .9999 after 7, of (512, 4608) .80 and .99. A
    random square Z is nearly singular and may take 20; in float32 its smallest singular value then stays below 1, as
    eps is added to Z Z^T, relative to its trace: 1.2e-7 (2e-16 in float64). W depends on Z's direction only: Z may be
    of any scale.

    Args:
        module: a Linear, Conv or ConvTranspose of any rank, kernel and groups, or anything with such a weight.
        name: of its parameter, of shape (C_O, C_I / groups, *k), for a ConvTranspose (C_I, C_O / groups, *k). Rows go
            over all output channels, those of other groups included.
        num_iterations: T >= 0.
        scale: a > 0. The paper takes sqrt(2) before a ReLU.

    Returns:
        module, its parameter replaced. Half types are computed in float32, and autocast does not reach into it. A zero
        Z gives zeros, a rank-deficient one orthogonality on its range.

    Raises:
        TypeError: module is no nn.Module, the parameter is not floating-point, or an option has the wrong type.
        ValueError: there is no such parameter, it has fewer than two dimensions, or an option is out of range.
    """
    check_integer("num_iterations", num_iterations, minimum=0)
    check_number("scale", scale)
    if scale == 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    return _register(module, name, _ONI(_transposed_groups(module, name), num_iterations, float(scale)))


def weight_standardization(module: nn.Module, name: str = "weight", eps: float = 1e-10) -> nn.Module:
    r"""Give the weights of each output channel mean 0 and variance 1 (Qiao et al., 2019).

    .. math:: w = (z - \mathrm{mean}(z)) / \sqrt{\mathrm{var}(z) + \epsilon}

    over the fan-in d, with the biased variance. As in the paper there is no gain: a normalization is to follow, and an
    output of unit-variance inputs has variance d.

    Args:
        module, name: as for oni.
        eps: in the units of the parameter squared. Weights start with variances of 1e-5 to 1e-1, where an activation's
            eps of 1e-5 would be part of the function. A channel that varies less than sqrt(eps) shrinks towards zero;
            one of equal weights, so any channel with a fan-in of 1, is zero. With eps = 0 it is NaN.

    Returns, raises: as oni.
    """
    check_number("eps", eps)
    return _register(module, name, _WeightStandardization(_transposed_groups(module, name), float(eps)))


def centered_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    r"""Give filters mean 0 and a learned length (centered weight normalization; Huang et al., 2017).

    .. math:: w = g \, (v - \mathrm{mean}(v)) / \lVert v - \mathrm{mean}(v) \rVert

    Parameters are as in torch's weight_norm: g (C_O, 1, ...) is ``original0`` and v ``original1``. g starts as the
    length of the centred weight, so the layer starts with its own weight less the mean. The paper's filters of fixed
    length are ``module.parametrizations.weight.original0.requires_grad_(False)``.

    w does not depend on v's scale. A filter of equal weights, so any with a fan-in of 1, is zero and finite; one that
    starts there, with g = 0, stays zero.

    Args, returns, raises: as oni.
    """
    return _register(module, name, _CenteredWeightNorm(_transposed_groups(module, name)))


class _Rows(nn.Module):
    """Base class that turns a weight into (n, d) rows of output channels, and back."""

    def __init__(self, transposed_groups: int) -> None:
        super().__init__()
        self.transposed_groups = transposed_groups  # a ConvTranspose's: output channels are dimension 1; else 0

    def rows(self, weight: Tensor) -> Tensor:
        if self.transposed_groups:
            weight = weight.unflatten(0, (self.transposed_groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1).to(statistics_dtype(weight.dtype))

    def weight(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.transposed_groups:
            groups, n = self.transposed_groups, like.shape[1]
            rows = rows.view(groups, n, like.shape[0] // groups, *like.shape[2:]).transpose(1, 2)
        return rows.reshape(like.shape).to(like.dtype)


class _ONI(_Rows):
    def __init__(self, transposed_groups: int, num_iterations: int, scale: float) -> None:
        super().__init__(transposed_groups)
        self.num_iterations = num_iterations
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return self.weight(self.scale * orthogonalize(self.rows(weight), self.num_iterations), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"num_iterations={self.num_iterations}, scale={self.scale}"


@traceable_full_precision
def orthogonalize(Z: Tensor, num_iterations: int) -> Tensor:
    """Return B_T V of ``oni`` for a float32 or float64 matrix Z (n, d)."""
    n, d = Z.shape
    if n > d:
        return orthogonalize(Z.mT, num_iterations).mT
    Z = Z / _magnitude(Z)  # squares neither overflow nor underflow
    if n < d:
        Z = Z - Z.mean(1, keepdim=True)
    # The Gram matrix gets trace 1, so that eps below is relative to it. eps lifts eigenvalues that rounding has made
    # negative, from where the iteration diverges. Half of it was not enough for weights of rank 1 to 25 and T = 40.
    norm = torch.linalg.vector_norm(Z)
    V = Z / torch.where(norm > 0, norm, 1.0)
    gram = V @ V.mT
    eps = torch.finfo(Z.dtype).eps
    return inverse_sqrt(gram.unsqueeze(0), num_iterations, eps=eps, scaling="frobenius").squeeze(0) @ V


class _WeightStandardization(_Rows):
    def __init__(self, transposed_groups: int, eps: float) -> None:
        super().__init__(transposed_groups)
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.rows(weight)
        var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        return self.weight((rows - mean) * (var + self.eps).rsqrt(), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _CenteredWeightNorm(_Rows):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        direction, _ = self._polar(v)
        return self.weight(g.flatten(1).to(direction.dtype) * direction, v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _, length = self._polar(weight)
        return length.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)), weight

    def _polar(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit rows and their lengths (n, 1); a centred row of zeros stays a row of zeros."""
        rows = self.rows(v)
        magnitude = _magnitude(rows, 1)
        rows = rows / magnitude
        rows = rows - rows.mean(1, keepdim=True)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(norm > 0, norm, 1.0), norm * magnitude


def _magnitude(rows: Tensor, dim: int | None = None) -> Tensor:
    """Return the largest absolute value, 1 where that is 0.

    It is a constant for autograd, because the results of what is divided by it do not depend on scale.
    """
    largest = rows.detach().abs()
    largest = largest.amax() if dim is None else largest.amax(dim, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _transposed_groups(module: nn.Module, name: str) -> int:
    """Do the checks that all three share; return the groups of a ConvTranspose, 0 for every other layer."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {name!r}")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        names = ", ".join(n for n, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(f"name: expected a parameter of {type(module).__name__} ({names}), got {name!r}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name}: expected an initialized parameter, got one of a lazy layer that has seen no input")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {weight.dtype}")
    if weight.dim() < 2 or math.prod(weight.shape) == 0:
        raise ValueError(f"{name}: expected a non-empty shape (C_O, C_I / groups, *k), got {tuple(weight.shape)}")
    return cast(Any, module).groups if name == "weight" and getattr(module, "transposed", False) else 0


def _register(module: nn.Module, name: str, parametrization: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, name, parametrization)
    return module
