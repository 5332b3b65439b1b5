"""One folder per primitive: op.py (schema, autograd, public function), eager.py, DERIVATION.md."""
