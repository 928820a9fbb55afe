"""Cases in which every two values meet, instead of all values of all parameters."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(**parameters: Iterable[Any]) -> tuple[str, list[Any]]:
    """The arguments of `pytest.mark.parametrize` for parameters whose values act on a result in pairs at most.

    Every value of a parameter stands with every value of every other one in some case. There are about as many cases as
    the two longest parameters have pairs, in place of the product of all; the same parameters give the same cases.

    Args:
        parameters: the values of each, at least two parameters.
    """
    values = [list(each) for each in parameters.values()]
    cases = [tuple(each[i] for each, i in zip(values, case, strict=True)) for case in _cases([len(v) for v in values])]
    return ",".join(parameters), [pytest.param(*case, id="-".join(map(str, case))) for case in cases]


Pair = tuple[tuple[int, int], tuple[int, int]]


def _cases(sizes: list[int]) -> list[tuple[int, ...]]:
    """Cases by the numbers of the values, each made to hold as many pairs as it can that no case before it holds."""
    left: set[Pair] = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    used: Counter[tuple[int, int]] = Counter()
    cases: list[tuple[int, ...]] = []
    while left:
        chosen = dict(min(left))
        for parameter in sorted(range(len(sizes)), key=lambda parameter: -sizes[parameter]):
            if parameter not in chosen:
                ranks = {value: _rank((parameter, value), chosen, left, used) for value in range(sizes[parameter])}
                chosen[parameter] = min(ranks, key=lambda value: ranks[value])
        case = tuple(chosen[parameter] for parameter in range(len(sizes)))
        left -= set(itertools.combinations(enumerate(case), 2))
        used.update(enumerate(case))
        cases.append(case)
    return cases


def _rank(
    entry: tuple[int, int], chosen: dict[int, int], left: set[Pair], used: Counter[tuple[int, int]]
) -> tuple[int, int]:
    """Lower for a value that makes more new pairs with those that are chosen, then for one that fewer cases have."""
    pairs = [(entry, other) if entry < other else (other, entry) for other in chosen.items()]
    return -sum(pair in left for pair in pairs), used[entry]
