"""The primitives: reduce (moments), small matrix (inverse_sqrt), mix (whiten), these three fused (iter_norm), and
ConvNorm's kernel_spectrum and spectral_filter."""

from normkernels.ops import _library
from normkernels.ops.inverse_sqrt.op import inverse_sqrt
from normkernels.ops.iter_norm.op import iter_norm
from normkernels.ops.moments.op import cross_moments, moments
from normkernels.ops.spectral.op import kernel_spectrum, spectral_filter
from normkernels.ops.whiten.op import whiten

_library.apply_environment()

__all__ = ["cross_moments", "inverse_sqrt", "iter_norm", "kernel_spectrum", "moments", "spectral_filter", "whiten"]
