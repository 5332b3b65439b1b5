"""The edge of float32: what an exact covariance is worth and costs, and where Newton's iteration has to stop.

    python -m bench.experiments.spectra

Three tables. Error of y of an eigendecomposition at a condition number of 1e3 (of the correlation matrix), by how the
covariance is added up and decomposed; the largest value over seeds and scales of channels. Time of what exactness
adds to a step of DBN on this machine. And the gradient of IterNorm over float64's at up to 100 iterations, by the
bound of the variance inflation factor, over singular covariances.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import normkernels as nk
from normkernels.primitives.inverse_sqrt import eager as inverse_sqrt
from normkernels.primitives.moments import eager as moments
from tests.oracles import inputs

EPS = 1e-3


def main() -> None:
    torch.manual_seed(0)
    errors()
    costs()
    bounds()


# --- errors of an eigendecomposition --------------------------------------------------------------------------------


def correlated(m: int, d: int, seed: int) -> Tensor:
    C = inputs.covariance(inputs.spectrum(d, 1e3), seed)
    root = C.diagonal().sqrt()
    factor = torch.linalg.cholesky(C / root[:, None] / root)
    return torch.randn(m, d, dtype=torch.float64, generator=inputs.generator(seed)) @ factor.T


def whitened(x: Tensor, mean: Tensor, cov: Tensor, decomposed: torch.dtype) -> Tensor:
    """Return y in x's type, from a decomposition in another type."""
    eigenvalues, U = torch.linalg.eigh(cov.to(decomposed))
    W = (U / (eigenvalues.clamp(min=0) + EPS).sqrt()) @ U.mT
    return (x - mean) @ W.to(x.dtype)


def errors() -> None:
    print("error of y      m      d | float32 decomposition | one float32 sum | rounded to float32 | as it is")
    for d in (3, 16, 64):
        for m in (256, 4096, 65536):
            worst = [0.0] * 4
            for seed in range(3):
                for scales in (torch.ones(d), torch.full((d,), 1e4), torch.logspace(4, 0, d)):
                    x = (correlated(m, d, seed) * scales.double()).float()
                    mean, _, plain = moments.moments(x, d, False)
                    exact = moments.moments(x, d, True)[2]
                    double = x.double()
                    centred = double - double.mean(0)
                    reference = whitened(centred, torch.zeros(d), centred.T @ centred / m, torch.float64)
                    covs = [(exact, torch.float32), (plain, torch.float64)]
                    covs += [(exact.float(), torch.float64), (exact, torch.float64)]
                    for i, (cov, dtype) in enumerate(covs):
                        error = (whitened(x, mean, cov[0], dtype) - reference).abs().max().item()
                        worst[i] = max(worst[i], error)
            print(f"           {m:6d} {d:6d} | " + " | ".join(f"{value:.1e}" for value in worst), flush=True)


# --- what exactness costs -------------------------------------------------------------------------------------------


def interleaved(calls: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return median times in ms of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(of[2:]) for name, of in times.items()}


def step(layer: torch.nn.Module, x: Tensor, grad: Tensor) -> None:
    layer(x).backward(grad)


def decomposed(cov: Tensor) -> object:
    return torch.linalg.eigh(cov.double())


def costs() -> None:
    print("\nms                              step | covariance: plain, exact | decomposition: float32, float64 | added")
    for d in (16, 64):
        for shape in ((64, 64, 32, 32), (256, 256, 14, 14), (8, 64, 8, 8)):
            layer, x = nk.DBN2d(shape[1], group_size=d), torch.randn(shape, requires_grad=True)
            data = x.detach()
            cov = moments.moments(data, d, False)[2]
            took = interleaved({
                "step": partial(step, layer, x, torch.randn(shape)),
                "plain": partial(moments.moments, data, d, False),
                "exact": partial(moments.moments, data, d, True),
                "eigh32": partial(torch.linalg.eigh, cov),
                "eigh64": partial(decomposed, cov),
            })  # fmt: skip
            added = took["exact"] - took["plain"] + took["eigh64"] - took["eigh32"]
            values = " | ".join(f"{took[name]:.2f}" for name in took)
            share = added / (took["step"] - added)
            print(f"d = {d:3d} {shape!s:20} {values} | {added:+.2f}, {share:+.1%} of a step", flush=True)


# --- where Newton's iteration stops ---------------------------------------------------------------------------------


def singular() -> Iterator[tuple[str, Tensor]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=inputs.generator(sum(shape)))

    a = normal(256, 8)
    yield "fewer samples than channels", normal(32, 64)
    yield "equal channels", torch.cat((a, a), 1)
    yield "equal channels of unlike scale", torch.cat((a, 1e-3 * a), 1)
    yield "rank 4 of 32", normal(256, 4) @ normal(4, 32)
    yield "nearly equal channels", torch.cat((a, a + 1e-3 * normal(256, 8).flip(0)), 1)


def bounds() -> None:
    print("\nlargest gradient / float64's, T = 16, 20, 30, 100, by roundings that the bound allows for")
    standard = inverse_sqrt.ROUNDINGS
    for name, data in singular():
        row = []
        for roundings in (2, 8, 32, standard):
            inverse_sqrt.ROUNDINGS = roundings
            ratio = 0.0
            for scale in (1e-6, 100.0):
                for scaling in ("trace", "frobenius"):
                    for T in (16, 20, 30, 100):
                        largest = []
                        for dtype in (torch.float32, torch.float64):
                            x = (scale * data).to(dtype).requires_grad_()
                            y = nk.ops.iter_norm(x, 64, T, 1e-5, scaling=scaling)[0]
                            grad = torch.randn(y.shape, generator=inputs.generator(T)).to(dtype)
                            largest.append(torch.autograd.grad(y, x, grad)[0].abs().max().item())
                        ratio = max(ratio, largest[0] / largest[1])
            row.append(f"{roundings}: {ratio:.3g}")
        inverse_sqrt.ROUNDINGS = standard
        print(f"{name:32s} " + "   ".join(row), flush=True)


if __name__ == "__main__":
    main()
