"""Batch renormalization (Ioffe, 2017), the papers' baseline for small mini-batches.

Rejected: torchrl 0.14.1's BatchRenorm1d, the one well-kept implementation found, which installs beside torch 2.13.
For images its running variance is sigma_H^2 N / (N - 1), with N the samples and not the values of a channel: twice
too large at N = 2, infinite at 1. Its warm-up factor goes on growing after 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normkernels._checks import check_number
from normkernels.layers._base import BatchStatisticsLayer


class _BatchRenorm(BatchStatisticsLayer):
    r"""Batch renormalization (BNP paper, eq. 3), per channel over samples and positions.

    .. math:: y = \gamma \left( \frac{x - \mu_H}{\sigma_H} s + d \right) + \beta, \qquad
              s = \frac{\sigma_H}{\sigma}, \quad d = \frac{\mu_H - \mu}{\sigma}, \qquad
              \sigma_H = \sqrt{\operatorname{var}(x) + \epsilon}

    in training, with the biased variance; :math:`y = \gamma (x - \mu) / \sigma + \beta` in evaluation. Gradients pass
    through mu_H and sigma_H; s and d are constants, clipped to [1 / r_max, r_max] and [-d_max, d_max]. They take the
    running mu and sigma from before this batch, which is then averaged in. As in Ioffe's Algorithm 1 the standard
    deviation is averaged, not the variance as in BatchNorm.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance, in the units of x squared.
        momentum: weight of the newest batch in the running averages, in [0, 1]; None for the cumulative average.
        r_max: at least 1. With r_max = 1 and d_max = 0 it is BatchNorm.
        d_max: at least 0. Both may be changed between steps: Ioffe begins with BatchNorm and relaxes them to 3 and 5.

    Shape: (N, C) or (N, C, L) for 1d, (N, C, H, W) for 2d; y as x.

    State: weight, bias (C,) in the layer's type; running_mean, running_std (C,) in float32 (float64 for float64),
    num_batches_tracked. A batch whose statistics are not finite leaves them as they were.

    Raises:
        ValueError: an option is out of range, the input has another rank or channel count, or one value per channel
            in training.
        TypeError: the input is not floating-point, or does not fit the layer's type.
    """

    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("r_max", r_max, minimum=1.0)
        check_number("d_max", d_max)
        super().__init__(
            num_features, eps, momentum, True, True, device, dtype, statistics={"running_std": (num_features,)}
        )
        self.r_max = r_max
        self.d_max = d_max

    def reset_running_stats(self) -> None:
        """Reset the statistics to mean 0, standard deviation 1 and no batch seen."""
        super().reset_running_stats()
        self.running_std.fill_(1)

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, momentum={self.momentum}"
        return f"{self.num_features}, {options}, r_max={self.r_max}, d_max={self.d_max}"

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        assert self.weight is not None and self.bias is not None
        running = self._running()
        if running is not None:
            mean, std = running
            return F.batch_norm(x, mean, std.square(), self.weight, self.bias, eps=0.0)
        self._check_batch(x)
        assert self.running_mean is not None
        with torch.no_grad():
            var, mean = torch.var_mean(x, [i for i in range(x.dim()) if i != 1], correction=0)
            std = (var + self.eps).sqrt()
            s = (std / self.running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
            self._update(mean, std)
        # gamma (x^ s + d) + beta is BatchNorm with other gamma and beta
        return F.batch_norm(x, None, None, self.weight * s, self.weight * d + self.bias, training=True, eps=self.eps)


class BatchRenorm1d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    _ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    __doc__ = _BatchRenorm.__doc__
    _ranks = (4,)
