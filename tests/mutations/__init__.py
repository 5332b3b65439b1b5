"""One-line mistakes, put into a copy of the package one at a time, to see that the tests notice each: `make mutations`.

by_hand.py has those that were thought of, drawn.json those that draw.py has drawn at random, notice.py the tests that
have to notice a mistake in a module; run.py puts the mistakes in and runs the tests. first_run.md is what the first run
of the first list left, survivors.md what the last one did. tests/simt/mutations.py does the same for the CUDA kernels.
"""
