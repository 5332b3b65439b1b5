"""Public architectures, and what normkernels does to each: `make check-networks`."""
