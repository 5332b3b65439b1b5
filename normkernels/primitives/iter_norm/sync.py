"""iter_norm over the batches of all ranks of a process group. Algebra and costs in DERIVATION.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkernels._checks import check_affine, check_data, check_inverse_sqrt_options, resolve_group_size
from normkernels._torch import constant, functional_collectives
from normkernels.dispatch import export
from normkernels.eager.devices import has_float64
from normkernels.primitives.whiten.eager import affine


def sync_iter_norm(
    x: Tensor,
    process_group: Any,
    group_size: int = 64,
    num_iterations: int = 5,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: str = "trace",
    method: str = "newton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Whiten as ``iter_norm`` does, with the statistics of all ranks, in one collective forward and one backward.

    .. math:: m = \sum_r m_r, \quad \mu = \frac1m \sum_r m_r \mu_r, \quad
              \Sigma = \frac1m \sum_r m_r (\Sigma_r + \mu_r \mu_r^\top) - \mu \mu^\top

    Every rank of the group calls it, with as many samples as it has, none if need be, and calls the backward as well.
    The gradient is that of the sum of the ranks' losses; weight and bias get this rank's share of theirs, which
    DistributedDataParallel adds up.

    Args:
        x: (N, C, *), this rank's samples; C and every option the same on all ranks.
        process_group: a torch.distributed.ProcessGroup or its name.
        group_size, num_iterations, eps, weight, bias, scaling, method: as in :func:`iter_norm`.

    Returns:
        y: this rank's, of x's shape, type and layout.
        mean (C,), W (G, d, d): as of :func:`iter_norm`, the same on all ranks; without gradients.
        count: m, (1,) int64, on x's device.

    Saved for backward: as in :func:`iter_norm`, one more number for each channel, and the count.

    Raises:
        TypeError, ValueError: as :func:`iter_norm`.
        NotImplementedError: double backward.
    """
    if export.exporting():
        export.refuse_batch_statistics()
    check_data("x", x)
    d = resolve_group_size(x.shape[1], group_size)
    frobenius, eigh = check_inverse_sqrt_options(num_iterations, eps, scaling, method)
    check_affine(x, weight, bias)
    arguments = (x, weight, bias, process_group, d, num_iterations, float(eps), frobenius, eigh)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    # Dynamo cannot trace a Function where nothing needs a gradient, as in autograd.call.
    plain = torch.compiler.is_compiling() and not differentiated
    y, mean, W, count, *_ = (_SyncIterNorm.forward if plain else _SyncIterNorm.apply)(*arguments)
    return y, mean, W, count


