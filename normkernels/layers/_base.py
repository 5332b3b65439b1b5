"""nn.BatchNorm's conventions, for every layer here that normalizes with a batch's statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkernels._checks import check_data, check_flag, check_integer, check_like, check_number, statistics_dtype
from normkernels._torch import is_batchedtensor


class BatchStatisticsLayer(nn.Module):
    """Base class: parameters, running statistics and their updates, checks of the input, types, checkpoints.

    It is not an nn._BatchNorm, which convert_sync_batchnorm would turn into SyncBatchNorm.
    """

    _version = 1
    _ranks: ClassVar[tuple[int, ...]]

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        statistics: Mapping[str, tuple[int, ...]],
        parameters: tuple[str, ...] = ("weight", "bias"),
    ) -> None:
        """Make parameters and buffers.

        statistics: name and shape of the running statistics besides the mean. parameters: those that are used.
        """
        super().__init__()
        self.num_features = check_integer("num_features", num_features, minimum=1)
        check_number("eps", eps)
        if momentum is not None:
            check_number("momentum", momentum, maximum=1.0)
        check_flag("affine", affine)
        check_flag("track_running_stats", track_running_stats)
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        dtype = torch.get_default_dtype() if dtype is None else dtype
        empty = torch.empty(num_features, device=device, dtype=dtype)
        check_data("parameters of the layer", empty.unsqueeze(0))  # refuses integer and complex types
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(empty.clone()) if affine and name in parameters else None)
        self._statistics = ("running_mean", *statistics)
        for name, shape in {"running_mean": (num_features,), **statistics}.items():
            buffer = torch.empty(shape, device=device, dtype=statistics_dtype(dtype)) if track_running_stats else None
            self.register_buffer(name, buffer)
        counter = torch.tensor(0, device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the mean to 0 and the count of batches to 0; a subclass resets what it keeps besides."""
        if self.track_running_stats:
            assert self.running_mean is not None and self.num_batches_tracked is not None
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _repr_of_options(self) -> str:
        return (
            f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """Return the running statistics where they are to be used, None where the batch's are."""
        if self.training or self.running_mean is None:
            return None
        mean, second = [getattr(self, name) for name in self._statistics]
        if torch.is_grad_enabled():  # a training step may come before the backward of this one, as in BatchNorm
            return mean.clone(), second.clone()
        return mean, second

    @torch.no_grad()
    def _update(self, *batch: Tensor) -> None:
        """Update the running averages, but not by a batch whose statistics are not finite; the host does not wait.

        There are few operations, because on a GPU each is a launch. A mean that is not finite makes the second
        statistic NaN, so that testing the second is enough. It is multiplied by 0 before it is summed, because a sum
        of finite variances can overflow.
        """
        assert self.num_batches_tracked is not None
        finite = (batch[1] * 0).sum() == 0
        if not torch.compiler.is_compiling() and is_batchedtensor(finite) > is_batchedtensor(self.num_batches_tracked):
            raise RuntimeError(
                "torch.vmap: expected running statistics for each batch in training mode, got one set for all; map "
                "over them, too (torch.func.stack_module_state), or use evaluation mode or track_running_stats=False"
            )
        self.num_batches_tracked.add_(finite)
        factor: Any = self.momentum
        if factor is None:  # the cumulative average
            factor = 1.0 / self.num_batches_tracked.clamp(min=1).to(batch[0].dtype)
        for name, new in zip(self._statistics, batch, strict=True):
            running = getattr(self, name)
            running.lerp_(torch.where(finite, new, running), factor)

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

    def _check_batch(self, x: Tensor) -> None:
        """Raise if there is only one value per channel, because batch statistics need more."""
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"expected more than one value per channel when batch statistics are used, got input of shape "
                f"{tuple(x.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchStatisticsLayer:
        """Keep statistics float32 when the layer is cast to a half type: rounding them would change the function."""
        before = {name: getattr(self, name) for name in self._statistics}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after is not None and after.dtype != statistics_dtype(after.dtype):
                setattr(self, name, buffer.to(device=after.device, dtype=statistics_dtype(after.dtype)))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict = dict(state_dict)
        for name in self._statistics:  # with assign=True they are taken as they come
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(statistics_dtype(value.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
