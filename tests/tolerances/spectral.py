"""Floors of ConvNorm: the spectrum of a kernel, the filter, and the layer.

Glossary
    power   p(f) = sum_i |a^_ki(f)|^2, v = (p + eps E)^(-1/2), both (C_O, *size)
    peak    sum_i (sum over taps of |a_ki|)^2 >= p(f): what the terms of any sum that gives p add up to
    r       v sqrt(p) <= 1, the normalized spectrum |a^| v; v sqrt(eps E) = sqrt(1 - r^2) is what eps adds
    S       sqrt(2 ln N): the largest of N rounding errors over their root mean square
    rms     over one plane, the worst sample of each channel

Derivation
    v           p is a sum over channels, taps and lags (or log2 of the plane, for the oracle's FFT), in float64:
                dp <= u64 t peak, t = 4 + sqrt(C_I k) + sqrt(2 k - 1) + log2 n; and dv / v = -dp v^2 / 2. What is left
                is to round v to its type. At a spectral zero v^2 = 1 / (eps E): dv / v = u64 t peak / (2 eps E),
                which is 1e-7 or so. Without float64 the sums are as good, of digits. The rest is float32: p, E and
                eps E are rounded, and their sum, 3 u of p + eps E and so 1.5 u of v, and its inverse root twice:
                3.5 u, and the factor of scale none.
    dweight     sum_f dv v^3 conj(a^): a^ is good to u64 t sqrt(peak), v^3 to three times dv / v, and v may have been
                saved in its own type: 3 u |dv| v^2 r, and sqrt(eps (1 - r^2)) for r in the term of E.
    filter      A transform is a product with an orthogonal matrix of H and one of W terms a sum: the error of a
                coefficient is u t rms(z), t = 4 + sqrt(H) + sqrt(W) (an FFT's is smaller). The errors are spread over
                all frequencies like white noise, so v makes rms(v) times as much of them, and transforming back adds
                the same relative to y: S u t (rms(z) rms(v) + rms(y)). Every channel for itself.
    dv          Re(conj(z^) dy^) / n, summed over samples: both factors are good to u t of their rms.
    y           The errors of z (a sum of C_I k terms, then rounded to x's type) and of the filter, both white. The
                affine correlates them with |r|_1 at most, and is rounded again, as is the bias.
    dz          The same path backwards: the affine's adjoint, whose norm is at most |r|_1 |dy|_2, then the filter.
    dx          Each dz_k comes with |w_ki|_1, and as often as padding has copied the element.
    dweight     <dz, x> <= |dz|_2 |x|_2. The spectrum's part is that of v above, with a dv whose factors z^ and dy^
                have the errors of z and of dy in the type of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normkernels.eager.devices import has_float64
from tests.oracles import convnorm
from tests.oracles.plain import stat_dtype
from tests.tolerances.common import assert_within, largest, unit


def noise(count: int) -> float:
    """Return S: the largest of count independent errors, in root mean squares."""
    return max(1.0, (2 * torch.tensor(float(max(count, 2))).log().item()) ** 0.5)


def plane_rms(t: Tensor) -> Tensor:
    """Return the root mean square of each channel's worst sample: (N, C, *size) -> (C,)."""
    if not t.numel():
        return torch.zeros(t.shape[1], dtype=torch.float64)
    return t.double().flatten(2).square().mean(2).sqrt().amax(0)


def spectrum_terms(weight: Tensor, size: Sequence[int]) -> float:
    """Return t of the derivation of v."""
    lags = torch.Size([2 * k - 1 for k in weight.shape[2:]]).numel()
    return 4 + weight[0].numel() ** 0.5 + lags**0.5 + torch.tensor(float(torch.Size(size).numel())).log2().item()


def peak_power(weight: Tensor) -> Tensor:
    """Return the bound of every p(f), (C_O, 1...)."""
    return weight.double().abs().flatten(2).sum(2).square().sum(1).view(-1, *[1] * (weight.ndim - 2))


def inverse_root_error(weight: Tensor) -> float:
    """Return the error of the way from p to v, relative to v."""
    exact = stat_dtype(weight.dtype) == torch.float64 or has_float64(weight.device)
    return 4 * unit(torch.float64) if exact else 3.5 * unit(torch.float32)


