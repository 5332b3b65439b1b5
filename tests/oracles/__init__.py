"""References for the tests: the papers' equations in float64 with plain autograd, slow and obvious.

Nothing here imports the package under test.

* iternorm.py    IterNorm paper, eq. 11 to 17, and the frobenius scaling
* dbn.py         IterNorm paper, eq. 2 (ZCA whitening), and a reference for equal eigenvalues
* eigenbasis.py  eq. 17 and its gradient on the eigenvalues, for T where eq. 17 itself diverges in float64
* highprec.py    eq. 6, 7, 14, 15, 17 in multiple precision: the judge of the other references
* plain.py       the plain PyTorch path in the input's type, which the tolerance rule compares with
* inputs.py      inputs of known spectrum, and every memory layout
* run.py         runs one path and collects its outputs and gradients
"""
