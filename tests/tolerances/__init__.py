"""The only home of tolerances, one file per family. They are derived, never tuned.

The rule
    error(ours, float64 oracle) <= 2 * error(plain same-type PyTorch path, float64 oracle) + floor

The factor 2 allows another order of the same operations. The floor is what a careful path in this type may lose
anyway, where the plain path happens to be luckier than that. A plain path whose own error exceeds LOST has no digits
left (eq. 17 as written diverges in float32 from about T=9 on, autograd through eigh gives NaN at equal eigenvalues):
then it is no reference, and the floor alone must hold.

Glossary of all files
    u       unit roundoff of the type of the statistics (float32 for half types), u_out that of x's type
    d, m, T channels per group, samples, iterations
    e       2 u |x|_max, the rounding of the mean

Here is what checks values of any kind; the floors of each family are in the file of its name.
"""

from tests.tolerances.common import (
    IDENTITY,
    assert_agree,
    assert_identity,
    assert_within,
    largest,
    rounding,
    row_sum,
    unit,
)

__all__ = [
    "IDENTITY",
    "assert_agree",
    "assert_identity",
    "assert_within",
    "largest",
    "rounding",
    "row_sum",
    "unit",
]
