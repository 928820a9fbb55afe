"""`helpers.pairwise`: every two values meet, in few cases, and always the same ones."""

from __future__ import annotations

import itertools

import pytest
from helpers.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2, 2), (12, 4, 2, 2, 4), (1, 5, 1), (3, 3, 3, 3), (2,) * 8], ids=str)
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    parameters = {f"p{number}": [f"{number}.{i}" for i in range(size)] for number, size in enumerate(sizes)}
    names, cases = pairwise(**parameters)
    assert names.split(",") == list(parameters)
    met = {pair for case in cases for pair in itertools.combinations(case.values, 2)}
    wanted = {
        pair for one, other in itertools.combinations(parameters.values(), 2) for pair in itertools.product(one, other)
    }
    assert met == wanted
    least = sizes and max(a * b for a, b in itertools.combinations(sizes, 2))
    assert least <= len(cases) <= 1.5 * least + 4
    assert pairwise(**parameters) == (names, cases), "the same in every process that runs a part of the tests"


def test_values_are_given_as_they_are() -> None:
    thing = object()
    names, cases = pairwise(a=[thing, None], b=(True, False))
    assert {case.values for case in cases} == set(itertools.product((thing, None), (True, False)))
    assert {case.id for case in cases} >= {"None-True"}
    assert names == "a,b"
