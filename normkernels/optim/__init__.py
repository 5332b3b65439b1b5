"""Preconditioners of gradients, between the backward pass and the optimizer."""

from normkernels.optim.bnp import BNP

__all__ = ["BNP"]
