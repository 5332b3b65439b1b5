"""The primitives: reduce (moments), small matrix (inverse_sqrt), mix (whiten), and the three fused (iter_norm)."""

from normkernels.ops import _library
from normkernels.ops.inverse_sqrt.op import inverse_sqrt
from normkernels.ops.iter_norm.op import iter_norm
from normkernels.ops.moments.op import cross_moments, moments
from normkernels.ops.whiten.op import whiten

_library.apply_environment()

__all__ = ["cross_moments", "inverse_sqrt", "iter_norm", "moments", "whiten"]
