"""Drop-in layers. They import ops and nothing else of the package."""

from normkernels.layers.whitening import DBN1d, DBN2d, DBN3d, IterNorm1d, IterNorm2d, IterNorm3d

__all__ = ["DBN1d", "DBN2d", "DBN3d", "IterNorm1d", "IterNorm2d", "IterNorm3d"]
