"""Figures of the papers, redrawn on data that is here: Gaussian samples and scikit-learn's digits."""
