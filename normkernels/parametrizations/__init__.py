"""Weight normalizations as torch parametrizations, ours and torch's own under one roof."""

from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from normkernels.parametrizations.weights import centered_weight_norm, oni, weight_standardization

__all__ = [
    "centered_weight_norm",
    "oni",
    "orthogonal",
    "spectral_norm",
    "weight_norm",
    "weight_standardization",
]
