"""A choice of cases in which every pair of values still occurs, for backends with which all cases take too long.

A mistake in a kernel shows with one value of a parameter, or where two meet: a layout and a type, a method and a number
of samples. Where three have to meet, the tests of an op's parts and those of plain PyTorch have all of their cases.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def pairwise(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Return the places of the chosen cases, in order: each pair of values that any case has, a chosen one has, too.

    The cases need not be a full product. The choice is greedy, so it is not always the smallest, and always the same:
    next comes the case with most pairs that no case before it has; among equals the one whose pairs have been chosen
    least often, so that values meet in turn; then the first.
    """
    pairs = [set(combinations(sorted(case.items()), min(2, len(case)))) for case in cases]
    times = dict.fromkeys(set().union(*pairs), 0)
    chosen = []

    def rank(i: int) -> tuple[int, int]:
        return sum(not times[pair] for pair in pairs[i]), -sum(times[pair] for pair in pairs[i])

    while not all(times.values()):
        best = max(range(len(cases)), key=rank)
        chosen.append(best)
        for pair in pairs[best]:
            times[pair] += 1
    return sorted(chosen)
