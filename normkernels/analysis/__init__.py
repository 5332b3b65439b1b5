"""What a trained network's weights do, measured."""

from normkernels.analysis.conv_spectrum import channel_condition, conv_singular_values, layer_spectral_norm

__all__ = ["channel_condition", "conv_singular_values", "layer_spectral_norm"]