class _SyncIterNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        process_group: Any,
        group_size: int,
        num_iterations: int,
        eps: float,
        frobenius: bool,
        eigh: bool,
    ) -> tuple[Tensor, ...]:
        mean, left_out, cov, count = _merged_moments(x, group_size, process_group, eigh)
        small_matrix = torch.ops.normkernels.inverse_sqrt(cov, num_iterations, eps, frobenius, eigh)
        W, saved_matrix, saved_scale = (value.to(mean) for value in small_matrix)
        beta = _times(affine(W, weight), left_out)
        if bias is not None:
            beta = beta + bias
        y = torch.ops.normkernels.whiten(x, mean, W, weight, beta)
        return y, mean, W, count, saved_matrix, saved_scale, left_out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.process_group, _, ctx.num_iterations, _, ctx.frobenius, ctx.eigh = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "sync_iter_norm: expected a first derivative, got create_graph=True; iter_norm has the second"
            )
        x, weight, bias, mean, W, count, saved_matrix, saved_scale, left_out = ctx.saved_tensors
        g, d, _ = W.shape
        D, f = torch.ops.normkernels.cross_moments(grad, x, mean, d)
        D = D + f.view(g, d, 1) * left_out.view(g, 1, d)  # about the exact mean
        grad_weight = None if weight is None else (D * W).sum(2).flatten().to(weight.dtype)
        grad_bias = None if bias is None else f.to(bias.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, *[None] * 6

        # The adjoint is linear in D and symmetric: its sum over the ranks takes half the bytes of D's.
        dcov = torch.ops.normkernels.inverse_sqrt_backward(
            affine(D, weight), W, saved_matrix, saved_scale, ctx.num_iterations, ctx.frobenius, ctx.eigh
        )
        merged = _all_reduce(torch.cat((f, _triangle_of(dcov))), ctx.process_group)
        m = count.clamp(min=1).to(W.dtype)
        B = _symmetric(merged[g * d :], g, d) * (2 / m)
        matrix = torch.cat((affine(W, weight).mT, B), dim=2)
        grad_x = torch.ops.normkernels.stacked_mix(grad, x, merged[: g * d] / m, mean, matrix, _times(B, left_out))
        return grad_x, grad_weight, grad_bias, *[None] * 6


def _merged_moments(
    x: Tensor, group_size: int, process_group: Any, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean (C,), its rounding error (C,), covariance (G, d, d) and count (1,) of all ranks' samples.

    exact: as in ``moments``.

    Squares are summed about 0 in float64. About a mean that all ranks know there would be less to lose, but they know
    none before the collective. A difference that is below its rounding counts as zero, so that constant channels have
    no variance, however large they are.
    """
    mean, remainder, cov = torch.ops.normkernels.moments(x, group_size, exact)
    channels, (g, d, _) = x.shape[1], cov.shape
    m = x.numel() // channels
    local = _in_float64(torch.cat((mean, remainder)))
    means = local[:channels] + local[channels:]
    squares = _in_float64(cov) + _outer(means, g, d)
    sums = _sum_over_ranks(
        torch.cat((means.new_full((1,), m), m * means, m * _triangle_of(squares))), process_group, x.device
    )
    count = sums[:1].clone()
    merged = sums[1:] / count.clamp(min=1)
    exact_mean = merged[:channels]
    products = _outer(exact_mean, g, d)
    difference = _symmetric(merged[channels:], g, d) - products
    rounding = 8 * torch.finfo(torch.float64).eps * products.abs()
    merged_cov = torch.where(difference.abs() <= rounding, 0, difference)  # NaN stays NaN
    rounded = exact_mean.to(mean.dtype)
    return (
        rounded.to(x.device),
        (rounded - exact_mean).to(x.device, mean.dtype),
        merged_cov.to(cov.device, cov.dtype),
        count.to(x.device, torch.int64),
    )


@constant
def _float64_on(device: torch.device) -> bool:
    return has_float64(device)


def _in_float64(values: Tensor) -> Tensor:
    """Return values in float64: on their device, or on the CPU where the device lacks it.

    Dynamo traces this, which it could not do with the warning of ``_devices.in_float64``.
    """
    return (values if _float64_on(values.device) else values.cpu()).double()


def _sum_over_ranks(values: Tensor, process_group: Any, device: torch.device) -> Tensor:
    """Return the sum of float64 values over the ranks, which talk to each other by tensors on a device.

    Where the device lacks float64, ranks gather the values' bits as integers, and each rank's CPU adds them up.
    """
    if _float64_on(device):
        return _all_reduce(values, process_group)
    collectives = functional_collectives()
    bits = values.view(torch.int64).to(device)
    gathered = collectives.wait_tensor(collectives.all_gather_tensor(bits, 0, process_group))
    return gathered.cpu().view(torch.float64).view(-1, len(values)).sum(0)


def _all_reduce(values: Tensor, process_group: Any) -> Tensor:
    """Return the sum over the ranks, by a functional collective, which torch.compile keeps inside its graph."""
    collectives = functional_collectives()
    return collectives.wait_tensor(collectives.all_reduce(values, "sum", process_group))


def _outer(v: Tensor, g: int, d: int) -> Tensor:
    return v.view(g, d, 1) * v.view(g, 1, d)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """Return matrix (G, d, d) times v (C,); a matmul would follow autocast."""
    return (matrix * v.view(matrix.shape[0], 1, -1)).sum(2).flatten()


def _triangle_of(matrices: Tensor) -> Tensor:
    """Return the lower triangles of (G, d, d), rows first, end to end."""
    row, column = _lower(matrices.shape[1], matrices.device)
    return matrices[:, row, column].flatten()


def _symmetric(triangles: Tensor, g: int, d: int) -> Tensor:
    """Return the symmetric matrices (G, d, d) of these lower triangles."""
    row, column = _lower(d, triangles.device)
    result = triangles.new_empty(g, d, d)
    result[:, row, column] = result[:, column, row] = triangles.view(g, -1)
    return result


def _lower(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the indices of a lower triangle.

    They are not kept from call to call: tensors of a FakeTensorMode or of a CUDA graph could not be used elsewhere.
    """
    row, column = torch.tril_indices(d, d, device=device)
    return row, column
