"""The names under which providers appear in results, goals and plots."""

BATCHNORM, CONV, PLAIN, PLAIN_DBN = "BatchNorm2d", "conv3x3", "plain autograd Newton", "plain autograd DBN"
TRANSPOSED, GROUPED = "transposed IterNorm", "grouped conv1x1"
ITERNORM, DBN, VGG_ITERNORM = "IterNorm T=5", "DBN eigh", "IterNorm(64)"
CONV2D, PLAIN_CONV_NORM, CONV_NORM = "Conv2d", "plain autograd ConvNorm", "ConvNorm2d"
POP_NORM, PLAIN_POP_NORM = "POPNorm2d", "plain autograd POP-Norm"
FILTER, FFT, COPY, SPECTRUM, PADDED_FFT = "spectral_filter", "torch.fft", "copy", "kernel_spectrum", "padded FFT"
