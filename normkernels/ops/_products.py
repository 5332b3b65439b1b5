"""The matrix product of the eager backend: torch's BLAS, or oneDNN where that is faster."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

# Multiply-adds from which a product goes to oneDNN: below, its fixed cost of about 12 us is more than it saves.
ONEDNN_MULTIPLY_ADDS = 2**22

# Where a convolution is the fast product, a group has a multiple of this many channels, at least twice: one AVX-512
# register holds as many.
CONVOLUTION_CHANNELS = 16


def products(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The batched product a (G, p, q) @ b (G, q, r), as pairs (groups, a[groups] @ b[groups]).

    Large float32 products on a CPU with AVX-512 go to oneDNN, which does 370 to 470 GFLOP/s where torch's BLAS does
    160 to 220 (2 Zen 5 cores; MKL does not use AVX-512 on every CPU that has it). torch.matmul takes oneDNN
    for half types only, but a 1x1 convolution is a product too, and so is a linear layer as torch's compiler
    calls it. Which of them, by the operands' order, is measured: bench/experiments/products.py.
    """
    g, p, q = a.shape
    r = b.shape[2]
    size = p * q * r
    if not _onednn or a.dtype != torch.float32 or a.device.type != "cpu" or g * size < ONEDNN_MULTIPLY_ADDS:
        yield slice(0, g), torch.bmm(a, b)
    elif _is_image(b) and q <= r and _suits_convolution(p) and _suits_convolution(q):
        yield slice(0, g), _convolution(a, b)
    elif _is_image(a) and _is_image(b.mT) and g == 1 and p <= q and _suits_convolution(p):
        yield slice(0, g), _convolution_weight(a, b)
    elif a.stride(2) == 1 and (b.is_contiguous() or b.mT.is_contiguous()) and size >= ONEDNN_MULTIPLY_ADDS:
        for i in range(g):
            yield slice(i, i + 1), _linear(a[i], b[i]).unsqueeze(0)
    else:
        yield slice(0, g), torch.bmm(a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (G, p, q) @ b (G, q, r) -> (G, p, r)."""
    parts = [product for _, product in products(a, b)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _suits_convolution(channels: int) -> bool:
    return channels % CONVOLUTION_CHANNELS == 0 and channels >= 2 * CONVOLUTION_CHANNELS


def _is_image(b: Tensor) -> bool:
    """Whether b (G, q, k) lies in memory as (k, G, q): the columns are the pixels of a channels_last image."""
    return b.permute(2, 0, 1).is_contiguous()


def _as_image(b: Tensor) -> Tensor:
    """(G, q, k) as a (1, G * q, k, 1) image, a view."""
    return b.permute(2, 0, 1).reshape(1, b.shape[2], 1, -1).permute(0, 3, 1, 2)


def _convolution(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as a grouped 1x1 convolution of an image whose channels are the rows of b."""
    g, p, q = a.shape
    image = conv2d(_as_image(b), a.reshape(g * p, q, 1, 1), groups=g)
    return image.permute(2, 3, 0, 1).reshape(b.shape[2], g, p).permute(1, 2, 0)


def _convolution_weight(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for one group, as the weight gradient of the 1x1 convolution that maps the image b^T to the image a."""
    p, r = a.shape[1], b.shape[2]
    return conv2d_weight(_as_image(b.mT), (p, r, 1, 1), _as_image(a)).view(1, p, r)


def _linear(a: Tensor, b: Tensor) -> Tensor:
    """a (p, q) @ b (q, r) by linear(u, v) = u v^T, in the order of b.

    u must be dense along the summed dimension: else oneDNN falls to a reference kernel, hundreds of times slower.
    """
    linear = torch.ops.mkldnn._linear_pointwise.default
    if b.stride(0) == 1:
        return linear(b.mT, a, None, "none", [], "").mT
    return linear(a, b.mT, None, "none", [], "")


_onednn = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
