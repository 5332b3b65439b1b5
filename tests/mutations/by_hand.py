"""Mistakes that somebody might make: a sign, a factor, eps elsewhere, a count, an axis, a correction left out."""

from __future__ import annotations

from tests.mutations.source import Mutation

BY_HAND = (
    # Mistakes that a review had found and no test noticed, and their relatives.
    Mutation("optim._running:merge_ranks", "by_layer[:, :, 0] / totals[:, 0]", "by_layer[:, :, 1] / totals[:, 1]"),
    Mutation("optim._running:merge_ranks", "variances + (means - mean).square()", "variances"),
    Mutation("optim._batch:Batch.merged", "other.rows / rows,", "other.samples / (self.samples + other.samples),"),
    Mutation("primitives.iter_norm.sync:_merged_moments", "m = x.numel() // channels", "m = x.shape[0]"),
    Mutation("primitives.moments.triton:partial_moments", "tl.minimum(stop - start, BLOCK).to(tl.float32)", "BLOCK"),
    Mutation("triton.diagonal:partial_channel_moments", "tl.minimum(stop - start, BLOCK).to(tl.float32)", "BLOCK"),
    Mutation("triton.tiles:positions_of", "sample.to(tl.int64) * x.sample_stride", "sample * x.sample_stride"),
    Mutation("triton.tiles:positions_of", "position.to(tl.int64) * x.position_stride", "position * x.position_stride"),
    Mutation("triton.tiles:pointers", "channel.to(tl.int64) * x.channel_stride", "channel * x.channel_stride"),
    Mutation("triton.tiles:bounds", "part.to(tl.int64) * chunk", "part * chunk"),
    Mutation("triton.tiles:count_of", "part.to(tl.int64) * cut.chunk", "part * cut.chunk"),
    Mutation(
        "triton.diagonal:channel_map", "channel.to(tl.int64) * matrix.group_stride", "channel * matrix.group_stride"
    ),
    Mutation(
        "primitives.spectral_filter.triton:partial_cross_spectrum",
        "start.to(tl.int64) * z.sample_stride",
        "start * z.sample_stride",
    ),
    Mutation(
        "primitives.spectral_filter.triton:filter_planes",
        "(tl.program_id(0) // groups).to(tl.int64)",
        "(tl.program_id(0) // groups)",
    ),
    # Eager.
    Mutation("primitives.moments.eager:moments", "- d * d.mT", "+ d * d.mT"),
    Mutation("primitives.moments.eager:moments", "shift.to(wide) - mean + delta", "shift.to(wide) - mean"),
    Mutation("primitives.moments.eager:moments", "chain = max(8,", "chain = 16 * max(8,"),
    Mutation("primitives.inverse_sqrt.eager:stopped", "1 / (ROUNDINGS * eps)", "ROUNDINGS / eps"),
    Mutation("primitives.inverse_sqrt.eager:newton", "P = unless(stops, P, bmm(P, Q))", "P = bmm(P, Q)"),
    Mutation("primitives.inverse_sqrt.eager:newton_adjoint", "dM, alpha=2.25)", "dM, alpha=2.0)"),
    Mutation("primitives.inverse_sqrt.eager:add_eps", "cov + eps * eye_like(cov)", "cov + eps"),
    Mutation("primitives.inverse_sqrt.eager:inverse_sqrt_backward", "0.5 * (E * W)", "(E * W)"),
    Mutation("primitives.iter_norm.eager:iter_norm", "beta = -torch.bmm", "beta = torch.bmm"),
    Mutation("primitives.iter_norm.eager:iter_norm_backward", "* (2 / m)", "* (1 / m)"),
    Mutation("primitives.iter_norm.eager:iter_norm_backward", "D = D - f * offset.mT", "D = D"),
    Mutation("primitives.pop_norm.eager:factors", ".square() + eps).sqrt()", ".square()).sqrt() + eps"),
    Mutation("primitives.pop_norm.eager:pop_norm", "beta - remainder", "beta + remainder"),
    Mutation("primitives.pop_norm.eager:pop_norm_backward", "f * (var + eps) - beta * D", "f * var - beta * D"),
    Mutation("primitives.pop_norm.eager:pop_norm_backward", "D = D - f * offset", "D = D"),
    Mutation("primitives.whiten.eager:whiten", "c if bias is None else c + bias", "c if bias is None else c - bias"),
    Mutation("primitives.precondition.eager:_precondition", "var.amax(1, keepdim=True)", "var.amax()"),
    Mutation("primitives.kernel_spectrum.eager:kernel_spectrum_backward", " + FLOOR * (d_square - d_power)", ""),
    Mutation("eager.tiles:tiles", "slice(j, j + step)", "slice(j, j + step - 1)"),
    Mutation("primitives.iter_norm.sync:_merged_moments", "m * means, m *", "means, m *"),
    Mutation("primitives.iter_norm.sync:_merged_moments", "local[:channels] + local", "local[:channels] - local"),
    # Layers.
    Mutation("layers._base:BatchStatisticsLayer._update", "running), factor)", "running), 1 - factor)"),
    Mutation("layers.pop_norm:_POPNorm.forward", "var * (m / (m - 1))", "var"),
    Mutation("layers.whitening:_Whitening._load_from_state_dict", " + self.eps).rsqrt()", ").rsqrt()"),
    Mutation("layers.conv_norm:_ConvNorm._forward", "n - (after - q)", "n - after"),
    Mutation("layers.sync:_Sync._whitened", "count > 1", "count > 0"),
    # Optimizers.
    Mutation("optim._batch:Batch.merged", "t * (1 - t)", "t"),
    Mutation("optim._batch:Batch.of", "x.numel() // x.shape[1]", "x.shape[0]"),
    Mutation("optim._running:Running.update", "1 - rho", "rho"),
    Mutation("optim._layers:Layer.q2", "self.positions**0.5", "self.positions"),
    # Conversion, weights.
    Mutation("convert._affine:fold_behind", "layer.bias - mean", "layer.bias + mean"),
    Mutation("convert._affine:fold_in_front", "layer.bias + b, trains", "b, trains"),
    Mutation("convert.statistics:update_norm_stats", " or not _finite(layer)", ""),
    Mutation("convert._families:largest_divisor", "min(channels, asked) + 1", "min(channels, asked)"),
    Mutation("parametrizations.weights:orthogonalize", "if n < d:", "if n <= d:"),
    Mutation("penalties:_gram_error", "2 * others", "others"),
    # Triton.
    Mutation("primitives.inverse_sqrt.triton:whitening_matrix", "diagonal + eps, mask=index < d)", "diagonal + eps)"),
    Mutation("primitives.inverse_sqrt.triton:check_iterations", "num_iterations > MOST_ITERATIONS", "False"),
    Mutation("primitives.iter_norm.triton:finish_backward", "2.0 / m", "1.0 / m"),
    Mutation(
        "primitives.iter_norm.triton:finish_backward",
        "row, d, 0.0)[:, None] * offset[None, :]",
        "row, d, 0.0)[:, None] * 0",
    ),
    Mutation("primitives.moments.triton:merged_covariance", "tl.sum(within + between, 0)", "tl.sum(within, 0)"),
    Mutation("triton.diagonal:merged_moments", "count[None, :] * between * between", "between * between"),
    Mutation("primitives.whiten.triton:mix_kernel", "tile -= center2", "tile += center2"),
    Mutation("primitives.pop_norm.triton:normalize_backward", " - offset * f\n", "\n"),
    Mutation(
        "primitives.precondition.triton:precondition_kernel",
        "eps1 * tl.max(largest, 0) + eps2",
        "eps1 * tl.max(largest, 0)",
    ),
    Mutation(
        "primitives.spectral_filter.triton:slots",
        "2 * f > N",
        "2 * f >= N",
        harmless="the frequency n / 2 has no cosine in its slot and so no B, and it is B's sign that this is about",
    ),
)
