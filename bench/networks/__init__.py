"""Networks: a ResNet-18 of our own, public architectures, and what normkernels does to each of these."""
