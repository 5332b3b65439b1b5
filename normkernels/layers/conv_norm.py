"""ConvNorm: a convolution whose channels are normalized to tight frames in the Fourier domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkernels import ops
from normkernels._checks import check_data, check_flag, check_integer, check_number, check_tensor
from normkernels._torch import ConvolutionBase

CACHED_SIZES = 8  # spectra kept in evaluation, for as many sizes of planes


class _ConvNorm(ConvolutionBase):
    r"""Convolutional normalization (Liu et al., 2021), a drop-in for nn.Conv1d and nn.Conv2d.

    .. math:: y_k = r_k * v_k * \sum_j a_{kj} * x_j + b_k, \qquad
              \hat v_k = \Big( \sum_j |\hat a_{kj}|^2 + \epsilon E_k \Big)^{-1/2}

    Each output channel's operator becomes a tight frame, Q_k Q_k^T = I (eq. 6 to 8), whatever the scale of its kernels.
    As in appendix B: the input is padded by the kernel's reach, dilation * (k - 1), and convolved without a stride,
    which makes the planes those of a circular convolution; they are filtered by v, and cropped and strided as the
    convolution's own padding and stride want them. More padding than the reach pads the planes by as much.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in nn.Conv2d.
            With another padding_mode than "zeros" the input is padded in that mode first, and the rest is as with
            padding 0. The bias is added last.
        affine: whether there is the paper's affine transform: a learnable k x k kernel r_k for each channel, at first
            the identity, with which the result is cross-correlated (stride and dilation 1, zeros beyond its borders,
            so that the shape stays).
        eps: relative floor of the power spectrum, see :func:`normkernels.ops.kernel_spectrum`.
        detach_spectrum: whether v counts as a constant in backward, the paper's stop-gradient. False gives the
            gradient of the function itself.

    Shape: (N, C, L) or (C, L) for 1d, (N, C, H, W) or (C, H, W) for 2d; y as of nn.Conv1d and nn.Conv2d, in x's layout.
    Spectrum and filter are computed in float32 for half types and under autocast (float64 for float64).

    State: weight and bias as in nn.Conv2d, and affine_weight (C_O, 1, k, k). A convolution's state_dict loads as it is,
    with the identity for affine_weight. No buffer depends on the planes, so any resolution follows any checkpoint.

    In evaluation on a CPU the spectrum is kept from call to call, beside a copy of the weight that it belongs to, and
    computed anew when the weight holds other values, however they came there. On other devices, where the host would
    have to wait for that comparison, and in compiled code it is computed in every call.

    Raises:
        ValueError: an option that nn.Conv2d refuses, a wrong number of dimensions or channels, or planes that are
            smaller than the kernel.
        TypeError: the input is not floating-point or not of the weight's type, or an option has the wrong type.
    """

    affine_weight: nn.Parameter | None
    _dims: ClassVar[int]
    _conv: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        affine: bool = True,
        eps: float = 1e-8,
        detach_spectrum: bool = True,
    ) -> None:
        check_number("eps", eps)
        for name, flag in (("bias", bias), ("affine", affine), ("detach_spectrum", detach_spectrum)):
            check_flag(name, flag)
        in_channels = check_integer("in_channels", in_channels, minimum=1)
        out_channels = check_integer("out_channels", out_channels, minimum=1)
        groups = check_integer("groups", groups, minimum=1)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(f"groups: expected a divisor of {name} = {value}, got {groups}")
        each = tuple(
            self._per_dimension(name, value)
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        if not isinstance(padding, str):
            padding = self._per_dimension("padding", padding, minimum=0)
        super().__init__(
            in_channels, out_channels, each[0], each[1], padding, each[2], False, (0,) * self._dims, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        check_data("parameters of the layer", self.weight)  # refuses integer and complex types
        self.affine = affine
        self.eps = eps
        self.detach_spectrum = detach_spectrum
        affine_weight = torch.empty((out_channels, 1, *each[0]), device=device, dtype=dtype)
        self.register_parameter("affine_weight", nn.Parameter(affine_weight) if affine else None)
        self._reset_affine()
        # (before, after) for each dimension; nn.Conv2d keeps them as F.pad takes them, the last dimension first.
        sides = self._reversed_padding_repeated_twice
        self._sides = [(sides[i], sides[i + 1]) for i in range(len(sides) - 2, -1, -2)]
        self._spectra = _Spectra()

    def _per_dimension(self, name: str, value: Any, minimum: int = 1) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self._dims
        if len(values) != self._dims:
            raise ValueError(f"{name}: expected an int or {self._dims} of them, got {value!r}")
        return tuple(check_integer(name, entry, minimum) for entry in values)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "affine_weight"):  # it does not exist yet when nn.Conv2d's constructor calls
            self._reset_affine()

    @torch.no_grad()
    def _reset_affine(self) -> None:
        if self.affine_weight is not None:
            self.affine_weight.copy_(self._identity(self.affine_weight))

    def _identity(self, like: Tensor) -> Tensor:
        """Return kernels that leave everything in place, of a weight's type and on its device."""
        identity = like.new_zeros((self.out_channels, 1, *self.kernel_size))
        center: Any = (..., *((k - 1) // 2 for k in self.kernel_size))
        identity[center] = 1
        return identity

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, affine={self.affine}, eps={self.eps}, detach_spectrum={self.detach_spectrum}"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # read once: under a parametrization every access computes it
        self._check_input(x, weight)
        if x.dim() == self._dims + 1:
            return self._forward(x.unsqueeze(0), weight).squeeze(0)
        return self._forward(x, weight)

    def _forward(self, x: Tensor, weight: Tensor) -> Tensor:
        padding = self._sides
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = [(0, 0)] * self._dims
        reach = [step * (k - 1) for k, step in zip(self.kernel_size, self.dilation, strict=True)]
        full = [(max(p, r), max(q, r)) for (p, q), r in zip(padding, reach, strict=True)]
        z = self._unstrided(x, weight, full, reach)
        kept = [
            slice(before - p, n - (after - q), s)
            for n, (before, after), (p, q), s in zip(z.shape[2:], full, padding, self.stride, strict=True)
        ]
        y = ops.spectral_filter(z, self._spectrum(weight, tuple(z.shape[2:])), kept)
        if self.affine_weight is not None:
            return self._affine(y, self.affine_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * self._dims)

    def _unstrided(self, x: Tensor, weight: Tensor, full: list[tuple[int, int]], reach: list[int]) -> Tensor:
        """Return the convolution of x padded by ``full``. About half of the padding is left to the convolution.

        Not all is left to it: oneDNN's gradient in the weight takes twice as long with a padding of k - 1 as with
        (k - 1) // 2 (12 instead of 6.5 ms for (32, 64, 32, 32) and 3 x 3). Rejected: an autograd function that pads in
        backward only. It keeps x instead of the padded copy, a seventh less, and is no faster.
        """
        own = [r // 2 for r in reach]
        rest = [p - o for sides, o in zip(reversed(full), reversed(own), strict=True) for p in sides]
        return self._conv(F.pad(x, rest) if any(rest) else x, weight, None, 1, own, self.dilation, self.groups)

    def _affine(self, y: Tensor, kernels: Tensor) -> Tensor:
        """Apply r_k and the bias."""
        own = [(k - 1) // 2 for k in self.kernel_size]
        if any(k % 2 == 0 for k in self.kernel_size):
            y = F.pad(y, [side for k in reversed(self.kernel_size) for side in (0, 1 - k % 2)])
        return self._conv(y, kernels, self.bias, 1, own, 1, self.out_channels)

    def _spectrum(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        if self.detach_spectrum or not (torch.is_grad_enabled() and weight.requires_grad):
            weight = weight.detach()

        def compute() -> Tensor:
            return ops.kernel_spectrum(weight, size, self.eps, self.dilation)

        if self.training or weight.requires_grad or not _Spectra.can_keep(weight):
            return compute()
        return self._spectra.get(weight, (*size, *self.dilation, self.eps), compute)

    def train(self, mode: bool = True) -> _ConvNorm:
        self._spectra.clear()  # to free memory: training does not need the copy of the weight
        super().train(mode)
        return self

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        check_tensor("input", x)
        if x.dim() not in (self._dims + 1, self._dims + 2):
            raise ValueError(
                f"expected {self._dims + 2}D input, or {self._dims + 1}D without a batch, "
                f"got {x.dim()}D input of shape {tuple(x.shape)}"
            )
        check_data("input", x)
        channels = x.shape[-self._dims - 1]
        if channels != self.in_channels:
            raise ValueError(f"expected {self.in_channels} channels, got {channels} in input of shape {tuple(x.shape)}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"input: expected {weight.dtype} like the weight, got {x.dtype}")
        for n, k, step, sides in zip(x.shape[-self._dims :], self.kernel_size, self.dilation, self._sides, strict=True):
            if n == 0 or n + sum(sides) < step * (k - 1) + 1:
                raise ValueError(
                    f"expected planes of at least {step * (k - 1) + 1} with the padding for a kernel of {k} taps with "
                    f"dilation {step}, got {n + sum(sides)} (input {tuple(x.shape)}, padding {sides})"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept the checkpoint of a convolution, which is one with the identity for the affine transform."""
        if self.affine_weight is not None and prefix + "weight" in state_dict:
            identity = self._identity(state_dict[prefix + "weight"])
            state_dict = {prefix + "affine_weight": identity, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Spectra:
    """Spectra of one state of a weight, for a few sizes of planes.

    That state is recognized by comparing values, an exact test that reads the weight once. Rejected: versions and
    addresses, which ``weight.data.copy_(...)`` does not change.
    """

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self) -> tuple[type[_Spectra], tuple[()]]:
        return _Spectra, ()  # copies and pickles of a layer start without spectra

    @staticmethod
    def can_keep(weight: Tensor) -> bool:
        if torch.compiler.is_compiling() or weight.device.type != "cpu":
            return False
        try:
            weight.data_ptr()
        except RuntimeError:  # torch.func's wrappers, fake tensors
            return False
        return True

    def clear(self) -> None:
        # One tuple, replaced as a whole: threads and replicas that share it see a consistent state.
        self._kept: tuple[Tensor | None, dict[tuple[float, ...], Tensor]] = (None, {})

    def get(self, weight: Tensor, key: tuple[float, ...], compute: Callable[[], Tensor]) -> Tensor:
        values, found = self._kept
        if values is None or values.dtype != weight.dtype or not torch.equal(values, weight):
            values, found = None, {}
        if key in found:
            return found[key]
        with torch.inference_mode(False):  # a later call may come from outside of inference mode
            v = compute()
            recent = list(found.items())[1 - CACHED_SIZES :]
            self._kept = (weight.clone() if values is None else values, {**dict(recent), key: v})
        return v


class ConvNorm1d(_ConvNorm):
    __doc__ = _ConvNorm.__doc__
    _dims = 1
    _conv = staticmethod(F.conv1d)


class ConvNorm2d(_ConvNorm):
    __doc__ = _ConvNorm.__doc__
    _dims = 2
    _conv = staticmethod(F.conv2d)
