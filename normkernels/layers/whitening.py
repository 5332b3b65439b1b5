"""IterNorm and DBN with nn.BatchNorm's conventions. They differ in one op argument: how W is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkernels import ops
from normkernels.ops._checks import (
    SCALINGS,
    check_choice,
    check_data,
    check_flag,
    check_integer,
    check_like,
    check_number,
    resolve_group_size,
    statistics_dtype,
)


class _Whitening(nn.Module):
    """What IterNorm and DBN share. Not an nn._BatchNorm: convert_sync_batchnorm would turn it into SyncBatchNorm."""

    _version = 1
    _ranks: ClassVar[tuple[int, ...]]
    _method: ClassVar[str]

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_whitening: Tensor | None
    num_batches_tracked: Tensor | None

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
        super().__init__()
        num_features = check_integer("num_features", num_features, minimum=1)
        check_number("eps", eps)
        if momentum is not None:
            check_number("momentum", momentum, maximum=1.0)
        check_flag("affine", affine)
        check_flag("track_running_stats", track_running_stats)
        self.num_features = num_features
        self.group_size = resolve_group_size(num_features, group_size)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        dtype = torch.get_default_dtype() if dtype is None else dtype
        empty = torch.empty(num_features, device=device, dtype=dtype)
        check_data("parameters of the layer", empty.unsqueeze(0))  # refuses integer and complex types
        self.register_parameter("weight", nn.Parameter(empty) if affine else None)
        self.register_parameter("bias", nn.Parameter(empty.clone()) if affine else None)
        groups = num_features // self.group_size
        shapes = {"running_mean": (num_features,), "running_whitening": (groups, self.group_size, self.group_size)}
        for name, shape in shapes.items():
            buffer = torch.empty(shape, device=device, dtype=statistics_dtype(dtype)) if track_running_stats else None
            self.register_buffer(name, buffer)
        counter = torch.tensor(0, device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, whitening matrix I (section 3.3), no batch seen."""
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_whitening is not None
            assert self.num_batches_tracked is not None
            self.running_mean.zero_()
            eye = torch.eye(self.group_size, device=self.running_whitening.device)
            self.running_whitening.copy_(eye.expand_as(self.running_whitening))
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            assert self.weight is not None and self.bias is not None
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, group_size={self.group_size}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )

    def _op_options(self) -> dict[str, Any]:
        return {"method": self._method}

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if not self.training and self.running_mean is not None and self.running_whitening is not None:
            mean, W = self.running_mean, self.running_whitening
            if torch.is_grad_enabled():  # a training step may come before the backward of this one, as in BatchNorm
                mean, W = mean.clone(), W.clone()
            return ops.whiten(x, mean, W, self.weight, self.bias)
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"expected more than one value per channel when batch statistics are used, got input of shape "
                f"{tuple(x.shape)}"
            )
        y, mean, W = ops.iter_norm(
            x, self.group_size, eps=self.eps, weight=self.weight, bias=self.bias, **self._op_options()
        )
        if self.training and self.track_running_stats and x.numel() > 0:
            self._update_running_stats(mean, W)
        return y

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, W: Tensor) -> None:
        """eq. 8, skipped as a whole for a batch whose statistics are not finite; no synchronization with the host.

        In few operations, for on a GPU each is a launch. A mean that is not finite makes its W NaN, so W tells for
        both; its entries are at most 1e19, and their sum is finite where they are.
        """
        assert self.running_mean is not None and self.running_whitening is not None
        assert self.num_batches_tracked is not None
        finite = W.sum() * 0 == 0
        self.num_batches_tracked.add_(finite)
        factor: Any = self.momentum
        if factor is None:  # the cumulative average
            factor = 1.0 / self.num_batches_tracked.clamp(min=1).to(mean.dtype)
        for running, batch in ((self.running_mean, mean), (self.running_whitening, W)):
            running.lerp_(torch.where(finite, batch, running), factor)

    def _check_input(self, x: Tensor) -> None:
        check_data("input", x)
        if x.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {expected} input, got {x.dim()}D input of shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got {x.shape[1]} "
                f"in input of shape {tuple(x.shape)}"
            )
        if self.running_mean is not None:
            check_like("running_mean", self.running_mean, (self.num_features,), (statistics_dtype(x.dtype),), x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Whitening:
        """Statistics stay float32 when the layer is cast to a half type: rounding them would change the function."""
        before = {name: getattr(self, name) for name in ("running_mean", "running_whitening")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after is not None and after.dtype != statistics_dtype(after.dtype):
                setattr(self, name, buffer.to(device=after.device, dtype=statistics_dtype(after.dtype)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a BatchNorm checkpoint: its running variance is a diagonal whitening matrix, inference the same."""
        state_dict = dict(state_dict)
        variance = state_dict.get(prefix + "running_var")
        if self.running_whitening is not None and variance is not None and variance.shape == (self.num_features,):
            del state_dict[prefix + "running_var"]
            scale = (variance.to(self.running_whitening.dtype) + self.eps).rsqrt()
            state_dict[prefix + "running_whitening"] = torch.diag_embed(scale.view(-1, self.group_size))
            # BatchNorm's own checkpoints had no counter before its version 2.
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        for name in ("running_mean", "running_whitening"):  # assign=True takes what it gets
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(statistics_dtype(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _IterNorm(_Whitening):
    r"""Iterative normalization (Huang et al., 2019): whitening by Newton's method, a drop-in for BatchNorm.

    .. math:: y = \mathrm{diag}(\gamma)\, W (x - \mu) + \beta, \qquad W \approx (\Sigma + \epsilon I)^{-1/2}

    With batch statistics in training (Algorithm 1) and running averages of mu and W in evaluation (eq. 8).

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
