"""POP-Norm with nn.BatchNorm's conventions, for use before a convolution or linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from normkernels import ops
from normkernels._checks import check_affine
from normkernels.layers._base import BatchStatisticsLayer
from normkernels.primitives.pop_norm.op import affine_map, check_options


class _POPNorm(BatchStatisticsLayer):
    r"""Pre-operation normalization (POP-Norm, eq. 11 and 12; 18 and 19 for images).

    .. math:: \tilde x = x - \mu + \beta, \qquad y = \frac{\gamma\, \tilde x}{\kappa \sqrt{s + \epsilon}}, \qquad
              s = \frac1m \sum_i \tilde x_i^2 = \sigma^2 + \beta^2

    It belongs before the convolution or linear layer whose input it normalizes (Figure 1), where BatchNorm comes after
    it; :func:`normkernels.convert.to_pop_norm` rewrites a network. It uses batch statistics in training, and running
    averages of mean and variance in evaluation; the second moment s follows from these and beta.

    Args:
        num_features: C, the size of dimension 1.
        kappa: at least 1; divides the output. 4 in the paper; 16 converged to larger losses there (section 5.2).
        eps: added to the second moment, in the units of x squared, as in BatchNorm; the paper has none.
        momentum: weight of the newest batch in the running averages, in [0, 1]; None for the cumulative average.
        affine: whether there are learnable gamma and beta (C,).
        track_running_stats: if False, batch statistics are used in evaluation, too.
        center: if False, the mean stays (x~ = x, s = sigma^2 + mu^2), and there is no beta.
        scale: if False, y = x~, and there is no gamma.

    Shape: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d, (N, C, D, H, W) for 3d; y as x, in x's type and layout.

    State: BatchNorm's: weight, bias, running_mean, running_var (C,), num_batches_tracked. As BatchNorm's, running_var
    averages the unbiased variance m / (m - 1) sigma^2; the running ones are float32 whatever the layer's type (float64
    for float64). A batch whose statistics are not finite leaves all of them as they were.

    Raises:
        ValueError: an option is out of range, neither center nor scale is asked for, the input has another rank or
            channel count, or batch statistics are asked of one value per channel.
        TypeError: the input is not floating-point, or does not fit the layer's type.
    """

    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        kappa: float = 4.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        center: bool = True,
        scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(kappa, eps, center, scale)
        parameters = (*(("weight",) if scale else ()), *(("bias",) if center else ()))
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            statistics={"running_var": (num_features,)}, parameters=parameters,
        )  # fmt: skip
        self.kappa = kappa
        self.center = center
        self.scale = scale

    def reset_running_stats(self) -> None:
        """Set the mean to 0, the variance to 1 and the count of batches to 0."""
        super().reset_running_stats()
        if self.running_var is not None:
            self.running_var.fill_(1)

    def extra_repr(self) -> str:
        modes = f"center={self.center}, scale={self.scale}"
        return f"{self.num_features}, kappa={self.kappa}, {self._repr_of_options()}, {modes}"

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        options = (self.weight, self.bias, self.kappa, self.eps, self.center, self.scale)
        running = self._running()
        if running is not None:
            check_affine(x, self.weight, self.bias)
            mean, var = running
            return affine_map(x, mean, var, *options)
        self._check_batch(x)
        y, mean, var = ops.pop_norm(x, *options)
        if self.training and self.track_running_stats and x.numel() > 0:
            m = x.numel() // x.shape[1]
            self._update(mean, var * (m / (m - 1)))
        return y


class POPNorm1d(_POPNorm):
    __doc__ = _POPNorm.__doc__
    _ranks = (2, 3)


class POPNorm2d(_POPNorm):
    __doc__ = _POPNorm.__doc__
    _ranks = (4,)


class POPNorm3d(_POPNorm):
    __doc__ = _POPNorm.__doc__
    _ranks = (5,)