def spectrum_floor(weight: Tensor, v: Tensor) -> Tensor:
    """Return the floor of v entry by entry, for the oracle's v (C_O, *size)."""
    error = unit(torch.float64) * spectrum_terms(weight, v.shape[1:]) * peak_power(weight) * v.square() / 2
    return v * (error + inverse_root_error(weight) + unit(stat_dtype(weight.dtype)))


def spectrum_gain(v: Tensor, power: Tensor, eps: float) -> Tensor:
    """Return |d v(f) / d a| for each frequency: v^2 (r + sqrt(eps (1 - r^2)))."""
    r = (v * power.sqrt()).clamp(max=1)
    return v.square() * (r + (eps * (1 - r.square())).sqrt())


def spectrum_gradient_floor(weight: Tensor, v: Tensor, dv: Tensor, dweight: Tensor, power: Tensor, eps: float) -> float:
    """Return the worst channel's floor, for the oracle's v, power and gradient of weight."""
    t, peak, gain = spectrum_terms(weight, v.shape[1:]), peak_power(weight), spectrum_gain(v, power, eps)
    of_a_and_v = unit(torch.float64) * t * (v**3 * peak.sqrt() + 1.5 * peak * v.square() * gain)
    saved = 3 * (inverse_root_error(weight) + unit(stat_dtype(weight.dtype))) * gain
    error = (dv.double().abs() * (of_a_and_v + saved)).flatten(1).sum(1).max().item()
    return error + unit(weight.dtype) * largest(dweight)


def filter_terms(size: Sequence[int]) -> float:
    """Return t of the derivation of filter: one product with an orthogonal matrix along each axis."""
    return 4 + sum(n**0.5 for n in size)


