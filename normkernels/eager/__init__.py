"""Parts of the plain PyTorch implementations that primitives share."""
