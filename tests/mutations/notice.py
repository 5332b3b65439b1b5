"""The tests that have to notice a mistake in a module: those that are about it, without what takes longest."""

from __future__ import annotations

from tests.mutations.source import Mutation

NOT_KERNELS = ("-k", "not triton")  # the tests of all backends, with the eager one

EAGER = {
    "primitives.moments.eager": (
        *("tests/ops/test_moments.py", "tests/ops/test_spectra.py", "-k"),
        "not triton and (not test_spectra or exact_covariance or remainder)",
    ),
    "primitives.inverse_sqrt.eager": (
        *("tests/ops/test_inverse_sqrt.py", "tests/ops/test_spectra.py", "-k"),
        "not triton and (not test_spectra or singular or converge or stops)",
    ),
    "primitives.iter_norm.eager": (
        *("tests/ops/test_iter_norm.py", "tests/ops/test_precision.py"),
        *("-k", "not triton and (not test_precision or cost_nothing)"),
    ),
    "primitives.iter_norm.sync": ("tests/layers/test_sync.py",),
    "primitives.pop_norm.eager": ("tests/ops/test_pop_norm.py", *NOT_KERNELS),
    "primitives.whiten.eager": ("tests/ops/test_whiten.py", *NOT_KERNELS),
    "primitives.precondition.eager": ("tests/ops/test_precondition.py", *NOT_KERNELS),
    "primitives.kernel_spectrum.eager": ("tests/ops/test_kernel_spectrum.py",),
    "primitives.spectral_filter.eager": ("tests/ops/test_spectral_filter.py",),
    "eager.tiles": (
        *("tests/ops/test_iter_norm.py", "tests/ops/test_whiten.py", "-k"),
        "not triton and (every_layout or ragged or layout_is_kept or expanded)",
    ),
    "eager.layouts": (
        *("tests/ops/test_iter_norm.py", "tests/ops/test_whiten.py", "-k"),
        "not triton and (every_layout or ragged or layout_is_kept or expanded)",
    ),
}
LAYERS = {
    "layers._base": ("tests/layers/test_whitening.py", "tests/layers/test_conventions.py"),
    "layers.whitening": ("tests/layers/test_whitening.py", "tests/layers/test_conventions.py"),
    "layers.pop_norm": ("tests/layers/test_pop_norm.py", "tests/layers/test_pop_norm_inputs.py"),
    "layers.conv_norm": ("tests/layers", "-k", "conv_norm"),
    "layers.sync": ("tests/layers/test_sync.py",),
}
OPTIM = {
    "optim._batch": ("tests/optim", "-k", "test_bnp.py or gathering or distributed"),
    "optim._running": ("tests/optim", "-k", "test_bnp.py or gathering or distributed"),
    "optim._layers": ("tests/optim", "-k", "not compiled and not distributed"),
    "optim.bnp": ("tests/optim", "-k", "not compiled and not distributed"),
}
WEIGHTS_AND_CONVERSION = {
    "convert._affine": ("tests/convert/test_fold.py", "tests/convert/test_fold_pop_norm.py"),
    "convert._families": ("tests/convert/test_replace.py", "tests/convert/test_norm_layer.py"),
    "convert._features": ("tests/convert/test_replace_features.py",),
    "convert.checkpoints": ("tests/convert/test_checkpoints.py",),
    "convert.replace": ("tests/convert", "-k", "test_replace"),
    "convert.statistics": ("tests/convert/test_statistics.py",),
    "parametrizations.weights": ("tests/parametrizations/test_weights.py", "-k", "not compiles"),
    "penalties": ("tests/test_penalties.py", "-k", "not compiles"),
}
# The interpreter is slow, so there is one type, and one test of each kind that the kernels have.
TRITON = {
    "triton.tiles": (
        *("tests/ops/test_triton_offsets.py", "tests/ops/test_whiten.py", "-k"),
        "triton and (groups or parts_in or (test_every_layout_and_type and float32 and not stacked))",
    ),
    "triton.diagonal": (
        *("tests/ops/test_triton_diagonal.py", "tests/ops/test_triton_offsets.py", "tests/ops/test_pop_norm.py", "-k"),
        "triton and (many_parts or 64_bit or single or factors or few or (every_layout and float32))",
    ),
    "primitives.moments.triton": (
        *("tests/ops/test_moments.py", "tests/ops/test_triton_launches.py"),
        *("-k", "triton and (float32 and every_layout or ragged or group_sizes or one_sample or few)"),
    ),
    "primitives.inverse_sqrt.triton": (
        *("tests/ops/test_inverse_sqrt.py", "tests/ops/test_spectra.py", "tests/ops/test_triton_launches.py", "-k"),
        "triton and (float32 and (iterations or scales or defaults) or leaves_many or wide_group)",
    ),
    "primitives.iter_norm.triton": (
        *("tests/ops/test_iter_norm.py", "tests/ops/test_triton_launches.py"),
        *("-k", "triton and float32 and (group_sizes or iterations) or cost_nothing"),
    ),
    "primitives.whiten.triton": (
        "tests/ops/test_whiten.py",
        "-k",
        "triton and (float32 and layout or group_sizes or affine)",
    ),
    "primitives.pop_norm.triton": (
        *("tests/ops/test_pop_norm.py", "-k"),
        "triton and (modes and float32 or large_means and float32 or without or beta_far or cost_nothing)",
    ),
    "primitives.precondition.triton": (
        *("tests/ops/test_precondition.py", "-k"),
        "triton and (float32 and (each_kind or all_layers) or not_finite)",
    ),
    "primitives.spectral_filter.triton": (
        *("tests/ops/test_spectral_kernels.py", "tests/ops/test_triton_offsets.py"),
        *("-k", "triton and (every_plane or windows or numbers_of_planes or of_planes)"),
    ),
    "primitives.kernel_spectrum.triton": (
        *("tests/ops/test_triton_spectral.py", "-k"),
        "kernels_and_planes or dilation or many_input or floor or layouts_of",
    ),
}
GROUPS = {
    "eager": tuple(EAGER),
    "layers": tuple(LAYERS),
    "optim": tuple(OPTIM),
    "weights and conversion": tuple(WEIGHTS_AND_CONVERSION),
    "triton": tuple(TRITON),
}
TESTS = EAGER | LAYERS | OPTIM | WEIGHTS_AND_CONVERSION | TRITON


def tests_for(mutation: Mutation) -> tuple[str, ...]:
    return mutation.tests or TESTS[mutation.module]
