"""How exact products on tensor cores are: emulated on a CPU, error relative to float64.

    python -m bench.experiments.split_products

A tensor core multiplies numbers of 11 (TF32) or 8 (bfloat16) significant bits exactly and adds in float32. "3x" splits
each operand in two such numbers and leaves out the product of the small parts; these are Triton's tf32x3 and bf16x3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normkernels.primitives.spectral_filter import eager

Product = Callable[[Tensor, Tensor], Tensor]
SIZE, SAMPLES = 64, 4096


def tf32(a: Tensor) -> Tensor:
    """Return the upper 19 bits, which are all that the tensor cores look at."""
    return (a.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded_tf32(a: Tensor) -> Tensor:
    """Round to nearest, as Triton rounds the big part (cvt.rna.tf32)."""
    return tf32((a.view(torch.int32) + 0x1000).view(torch.float32))


def bfloat16(a: Tensor) -> Tensor:
    return a.bfloat16().float()


def once(part: Callable[[Tensor], Tensor]) -> Product:
    return lambda a, b: part(a) @ part(b)


def three_times(big: Callable[[Tensor], Tensor], small: Callable[[Tensor], Tensor]) -> Product:
    def product(a: Tensor, b: Tensor) -> Tensor:
        big_a, big_b = big(a), big(b)
        small_a, small_b = small(a - big_a), small(b - big_b)
        return (small_a @ big_b + big_a @ small_b) + big_a @ big_b

    return product


PRODUCTS: dict[str, Product] = {
    "float32": torch.matmul,
    "tf32x3": three_times(rounded_tf32, tf32),
    "bf16x3": three_times(bfloat16, bfloat16),
    "tf32": once(tf32),
    "bf16": once(bfloat16),
}


def newton(S: Tensor, multiply: Product, steps: int = 5) -> Tensor:
    """Return P by the recursion of inverse_sqrt/DERIVATION.md."""
    identity = torch.eye(len(S), dtype=S.dtype)
    M, P = S, 1.5 * identity - 0.5 * S
    for _ in range(steps - 1):
        square = multiply(M, M)
        M = 2.25 * M - 1.5 * square + 0.25 * multiply(M, square)
        P = 1.5 * P - 0.5 * multiply(P, M)
    return P


def filtered(z: Tensor, v: Tensor, multiply: Product) -> Tensor:
    """Apply ConvNorm's filter by products with the real DFT matrix, spectral_filter/DERIVATION.md."""
    n = z.shape[-1]
    R = eager.dft(n, (0, 1, n), z.dtype, z.device)
    Z = multiply(multiply(R, z), R.T.contiguous())
    Z = eager.multiply(Z.unsqueeze(0), *eager.coefficients(v)).squeeze(0).clone()
    return multiply(multiply(R.T.contiguous(), Z), R)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


def errors() -> dict[str, dict[str, float]]:
    """Return product -> (what is computed -> error)."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) / SIZE**0.5
    x = (mix @ torch.randn(SIZE, SAMPLES, dtype=torch.float64, generator=generator)).float()
    x -= x.mean(1, keepdim=True)
    exact = x.double()
    cov = exact @ exact.T / SAMPLES
    S = (cov / cov.trace()).float()
    W = newton(S.double(), torch.matmul).float()
    planes = {
        n: [torch.randn(16, n, n, dtype=torch.float64, generator=generator).float() + mean for mean in (1, 0)]
        for n in (34, 58)
    }
    return {
        name: {
            "covariance": relative(multiply(x, x.T) / SAMPLES, cov),
            "W (T = 5)": relative(newton(S, multiply), newton(S.double(), torch.matmul)),
            "y = W x": relative(multiply(W, x), W.double() @ exact),
            **{
                f"filter, n = {n}": relative(filtered(z, v, multiply), filtered(z.double(), v.double(), torch.matmul))
                for n, (z, v) in planes.items()
            },
        }
        for name, multiply in PRODUCTS.items()
    }


def main() -> None:
    found = errors()
    kinds = list(next(iter(found.values())))
    print("| product | " + " | ".join(kinds) + " |")
    print("|---|" + "---|" * len(kinds))
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row[kind]:.0e}" for kind in kinds) + " |")


if __name__ == "__main__":
    main()
