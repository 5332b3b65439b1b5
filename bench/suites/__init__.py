"""Suites: which providers are compared with which, on which shapes, and the goals; run.py measures them."""
