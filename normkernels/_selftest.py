"""Self-test of ``python -m normkernels.info``: every op against the papers' equations, evaluated in float64.

It needs neither the eager kernels nor the test suite, so that every installation can check itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import normkernels as nk
from normkernels.dispatch import choose, define
from normkernels.eager.devices import has_float64

ROUNDOFF = 2.0**-24  # float32, round to nearest
SAMPLES, GROUPS, D, T, EPS = (6, 5, 5), 2, 4, 5, 1e-5
M = 6 * 5 * 5  # samples of each channel
Result = tuple[Sequence[Tensor], Sequence[Tensor], float]  # got, expected, tolerance relative to max |expected|


class _Problem:
    """Inputs in float64 on the CPU, the equations evaluated on them, and the tolerances that follow.

    A float32 sum of n products is off by at most n roundoffs of the sum of their magnitudes. A relative error of the
    covariance grows by at most its condition number on the way to the inverse square root. So the tolerances are, in
    roundoffs:

    * of a reduction: m;
    * of a mix: d + 4 (mean, scale, shift, result) of the largest sum of magnitudes;
    * of all that passes through the small matrix: the condition number times 3 T d, because each of Newton's T steps
      has three products of length d;
    * of a gradient: twice as many, because every factor in it has been rounded once before.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:  # values that float32 represents exactly
            return torch.randn(shape, generator=generator).double()

        n, *plane = SAMPLES
        channels = GROUPS * D
        mix = torch.eye(channels, dtype=torch.float64) + 0.2 * normal(channels, channels)
        x = torch.einsum("ij,njhw->nihw", mix, normal(n, channels, *plane)) + 2
        self.device = device
        self.x = x.float().double()
        self.y = (0.5 * self.x + normal(*self.x.shape)).float().double()
        self.weight, self.bias = (1 + 0.1 * normal(channels)).float().double(), normal(channels)
        self.mean, self.cov = (value.float().double() for value in _moments(self.x))
        self.W = _newton(self.cov).float().double()
        self.grad_W = normal(GROUPS, D, D)
        A = self.weight.view(GROUPS, D, 1) * self.W
        largest = A.abs() @ (_samples(self.x).abs() + self.mean.abs().view(GROUPS, D, 1)) + self.bias.abs().max()
        y = _whiten(self.x, self.mean, self.W, self.weight, self.bias)
        self.mix = (D + 4) * float(largest.max() / y.abs().max()) * ROUNDOFF
        self.small = 3 * T * D * float(torch.linalg.cond(self.cov).max()) * ROUNDOFF
        self.whole = self.small / (3 * T * D) * (M + 3 * T * D + D)

    def here(self, *values: Tensor, requires_grad: bool = False) -> list[Tensor]:
        """Return the values in float32 on the device under test."""
        return [value.to(self.device, torch.float32).requires_grad_(requires_grad) for value in values]