def filter_floor(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """Return the floors (C,) of y of spectral_filter, or of dz for y's gradient.

    z is in the type of the test, y the oracle's.
    """
    u, rms_v = unit(stat_dtype(z.dtype)), v.double().flatten(1).square().mean(1).sqrt()
    white = noise(z.numel()) * u * filter_terms(v.shape[1:]) * (plane_rms(z) * rms_v + plane_rms(y))
    largest_y = y.double().abs().movedim(1, 0).flatten(1).amax(1) if y.numel() else torch.zeros_like(white)
    return white + unit(z.dtype) * largest_y


def filter_spectrum_floor(z: Tensor, v: Tensor, dy: Tensor, dv: Tensor) -> float:
    """Return the floor of dv: two factors, each with its own error, and a sum over N samples."""
    u, t = unit(stat_dtype(z.dtype)), 2 * filter_terms(v.shape[1:]) + z.shape[0] ** 0.5
    size = (plane_rms(z) * plane_rms(dy)).max().item() * z.shape[0]
    return noise(v.numel()) ** 2 * u * t * size + unit(v.dtype) * largest(dv)


@dataclass(frozen=True)
class ConvNormFloors:
    """The floors of one problem, absolute."""

    y: float
    dx: float
    dweight: float
    dbias: float
    daffine: float


def conv_norm_floors(
    x: Tensor, parameters: Sequence[Tensor | None], config: convnorm.Config, dy: Tensor,
    y: Tensor, grads: Sequence[Tensor | None] = (None,) * 4,
) -> ConvNormFloors:  # fmt: skip
    """Return the floors for x, dy, parameters in the type of the test, and the oracle's y and grads.

    parameters: weight, bias, affine_weight; grads: x's first.
    """
    weight, _, affine_weight = parameters
    assert weight is not None
    u, rounding = unit(stat_dtype(x.dtype)), unit(x.dtype)
    up, w, dy = x.double(), weight.detach().double(), dy.double()
    kernel, samples = w.shape[2:], x.shape[0]
    r = None if affine_weight is None else affine_weight.detach().double()
    with torch.enable_grad():
        z = convnorm.unstrided(up, w, config).requires_grad_()
        v = convnorm.kernel_spectrum(w, z.shape[2:], config.eps, config.dilation).requires_grad_()
        filtered = convnorm.spectral_filter(z, v)
        out = convnorm.cropped(filtered, up, kernel, config)
        out = out if r is None else convnorm.affine(out, r)
        d_filtered, dz, dv = torch.autograd.grad(out, (filtered, z, v), dy)
        copied = torch.zeros_like(up).requires_grad_()
        (copies,) = torch.autograd.grad(convnorm.padded(copied, kernel, config)[0].sum(), copied)
    z, v, filtered = z.detach(), v.detach(), filtered.detach()
    size = z.shape[2:].numel()
    r_sum = torch.ones(w.shape[0], dtype=torch.float64) if r is None else r.abs().flatten(1).sum(1)
    rms_v, v_max = v.flatten(1).square().mean(1).sqrt(), v.flatten(1).amax(1)
    rms_z, rms_y, rms_d, rms_dz = (plane_rms(t) for t in (z, filtered, d_filtered, dz))
    rms_dy = plane_rms(dy) * (dy[0, 0].numel() / size) ** 0.5  # as many values, on the whole circle

    conv, tap, transform = u * (4 + w[0].numel() ** 0.5), u * (4 + kernel.numel() ** 0.5), u * filter_terms(z.shape[2:])
    of_v = 1.5 * unit(torch.float64) * spectrum_terms(w, z.shape[2:]) * peak_power(w).flatten() * v_max**2
    of_v = of_v + 3 * u + inverse_root_error(weight)
    of_z = conv * plane_rms(convnorm.unstrided(up.abs(), w.abs(), config)) + 2 * rounding * rms_z + transform * rms_z
    of_y = of_z * rms_v + (transform + rounding + of_v) * rms_y
    of_d = (tap + 2 * rounding) * r_sum * rms_dy + transform * rms_d
    of_dz = of_d * rms_v + (transform + rounding + of_v) * rms_dz

    back = u * (4 + (w.numel() / w.shape[1]) ** 0.5) + rounding
    of_dx = (of_dz + back * rms_dz) * w.abs().flatten(2).sum(2).amax(1)
    along = (samples * size) ** 0.5
    norm_x = convnorm.padded(up, kernel, config)[0].movedim(1, 0).flatten(1).norm(dim=1).max()
    of_dweight = norm_x * along * (of_dz + (u * along + rounding) * rms_dz)
    if not config.detach_spectrum:
        z_hat, d_hat = (torch.fft.fftn(t, dim=convnorm.spatial(t), norm="ortho").abs() for t in (z, d_filtered))
        of_z, of_d = (t.view(-1, *[1] * len(kernel)) for t in (of_z, of_d))
        of_dv = (of_z * d_hat + of_d * z_hat + of_z * of_d + u * samples**0.5 * z_hat * d_hat).sum(0)
        power = convnorm.power(w, z.shape[2:], config.dilation)
        of_dweight = of_dweight + (of_dv * spectrum_gain(v, power, config.eps)).flatten(1).sum(1)
        of_dweight = of_dweight + spectrum_gradient_floor(weight, v, dv, torch.zeros(()), power, config.eps)
    norm_dy, sum_dy = rms_dy * along, dy.abs().movedim(1, 0).flatten(1).sum(1)
    rounded = [
        0.0 if p is None or g is None else unit(p.dtype) * largest(g)
        for p, g in zip((x, *parameters), grads, strict=True)
    ]
    of_affine = r_sum * (of_y + (tap + rounding) * rms_y)
    return ConvNormFloors(
        y=noise(y.numel()) * of_affine.max().item() + rounding * largest(y),
        dx=noise(x.numel()) * largest(copies) * of_dx.view(config.groups, -1).sum(1).max().item() + rounded[0],
        dweight=of_dweight.max().item() + rounded[1],
        dbias=((u * (2 + along) + rounding) * sum_dy).max().item() + rounded[2],
        daffine=(norm_dy * along * (of_y + (rounding + u * along) * rms_y)).max().item() + rounded[3],
    )


def assert_conv_norm(
    got: Sequence[Tensor | None], oracle: Sequence[Tensor | None], plain: Sequence[Tensor | None], floor: ConvNormFloors
) -> None:
    """Check the rule for y and the gradients of x, weight, bias and affine_weight."""
    for name, value, exact, other in zip(("y", "dx", "dweight", "dbias", "daffine"), got, oracle, plain, strict=True):
        assert (value is None) == (exact is None), name
        if value is not None and exact is not None:
            assert_within(name, value, exact, other, getattr(floor, name), largest(exact))
