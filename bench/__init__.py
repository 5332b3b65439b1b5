"""Benchmarks and the demo: everything here may import normkernels, nothing in normkernels imports this."""
