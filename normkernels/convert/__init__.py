"""Rewriting of networks: other normalizations are put in, or normalizations are folded away."""

from normkernels.convert._affine import fold_pop_norm
from normkernels.convert._families import norm_layer
from normkernels.convert.checkpoints import load_iternorm_state
from normkernels.convert.fold import fold
from normkernels.convert.pop_norm import to_pop_norm
from normkernels.convert.replace import replace
from normkernels.convert.statistics import update_norm_stats

__all__ = ["fold", "fold_pop_norm", "load_iternorm_state", "norm_layer", "replace", "to_pop_norm", "update_norm_stats"]
