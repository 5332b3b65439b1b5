"""The primitives that layers and optimizers are made of.

They are reduce (moments), small matrix (inverse_sqrt), mix (whiten), these three fused (iter_norm), their diagonal case
(pop_norm), ConvNorm's kernel_spectrum and spectral_filter, and BNP's precondition.
"""

from normkernels.ops import _library
from normkernels.ops.inverse_sqrt.op import inverse_sqrt
from normkernels.ops.iter_norm.op import iter_norm
from normkernels.ops.moments.op import cross_moments, moments
from normkernels.ops.pop_norm.op import pop_norm
from normkernels.ops.precondition.op import precondition
from normkernels.ops.spectral.op import kernel_spectrum, spectral_filter
from normkernels.ops.whiten.op import whiten

_library.apply_environment()

__all__ = [
    "cross_moments",
    "inverse_sqrt",
    "iter_norm",
    "kernel_spectrum",
    "moments",
    "pop_norm",
    "precondition",
    "spectral_filter",
    "whiten",
]
