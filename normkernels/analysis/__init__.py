"""The papers' measures, for any model: spectra, condition numbers, stochasticity, growth, attacks."""

from normkernels.analysis.adversarial import SimBAResult, accuracy, bim, gaussian_noise, simba
from normkernels.analysis.conditioning import HessianCondition, covariance_condition, hessian_condition
from normkernels.analysis.conv_spectrum import channel_condition, conv_singular_values, layer_spectral_norm
from normkernels.analysis.flops import flop_formulas
from normkernels.analysis.pruning import PruningCandidate, pruning_candidates
from normkernels.analysis.sphere import Decomposition, decompose, scale_invariance_gap
from normkernels.analysis.stochasticity import snd
from normkernels.analysis.weight_growth import BatchNormGap, Tracker, batch_norm_gaps, weight_norms

__all__ = [
    "BatchNormGap",
    "Decomposition",
    "HessianCondition",
    "PruningCandidate",
    "SimBAResult",
    "Tracker",
    "accuracy",
    "batch_norm_gaps",
    "bim",
    "channel_condition",
    "conv_singular_values",
    "covariance_condition",
    "decompose",
    "flop_formulas",
    "gaussian_noise",
    "hessian_condition",
    "layer_spectral_norm",
    "pruning_candidates",
    "scale_invariance_gap",
    "simba",
    "snd",
    "weight_norms",
]
