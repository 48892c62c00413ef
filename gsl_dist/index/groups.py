"""Items that are near one another become groups: the connected components of pairs of ids.

Pairs are streamed twice, from wherever they lie: once for the ids that occur in them, once to join those ids. At most
50 bytes are held for every item that has company; items without any, and pairs, cost nothing. The order of the pairs
changes nothing.
"""

# Shapes: N items with company, n pairs at a time

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import IdArray

Pairs = Iterable[tuple[IdArray, IdArray]]


def find_groups(stream: Callable[[], Pairs]) -> tuple[IdArray, IdArray]:
    """Give every item with company, ascending, and its group: the smallest id that it is connected with.

    Args:
        stream: yields all pairs, as often as it is called.

    Shapes: -> ids (N,), groups (N,) int64.
    """
    ids_N = gather_ids(stream())
    parents_N = np.arange(len(ids_N))
    for left_n, right_n in stream():
        _join_pairs(parents_N, np.searchsorted(ids_N, left_n), np.searchsorted(ids_N, right_n))
    return ids_N, ids_N[_find_roots(parents_N, np.arange(len(ids_N)))]


def gather_ids(pairs: Pairs) -> IdArray:
    """Give every id that occurs in a pair, once, ascending."""
    held: list[IdArray] = [np.empty(0, np.int64)]
    for ids_n in _list_ids(pairs):
        held.append(ids_n)
        # Only lists of about one size are put together: each id is moved a few times, however many pairs there are.
        while len(held) > 1 and len(held[-2]) <= 2 * len(held[-1]):
            held[-2:] = [np.union1d(*held[-2:])]
    return np.unique(np.concatenate(held))


def _list_ids(pairs: Pairs) -> Iterator[IdArray]:
    for left_n, right_n in pairs:
        yield np.union1d(left_n, right_n)


def _join_pairs(parents_N: NDArray[np.int64], left_n: NDArray[np.int64], right_n: NDArray[np.int64]) -> None:
    """Let the items of each pair have one root; a root is the smallest of its tree."""
    while len(left_n):
        left_n, right_n = _find_roots(parents_N, left_n), _find_roots(parents_N, right_n)
        apart_n = left_n != right_n
        left_n, right_n = left_n[apart_n], right_n[apart_n]
        # Of several that a root is to be hung below one is taken; the others are met again in the next round.
        parents_N[np.maximum(left_n, right_n)] = np.minimum(left_n, right_n)


def _find_roots(parents_N: NDArray[np.int64], places_n: NDArray[np.int64]) -> NDArray[np.int64]:
    roots_n = parents_N[places_n]
    while True:
        above_n = parents_N[roots_n]
        if np.array_equal(above_n, roots_n):
            break
        # Who is met on the way goes up by two: of a chain half the steps are left each time.
        parents_N[roots_n] = roots_n = parents_N[above_n]
    parents_N[places_n] = roots_n
    return roots_n
