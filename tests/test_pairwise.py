"""The choice of cases has every pair, and few cases."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairwise import pairwise

Case = dict[str, int]


def every(*sizes: int) -> list[Case]:
    """Return the full product of as many parameters, with so many values each."""
    return [dict(zip("abcdef", values, strict=False)) for values in product(*map(range, sizes))]


def pairs(cases: list[Case]) -> set[tuple[tuple[str, int], ...]]:
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 2), 6), ((3, 3, 3), 12), ((15, 3, 2), 50), ((2, 2, 2, 2, 2), 8), ((6, 2, 3), 20)], ids=str
)
def test_every_pair_is_in_a_chosen_case(sizes: tuple[int, ...], most: int) -> None:
    cases = every(*sizes)
    places = pairwise(cases)
    assert pairs([cases[i] for i in places]) == pairs(cases)
    assert len(places) <= most and places == sorted(set(places)) == pairwise(cases)


def test_cases_need_not_be_a_product() -> None:
    """Pairs that no case has are not asked for: here two parameters take their values together."""
    cases = [case for case in every(3, 3, 4) if case["a"] == case["b"]]
    places = pairwise(cases)
    assert pairs([cases[i] for i in places]) == pairs(cases)


@pytest.mark.parametrize("size", [1, 5])
def test_values_of_one_parameter_are_all_chosen(size: int) -> None:
    assert pairwise(every(size)) == list(range(size))


def test_a_case_without_parameters_is_chosen() -> None:
    assert pairwise([{}]) == [0] and pairwise([]) == []
