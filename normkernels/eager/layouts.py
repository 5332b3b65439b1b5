"""Views of activations as images, and the layout of outputs. Letters: n samples, C channels, l positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_image(x: Tensor) -> Tensor:
    """View x (N, C, *) as (N, C, 1, L), and (N, C) as (1, C, 1, N), with its samples as the pixels of one image.

    It is a copy only where the spatial dimensions do not collapse. Rejected: (N, C, L, 1), whose strides torch does not
    take for channels_last, so that a convolution copies.
    """
    image = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    if image.shape[2] == 1:
        image = image.transpose(0, 2)
    return image.unsqueeze(2)


def of_image(image: Tensor, x: Tensor) -> Tensor:
    """Return an image (like as_image(x)) in x's shape: a view where as_image(x) is one."""
    planes = image.squeeze(2)
    return (planes if len(planes) == len(x) else planes.transpose(0, 2)).reshape(x.shape)


def output_layout(x: Tensor, spatial: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Return shape and strides of an output like x: channels innermost where x has them innermost, else contiguous.

    The strides of empty_like would not do: for an x with gaps they need not collapse to (N, C, L); these always do.
    spatial: other spatial dimensions than x's.
    """
    shape = [*x.shape[:2], *(x.shape[2:] if spatial is None else spatial)]
    outermost_first = [0, *range(2, len(shape)), 1] if channels_innermost(x) else range(len(shape))
    strides, step = [0] * len(shape), 1
    for dim in reversed(outermost_first):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return shape, strides


def empty_output(x: Tensor, spatial: Sequence[int] | None = None) -> Tensor:
    """Return an uninitialized tensor of output_layout(x, spatial)."""
    return x.new_empty_strided(*output_layout(x, spatial))


def in_layout_of(x: Tensor, value: Tensor) -> Tensor:
    """Return value, of x's shape, with the strides of empty_output(x)."""
    return value if list(value.stride()) == output_layout(x)[1] else empty_output(x).copy_(value)


def channels_innermost(x: Tensor) -> bool:
    """Return whether the channels of x (N, C, *) are next to each other in memory, as in channels_last."""
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1
