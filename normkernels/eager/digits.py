"""Products of matrices in float32 alone, as exact as in float64, for devices without it.

The algebra is in primitives/kernel_spectrum/DERIVATION.md.

A number of at most 1/2 is a sum of digits d_1 / B + d_2 / B^2 + ..., whole numbers of at most B / 2 that float32 holds.
A product of matrices of digits is exact in float32, whatever the order of its sums, as long as they stay below 2^24.
Between the products a number is the sum of up to three float32 numbers, each the remainder of the ones before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from normkernels.eager.devices import kept_on_device

LONGEST = 2**15  # the longest sum; longer ones are cut, or digits would have a single bit
BITS = 57  # the fewest bits that are kept of an entry, counted from the first one of the matrix's largest entry
Pair = tuple[Tensor, Tensor]
Parts = tuple[Tensor, ...]  # they add up to the number, the largest first
Waves = tuple[Parts, Parts]


def two_sum(a: Tensor, b: Tensor) -> Pair:
    """Return a + b, rounded, and what rounding has taken away (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def powers_of_two(x: Tensor) -> Pair:
    """Return the largest power of two that is not above x > 0, within 2^-120 and 2^120, and its inverse.

    They are made of the exponent's bits, because not every device rounds divisions and exponentials as it should.
    """
    exponent = (x.view(torch.int32) & 0x7F800000).clamp(7 << 23, 247 << 23)
    return exponent.view(torch.float32), (0x7F000000 - exponent).view(torch.float32)


def normalized(x: Parts) -> tuple[Parts, Tensor]:
    """Return matrices, each divided by a power of two so that no entry exceeds 1/2, and that power. This is exact."""
    power, inverse = powers_of_two(x[0].abs().amax((-2, -1), keepdim=True))
    return tuple(0.25 * part * inverse for part in x), 4 * power


def digits(x: Parts, bits: int, count: int) -> Tensor:
    """Return the first digits (count, ...) of ``normalized`` numbers for B = 2^bits, the largest first, at most B each.

    A digit is what rounding one place later adds. So the digits of a float32 number are exact, and at most B / 2. The
    parts of a sum are 24 bits apart, so no more than two of them have a digit at the same place.
    """
    scale = places(bits, count, x[0].device).view(-1, *[1] * x[0].dim())
    found = []
    for part in x:
        whole = (part * scale).round_()
        found.append(torch.sub(whole[1:], whole[:-1], alpha=2**bits))
    return functools.reduce(torch.add, found)


@kept_on_device
def places(bits: int, count: int, device: torch.device) -> Tensor:
    """Return B^0 to B^count."""
    return torch.tensor([2.0 ** (bits * n) for n in range(count + 1)], dtype=torch.float32, device="cpu").to(device)


def bits_of_digits(terms: int, plain: int) -> tuple[int, int]:
    """Return bits of a digit and number of digits, so that sums of ``terms`` products for each digit stay within 2^24.

    plain: how many of both factors are float32 numbers, not sums of several.
    """
    return next((b, n) for b in range(12, 0, -1) if terms * (n := -(-BITS // b)) * 4**b <= 2 ** (24 + plain))


def plus(x: Parts, term: Tensor) -> Parts:
    """Return x + term, as far as three numbers hold it."""
    parts = []
    for part in x[:-1]:
        total, term = two_sum(part, term)
        parts.append(total)
    return (*parts, x[-1] + term)


def renormalized(x: Parts) -> Parts:
    """Return three parts with the same sum: the first one rounds the sum, the second one what is left."""
    first, rest = two_sum(x[0], x[1])
    second, third = two_sum(rest, x[2])
    return *two_sum(first, second), third


def product(a: Parts, b: Parts, fold: Callable[[Tensor], Tensor] | None = None, folded: int = 1) -> Parts:
    """Return a @ b, or ``fold`` of each of its matrices (*, m, n), which adds up at most ``folded`` entries to one."""
    inner = a[0].shape[-1]
    if inner * folded > LONGEST and inner > 1:
        cut = inner // 2
        head = product(tuple(part[..., :cut] for part in a), tuple(part[..., :cut, :] for part in b), fold, folded)
        tail = product(tuple(part[..., cut:] for part in a), tuple(part[..., cut:, :] for part in b), fold, folded)
        return renormalized(functools.reduce(plus, tail, head))
    (a, of_a), (b, of_b) = normalized(a), normalized(b)
    plain = sum(len(parts) == 1 for parts in (a, b))  # the digits of these are half as large
    bits, count = bits_of_digits(inner * folded, plain)
    left = digits(a, bits, count).movedim(0, -2).flatten(-2)
    right = digits(b, bits, count).flip(0).movedim(0, -3).flatten(-3, -2)
    # Place n + 1 gets all pairs of digits whose product belongs there, by one matrix product.
    sums = torch.stack([left[..., : n * inner] @ right[..., -n * inner :, :] for n in range(1, count + 1)])
    if fold is not None:
        sums = fold(sums.flatten(0, 1)).unflatten(0, sums.shape[:2])
    total: Parts = (torch.zeros((), dtype=torch.float32, device=left.device),) * 3
    for n, place in enumerate(sums.unbind(), 2):
        total = plus(total, place * 2.0 ** (-bits * n))
    return tuple(part * of_a * of_b for part in renormalized(total))


def waves(n: int, reach: int, dilation: int, device: torch.device) -> Waves:
    """Return cos and sin of 2 pi u t / n for frequencies u, dilated lags t = -reach..reach: (n, 2 reach + 1) each."""
    parts = parts_of_waves(n, reach, dilation, device)
    return parts[:3], parts[3:]


@kept_on_device
def parts_of_waves(n: int, reach: int, dilation: int, device: torch.device) -> Parts:
    turns = torch.outer(torch.arange(n, device="cpu"), torch.arange(-reach, reach + 1, device="cpu") * dilation) % n

    def of_circle(values: list[float]) -> Parts:
        parts = []
        for _ in range(3):
            parts.append(torch.tensor(values, dtype=torch.float32, device="cpu"))
            values = [exact - near for exact, near in zip(values, parts[-1].tolist(), strict=True)]
        return tuple(part[turns].to(device) for part in parts)

    angles = [2 * math.pi * i / n for i in range(n)]
    return *of_circle([math.cos(angle) for angle in angles]), *of_circle([math.sin(angle) for angle in angles])


def cosine_transform(x: Parts, rows: Waves, columns: Waves) -> Parts:
    """Return cos_h x cos_w^T - sin_h x sin_w^T, computed as two products."""
    both = product(x, tuple(torch.cat(parts).mT for parts in zip(*columns, strict=True)))
    half = both[0].shape[-1] // 2
    along = tuple(torch.cat((part[..., :half], -part[..., half:]), -2) for part in both)
    return product(tuple(torch.cat(parts, -1) for parts in zip(*rows, strict=True)), along)


def transposed(both: Waves) -> Waves:
    cos, sin = (tuple(part.mT for part in wave) for wave in both)
    return cos, sin
