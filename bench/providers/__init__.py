"""Providers, the things that are compared: our layers, torch's, and baselines."""
