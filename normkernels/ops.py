"""The primitives that layers and optimizers are made of.

They are reduce (moments), small matrix (inverse_sqrt), mix (whiten), these three fused (iter_norm), their diagonal case
(pop_norm), ConvNorm's kernel_spectrum and spectral_filter, and BNP's precondition.
"""

from normkernels.dispatch import choose
from normkernels.primitives.inverse_sqrt.op import inverse_sqrt
from normkernels.primitives.iter_norm.op import iter_norm
from normkernels.primitives.kernel_spectrum.op import kernel_spectrum
from normkernels.primitives.moments.op import cross_moments, moments
from normkernels.primitives.pop_norm.op import pop_norm
from normkernels.primitives.precondition.op import precondition
from normkernels.primitives.spectral_filter.op import spectral_filter
from normkernels.primitives.whiten.op import whiten

choose.apply_environment()

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
