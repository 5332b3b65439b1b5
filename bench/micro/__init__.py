"""Benchmarks of our own ops and layers with pytest-benchmark, and their comparison between commits."""