def _samples(x: Tensor) -> Tensor:
    """Reshape (N, C, *) -> (G, d, m)."""
    return x.transpose(0, 1).reshape(GROUPS, D, -1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance: IterNorm, eq. 11 to 13, without eps I."""
    rows = _samples(x)
    centred = rows - rows.mean(2, keepdim=True)
    return rows.mean(2).flatten(), centred @ centred.mT / M


def _newton(cov: Tensor) -> Tensor:
    """Compute the whitening matrix: IterNorm, eq. 14, 15 and 17, as the paper writes them."""
    eye = torch.eye(D, dtype=cov.dtype)
    sigma = cov + EPS * eye
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    P = eye.expand_as(sigma)
    for _ in range(T):
        P = 1.5 * P - 0.5 * P @ P @ P @ (sigma / trace)
    return P / trace.sqrt()


def _eigh(cov: Tensor) -> Tensor:
    """Compute the whitening matrix of DBN: IterNorm's eq. 2."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed((values + EPS).rsqrt()) @ vectors.mT


def _whiten(x: Tensor, mean: Tensor, W: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Whiten: IterNorm, eq. 16, with the scale and shift of section 3.3."""
    columns = (W @ (_samples(x) - mean.view(GROUPS, D, 1))).flatten(0, 1)
    y = weight.view(-1, 1) * columns + bias.view(-1, 1)
    return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _check_moments(p: _Problem) -> Result:
    (x,) = p.here(p.x)
    count, mean, cov = nk.ops.moments(x, D)
    return (torch.tensor(count), mean, cov), (torch.tensor(M), *_moments(p.x)), M * ROUNDOFF


def _check_cross_moments(p: _Problem) -> Result:
    expected = _samples(p.y) @ (_samples(p.x) - p.mean.view(GROUPS, D, 1)).mT, _samples(p.y).sum(2).flatten()
    y, x, mean = p.here(p.y, p.x, p.mean)
    return nk.ops.cross_moments(y, x, mean, D), expected, M * ROUNDOFF


def _check_inverse_sqrt(p: _Problem) -> Result:
    (cov,) = p.here(p.cov)
    got = [nk.ops.inverse_sqrt(cov, T, EPS, method=method) for method in ("newton", "eigh")]
    return got, (_newton(p.cov), _eigh(p.cov)), p.small


def _check_inverse_sqrt_backward(p: _Problem) -> Result:
    (cov,), (grad,) = p.here(p.cov, requires_grad=True), p.here(p.grad_W)
    exact = p.cov.clone().requires_grad_()
    got: list[Tensor] = []
    expected: list[Tensor] = []
    for method, root in (("newton", _newton), ("eigh", _eigh)):
        got += torch.autograd.grad(nk.ops.inverse_sqrt(cov, T, EPS, method=method), cov, grad)
        (gradient,) = torch.autograd.grad(root(exact), exact, p.grad_W)
        expected.append((gradient + gradient.mT) / 2)  # the op's gradient is that of a symmetric argument
    return got, expected, 2 * p.small


def _check_whiten(p: _Problem) -> Result:
    arguments = (p.x, p.mean, p.W, p.weight, p.bias)
    return (nk.ops.whiten(*p.here(*arguments)),), (_whiten(*arguments),), p.mix


def _check_stacked_mix(p: _Problem) -> Result:
    grad_mean, A = p.bias, p.W.flip(2)
    one, none = torch.ones_like(p.bias), torch.zeros_like(p.bias)
    expected = _whiten(p.y, grad_mean, A, one, none) + _whiten(p.x, p.mean, p.W, one, p.bias)
    arguments = p.here(p.y, p.x, grad_mean, p.mean, torch.cat((A, p.W), dim=2), p.bias)
    return (torch.ops.normkernels.stacked_mix(*arguments),), (expected,), 2 * p.mix


def _iter_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, cov = _moments(x)
    W = _newton(cov)
    return _whiten(x, mean, W, weight, bias), mean, W


def _check_iter_norm(p: _Problem) -> Result:
    x, weight, bias = p.here(p.x, p.weight, p.bias)
    return nk.ops.iter_norm(x, D, T, EPS, weight, bias), _iter_norm(p.x, p.weight, p.bias), p.whole


def _check_iter_norm_backward(p: _Problem) -> Result:
    x, weight, bias = inputs = p.here(p.x, p.weight, p.bias, requires_grad=True)
    y = nk.ops.iter_norm(x, D, T, EPS, weight, bias)[0]
    got = torch.autograd.grad(y, inputs, p.here(p.y))
    exact = [value.clone().requires_grad_() for value in (p.x, p.weight, p.bias)]
    return got, torch.autograd.grad(_iter_norm(*exact)[0], exact, p.y), 2 * p.whole


PLANE = (7, 34)  # a prime length and twice a prime


def _planes(p: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return kernels (8, 2, 3, 3), planes (3, 8, 7, 34), and the spectrum of the kernels on them."""
    weight = p.x.reshape(-1)[:144].view(8, 2, 3, 3)
    z = torch.linspace(-3, 3, 3 * 8 * 7 * 34, dtype=torch.float64).sin().float().double().view(3, 8, *PLANE)
    return weight, z, _spectrum(weight).float().double()


def _spectrum(weight: Tensor) -> Tensor:
    """Compute the spectrum of ConvNorm, Algorithm 1, with eps relative to the mean power."""
    power = torch.fft.fft2(weight, s=PLANE).abs().square().sum(1)
    return (power + EPS * power.mean((1, 2), keepdim=True)).rsqrt()


def _filtered(z: Tensor, v: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.fft2(z) * v).real


# A transform adds up at most a row and a column, and there are two transforms: 2 (7 + 34) roundoffs of the largest v,
# and as many for the products between them.
FILTER = 4 * sum(PLANE) * ROUNDOFF


def _of_spectrum(p: _Problem) -> float:
    """Return the tolerance of a spectrum, which is accumulated in float64 and rounded once.

    Without float64 the inverse root is taken in float32, which costs 3.5 roundoffs more.
    """
    return (2 if has_float64(p.device) else 5.5) * ROUNDOFF


def _check_kernel_spectrum(p: _Problem) -> Result:
    exact, _, _ = _planes(p)
    (weight,) = p.here(exact)
    return (nk.ops.kernel_spectrum(weight, PLANE, EPS),), (_spectrum(exact),), _of_spectrum(p)


def _check_kernel_spectrum_backward(p: _Problem) -> Result:
    weight, z, _ = _planes(p)
    (leaf,) = p.here(weight, requires_grad=True)
    exact = weight.clone().requires_grad_()
    got = torch.autograd.grad(nk.ops.kernel_spectrum(leaf, PLANE, EPS), leaf, p.here(z[0])[0])
    return got, torch.autograd.grad(_spectrum(exact), exact, z[0]), 8 * _of_spectrum(p)


def _check_spectral_filter(p: _Problem) -> Result:
    _, z, v = _planes(p)
    scale = float(v.max() * z.abs().max() / _filtered(z, v).abs().max())
    planes, spectrum = p.here(z, v)
    return (nk.ops.spectral_filter(planes, spectrum),), (_filtered(z, v),), FILTER * max(1.0, scale)


def _check_cross_spectrum(p: _Problem) -> Result:
    _, z, v = _planes(p)
    planes, spectrum = p.here(z, v, requires_grad=True)
    got = torch.autograd.grad(nk.ops.spectral_filter(planes, spectrum), spectrum, p.here(z.flip(0))[0])
    exact = v.clone().requires_grad_()
    return got, torch.autograd.grad(_filtered(z, exact), exact, z.flip(0)), FILTER


KAPPA, EPS1, EPS2, Q2 = 4.0, 1e-2, 1e-4, 1.5


def _pop_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute POP-Norm, eq. 11 and 12."""
    rows = x.transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    centred = rows - mean.view(-1, 1)
    shifted = centred + bias.view(-1, 1)
    y = weight.view(-1, 1) * shifted / (KAPPA * (shifted.square().mean(1, keepdim=True) + EPS).sqrt())
    return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1), mean, centred.square().mean(1)


def _check_pop_norm(p: _Problem) -> Result:
    x, weight, bias = p.here(p.x, p.weight, p.bias)
    return nk.ops.pop_norm(x, weight, bias, KAPPA, EPS), _pop_norm(p.x, p.weight, p.bias), M * ROUNDOFF


def _check_pop_norm_backward(p: _Problem) -> Result:
    x, weight, bias = inputs = p.here(p.x, p.weight, p.bias, requires_grad=True)
    got = torch.autograd.grad(nk.ops.pop_norm(x, weight, bias, KAPPA, EPS)[0], inputs, p.here(p.y))
    exact = [value.clone().requires_grad_() for value in (p.x, p.weight, p.bias)]
    return got, torch.autograd.grad(_pop_norm(*exact)[0], exact, p.y), 2 * M * ROUNDOFF


def _check_precondition(p: _Problem) -> Result:
    """Check BNP, Algorithm 3, for a layer of 8 inputs, 5 outputs and 6 taps."""
    channels = GROUPS * D
    Gw, Gb = p.y.reshape(-1)[: 5 * channels * 6].view(5, channels, 2, 3), p.x.reshape(-1)[:5]
    mean, var = p.mean, p.cov.diagonal(dim1=1, dim2=2).flatten()
    sigma2 = (var + EPS1 * var.max() + EPS2).view(-1, 1, 1)
    mu = mean.view(-1, 1, 1)
    new = (Gw - mu * Gb.view(-1, 1, 1, 1)) / (Q2 * sigma2)
    grad, grad_bias, *statistics = p.here(Gw, Gb, mean, var)
    nk.ops.precondition([grad], [grad_bias], [statistics[0]], [statistics[1]], [1], [Q2], EPS1, EPS2)
    n = channels * 6
    return (grad, grad_bias), (new, Gb / Q2 - (mu * new).flatten(1).sum(1)), n * ROUNDOFF


CHECKS: dict[str, Callable[[_Problem], Result]] = {
    "moments": _check_moments,
    "cross_moments": _check_cross_moments,
    "inverse_sqrt": _check_inverse_sqrt,
    "inverse_sqrt_backward": _check_inverse_sqrt_backward,
    "whiten": _check_whiten,
    "stacked_mix": _check_stacked_mix,
    "iter_norm": _check_iter_norm,
    "iter_norm_backward": _check_iter_norm_backward,
    "pop_norm": _check_pop_norm,
    "pop_norm_backward": _check_pop_norm_backward,
    "precondition": _check_precondition,
    "kernel_spectrum": _check_kernel_spectrum,
    "kernel_spectrum_backward": _check_kernel_spectrum_backward,
    "spectral_filter": _check_spectral_filter,
    "cross_spectrum": _check_cross_spectrum,
}


def run(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row for each op and backend usable here: its error relative to float64, and the tolerance."""
    problem = _Problem(device)
    for backend in choose.BACKENDS:
        if choose.availability(backend)[0]:
            with nk.use_backend(backend):
                for op in define.ops():
                    row = {"op": op, "device": device.type, "backend": backend, "passed": False}
                    yield row | _outcome(op, problem)


def _outcome(op: str, problem: _Problem) -> dict[str, Any]:
    if op not in CHECKS:
        return {"message": "the self-test has no check for this op"}
    try:
        got, expected, tolerance = CHECKS[op](problem)
        error = max(_error(g, e) for g, e in zip(got, expected, strict=True))
    except Exception as failure:  # an op that dies must not hide what the others do
        return {"message": f"{type(failure).__name__}: {failure}"}
    return {"passed": error <= tolerance, "error": error, "tolerance": tolerance}


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"result: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not got.isfinite().all():  # checked apart: max() would pass over a NaN, and JSON has none
        raise ValueError("result: expected finite numbers, got NaN or infinity")
    return float((got.cpu().double() - expected).abs().max() / expected.abs().max())
