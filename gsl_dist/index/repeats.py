"""Ids that occur more than once in a corpus: refused, or all rows but one left out.

Rows with the same id are brought together by a hash of it, so many of them at a time as the memory holds: one pass over
the ids of the files where all fit, more where they do not. Only rows that share one id always meet in one pass.
"""

# Shapes: N rows of all files, n of one pass

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import IdArray
from gsl_dist.errors import DataError
from gsl_dist.index.shards import refuse_bad_ids
from gsl_dist.index.stream import ID_BYTES, Piece, Portion, Survey

Duplicates = Literal["refuse", "first", "last"]

# An id as it came, joined, and sorted; and its row, joined, and the order.
_ROW_BYTES = {"refuse": 3 * 8, "first": 6 * 8, "last": 6 * 8}
_ODD, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


def group_files(surveys: Sequence[Survey]) -> list[list[int]]:
    """Give the files, by number, in groups that cannot share an id: the ranges of their ids lie apart."""
    groups: list[list[int]] = []
    reach = -1
    for number in sorted(range(len(surveys)), key=lambda number: surveys[number].first_id):
        survey = surveys[number]
        if survey.rows == 0:
            continue
        if not groups or survey.first_id > reach:
            groups.append([])
        groups[-1].append(number)
        reach = max(reach, survey.last_id)
    return [sorted(group) for group in groups]


def find_repeats(location: str, pieces: Sequence[Piece], duplicates: Duplicates, room_bytes: int) -> list[IdArray]:
    """Give the rows of each file to leave out so that every id occurs once, ascending.

    Args:
        location: the folder of codes.
        pieces: whole files, in the order of the corpus.
        duplicates: which row of those with one id is kept, if any may have the same.
        room_bytes: what ids may take while they are held.

    Raises:
        DataError: ids occur twice and none may, or one is negative.
    """
    whole = Portion("", location, tuple(pieces), sum(piece.rows for piece in pieces))
    passes = max(1, -(-whole.rows * _ROW_BYTES[duplicates] // max(1, room_bytes)))
    found = [_drop_repeats(_meet(whole, turn, passes), duplicates) for turn in range(passes)]
    dropped_n = np.sort(np.concatenate(found))
    edges = np.cumsum([0, *(piece.rows for piece in pieces)])
    cuts = np.searchsorted(dropped_n, edges)
    return [dropped_n[a:b] - edge for a, b, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)]


def _meet(whole: Portion, turn: int, passes: int) -> Iterator[tuple[IdArray, IdArray]]:
    """Yield the ids of one pass, and the numbers of their rows in all files."""
    at = 0
    for batch in whole.stream(["id"], ID_BYTES):
        ids_N = batch.column("id").to_numpy()
        hashed_N = (ids_N.view(np.uint64) * _ODD) >> _SHIFT
        inside_n = np.flatnonzero(hashed_N % np.uint64(passes) == turn) if passes > 1 else np.arange(len(ids_N))
        yield ids_N[inside_n], inside_n + at
        at += len(ids_N)


def _drop_repeats(met: Iterator[tuple[IdArray, IdArray]], duplicates: Duplicates) -> NDArray[np.int64]:
    none = np.empty(0, np.int64)
    if duplicates == "refuse":
        refuse_bad_ids(np.concatenate([none, *(ids_n for ids_n, _ in met)]))
        return none
    parts = list(met)
    ids_n = np.concatenate([none, *(ids for ids, _ in parts)])
    rows_n = np.concatenate([none, *(rows for _, rows in parts)])
    if len(ids_n) and ids_n.min() < 0:
        raise DataError("id", int(ids_n.min()), "ids are 0 or more: faiss marks an empty place with -1")
    # A stable sort leaves rows with one id in the order of the corpus.
    order_n = np.argsort(ids_n, kind="stable")
    same_n = ids_n[order_n[1:]] == ids_n[order_n[:-1]]
    dropped_n: NDArray[np.int64] = rows_n[order_n[1:] if duplicates == "first" else order_n[:-1]][same_n]
    return dropped_n
