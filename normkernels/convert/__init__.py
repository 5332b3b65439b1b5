"""Rewriting networks: other normalizations in, normalizations folded away."""

from normkernels.convert.fold import fold_pop_norm
from normkernels.convert.pop_norm import to_pop_norm

__all__ = ["fold_pop_norm", "to_pop_norm"]
