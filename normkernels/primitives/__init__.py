"""The primitives, one folder each: op.py (record, public function), eager.py, triton.py, reference.py."""
