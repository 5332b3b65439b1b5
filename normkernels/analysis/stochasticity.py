"""A measure of how much a normalized sample depends on the batch it came in (IterNorm, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normkernels._checks import check_data, check_integer, check_tensor, statistics_dtype
from normkernels.analysis._checks import check_callable
from normkernels.analysis._progress import track
from normkernels.eager.devices import with_float64

# Outputs of all draws are kept up to this size; where they are larger, they are computed twice.
KEPT_BYTES = 2**28


@torch.no_grad()
def snd(
    norm: Callable[[Tensor], Tensor],
    data: Tensor,
    batch_size: int,
    num_draws: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Return the stochastic normalization disturbance (IterNorm, eq. 9 and 10), the mean over all samples.

    .. math:: \hat\Delta_F(x) = \frac{1}{s} \sum_{i=1}^{s} \Big\lVert F(X_i^B; x)
        - \frac{1}{s} \sum_{j=1}^{s} F(X_j^B; x) \Big\rVert_2

    where :math:`X_i^B` is a batch of B samples that holds x. Each of the s draws permutes the data and cuts them into
    batches, so that every sample gets exactly one output of each draw. A last batch that is short is filled with other
    samples of the same permutation, whose outputs there do not count.

    The mean over s outputs stands for the expectation, as in the paper: for outputs that are normally distributed
    the result is :math:`\sqrt{(s - 1) / s}` of eq. 9.

    Args:
        norm: F, from a batch (B, d) to its outputs (B, d). A module is called in the mode it is in (in eval mode with
            running statistics samples do not depend on each other, and the result is 0), each time with a copy of its
            buffers: running statistics stay as they are. Those of a module inside another function do not.
        data: (N, d), in any floating-point type.
        batch_size: B, 1 to N.
        num_draws: s, at least 2.
        generator: of the permutations, on any device. None for torch's default. The same permutations come on all
            devices.
        progress: shows a bar; needs tqdm.

    Returns:
        A scalar, float32 (float64 for float64 data), no gradient. Sums are float64. The outputs of all draws are kept
        if they take no more than 256 MiB; otherwise there are two passes over the draws, and memory for one.

    Raises:
        TypeError: norm is no function, data no floating-point tensor, or batch_size or num_draws no int.
        ValueError: data is not (N, d), batch_size or num_draws is out of range, or an output has another shape than
            its batch.
    """
    check_callable("norm", norm)
    check_data("data", data)
    if data.dim() != 2 or not len(data):
        raise ValueError(f"data: expected shape (N, d) with N and d at least 1, got {tuple(data.shape)}")
    if check_integer("batch_size", batch_size, minimum=1) > len(data):
        raise ValueError(f"batch_size: expected at most the {len(data)} samples, got {batch_size}")
    check_integer("num_draws", num_draws, minimum=2)

    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (num_draws,), generator=generator, device=device).tolist()

    def draws() -> Iterator[Tensor]:
        for seed in seeds:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            yield _outputs(norm, data, batch_size, order.to(data.device))

    kept = None
    if num_draws * data.numel() * data.element_size() <= KEPT_BYTES:
        kept = [*track(draws(), num_draws, "SND", progress)]
    mean = torch.zeros_like(with_float64(data), dtype=torch.float64)
    for y in kept or track(draws(), num_draws, "SND, means", progress):
        mean += with_float64(y)
    mean /= num_draws
    total = mean.new_zeros(())
    for y in kept or track(draws(), num_draws, "SND, deviations", progress):
        total += torch.linalg.vector_norm(with_float64(y) - mean, dim=1).sum()
    return (total / (num_draws * len(data))).to(statistics_dtype(data.dtype)).to(data.device)


def _outputs(norm: Callable[[Tensor], Tensor], data: Tensor, batch_size: int, order: Tensor) -> Tensor:
    """Return F of every sample (N, d), each in one batch."""
    short = -len(data) % batch_size
    batches = torch.cat([order, order[:short]]).split(batch_size)
    outputs = []
    for batch in batches:
        x = data[batch]
        # Fresh buffers each time: what norm computes must not depend on the batches before, nor on the pass.
        y = functional_call(norm, _buffers(norm), (x,)) if isinstance(norm, nn.Module) else norm(x)
        check_tensor("norm(batch)", y)
        if y.shape != x.shape:
            raise ValueError(f"norm(batch): expected the batch's shape {tuple(x.shape)}, got {tuple(y.shape)}")
        outputs.append(y)
    y = torch.cat(outputs)[: len(data)]
    return torch.empty_like(y).index_copy_(0, order, y)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}
