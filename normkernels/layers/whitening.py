"""IterNorm and DBN with nn.BatchNorm's conventions. They differ in one op argument: how W is found."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from normkernels import ops
from normkernels._checks import SCALINGS, check_choice, check_integer, resolve_group_size
from normkernels.layers._base import BatchStatisticsLayer


class _Whitening(BatchStatisticsLayer):
    """Base class of IterNorm and DBN."""

    _method: ClassVar[str]

    running_whitening: Tensor | None

    def __init__(
        self,
        num_features: int,
        group_size: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        num_features = check_integer("num_features", num_features, minimum=1)
        d = resolve_group_size(num_features, group_size)
        shapes = {"running_whitening": (num_features // d, d, d)}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, statistics=shapes)
        self.group_size = d

    def reset_running_stats(self) -> None:
        """Set the mean to 0, the whitening matrix to I (section 3.3) and the count of batches to 0."""
        super().reset_running_stats()
        if self.running_whitening is not None:
            eye = torch.eye(self.running_whitening.shape[1], device=self.running_whitening.device)
            self.running_whitening.copy_(eye.expand_as(self.running_whitening))

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_size={self.group_size}, {self._repr_of_options()}"

    def _op_options(self) -> dict[str, Any]:
        return {"method": self._method}

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        running = self._running()
        if running is not None:
            return ops.whiten(x, *running, self.weight, self.bias)
        y, *statistics = self._whitened(x)
        if self.training and self.track_running_stats and statistics:
            self._update(*statistics)  # eq. 8
        return y

    def _whitened(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return y, mean and W with batch statistics; y alone for an empty batch."""
        self._check_batch(x)
        result = ops.iter_norm(
            x, self.group_size, eps=self.eps, weight=self.weight, bias=self.bias, **self._op_options()
        )
        return result if x.numel() > 0 else result[:1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a BatchNorm checkpoint: its running variance becomes a diagonal matrix with the same inference."""
        variance = state_dict.get(prefix + "running_var")
        if self.running_whitening is not None and variance is not None and variance.shape == (self.num_features,):
            state_dict = dict(state_dict)
            del state_dict[prefix + "running_var"]
            scale = (variance.to(self.running_whitening.dtype) + self.eps).rsqrt()
            state_dict[prefix + "running_whitening"] = torch.diag_embed(scale.view(-1, self.group_size))
            # BatchNorm's own checkpoints had no counter before its version 2.
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _IterNorm(_Whitening):
    r"""Iterative normalization (Huang et al., 2019): whitening by Newton's method, a drop-in for BatchNorm.

    .. math:: y = \mathrm{diag}(\gamma)\, W (x - \mu) + \beta, \qquad W \approx (\Sigma + \epsilon I)^{-1/2}

    It uses batch statistics in training (Algorithm 1) and running averages of mu and W in evaluation (eq. 8).

    Args:
        num_features: C, the size of dimension 1.
        group_size: channels d whitened together; a divisor of C, or more than C for one group.
        num_iterations: T of eq. 17. T = 5 with ``scaling="trace"`` is not full whitening at large d.
        eps: added to the covariance's diagonal, in the units of x squared.
        momentum: weight of the newest batch in the running averages, in [0, 1]; None for the cumulative average.
        affine: whether there are learnable gamma and beta (C,).
        track_running_stats: if False, batch statistics are used in evaluation, too.
        scaling: "trace" (the paper's eq. 14) or "frobenius", a tighter bound that whitens more per iteration.

    Shape: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; y as x, in x's type and layout.

    State: weight, bias (C,); running_mean (C,), running_whitening (G, d, d), num_batches_tracked. The running ones are
    float32 whatever the layer's type (float64 for float64). A BatchNorm state_dict loads as it is.
    A batch whose statistics are not finite leaves all of them as they were.

    Raises:
        ValueError: group_size does not divide C, an option is out of range, the input has another rank or channel
            count, or batch statistics are asked of one value per channel.
        TypeError: the input is not floating-point, or does not fit the layer's type.
    """

    _method = "newton"

    def __init__(
        self,
        num_features: int,
        group_size: int = 64,
        num_iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: str = "trace",
    ) -> None:
        num_iterations = check_integer("num_iterations", num_iterations, minimum=0)
        check_choice("scaling", scaling, SCALINGS)
        super().__init__(num_features, group_size, eps, momentum, affine, track_running_stats, device, dtype)
        self.num_iterations = num_iterations
        self.scaling = scaling

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_iterations={self.num_iterations}, scaling={self.scaling}"

    def _op_options(self) -> dict[str, Any]:
        return {"method": self._method, "num_iterations": self.num_iterations, "scaling": self.scaling}


class _DBN(_Whitening):
    r"""Decorrelated batch normalization (Huang et al., 2018; eq. 2 of IterNorm): exact ZCA whitening by eigh.

    .. math:: y = \mathrm{diag}(\gamma)\, U (\Lambda + \epsilon I)^{-1/2} U^\top (x - \mu) + \beta

    Arguments, shapes, state and errors are those of IterNorm without num_iterations and scaling. Gradients are finite
    at equal and at zero eigenvalues, where autograd through an eigendecomposition gives NaN.
    """

    _method = "eigh"

    def __init__(
        self,
        num_features: int,
        group_size: int = 16,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, group_size, eps, momentum, affine, track_running_stats, device, dtype)


class IterNorm1d(_IterNorm):
    __doc__ = _IterNorm.__doc__
    _ranks = (2, 3)


class IterNorm2d(_IterNorm):
    __doc__ = _IterNorm.__doc__
    _ranks = (4,)


class IterNorm3d(_IterNorm):
    __doc__ = _IterNorm.__doc__
    _ranks = (5,)


class DBN1d(_DBN):
    __doc__ = _DBN.__doc__
    _ranks = (2, 3)


class DBN2d(_DBN):
    __doc__ = _DBN.__doc__
    _ranks = (4,)


class DBN3d(_DBN):
    __doc__ = _DBN.__doc__
    _ranks = (5,)
