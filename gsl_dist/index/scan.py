"""The scan of `gsl_dist.index.vlq`, compiled: for each query, rank regions, look into the first ones, keep the nearest.

It is written as loops, for numba; `_search_plainly` beside it does the same with numpy. It holds no lock of Python, so
that threads may share the queries. The number of sub-vectors is a constant of the compiled code: with its loop unrolled
and places counted without sign, a code takes a third of the time.
"""

# Shapes: Q queries, C cells, E lines of each, R = C E regions, N rows, M sub-vectors, K codewords, w cells ranked

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from gsl_dist.hits import FAR


@functools.cache
def compile_search(sub_vectors: int, codewords: int) -> Callable[[Any, Any, Any, int, Any], None]:
    """Give the search for codes of one shape.

    It writes the nearest rows of each query to `answers`, nearest first; distances lack |q|^2. Its arguments:

        queries: their inner products with centroids and squared distances without |q|^2, (Q, C) each; the cells whose
            regions are ranked (Q, w); -2 times their inner products with codewords (Q, M, K).
        lines: edges, feet and squared lengths (C, E), levels (L,).
        rows: offsets (R + 1,), ids (N,), choices and levels (N, M + 1), squares (N,); a mask of the rows that may be
            found (N,), or of none if all may.
        probes: regions to look into.
        answers: distances (Q, k), filled with what is farther than anything; ids (Q, k).
    """
    parts, words = np.uint64(sub_vectors), np.uint64(codewords)
    width = np.uint64(sub_vectors + 1)

    @njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
    def scan_region(first: int, stop: int, bases: Any, tables: Any, rows: Any, answers: Any) -> None:
        """Measure the rows of a region and keep the nearest in a heap, the farthest of them first."""
        own, step = bases
        looked, levels_L = tables
        ids_N, codes, squares_N, mask_N = rows
        masked = len(mask_N) > 0
        best, ids = answers
        for row in range(np.uint64(first), np.uint64(stop)):
            if masked and mask_N[row] == 0:
                continue
            start = row * width
            distance = squares_N[row] + own + levels_L[codes[start + parts]] * step
            for part in range(parts):
                distance += looked[part * words + codes[start + part]]
            if distance < best[0] or (distance == best[0] and ids_N[row] < ids[0]):
                best[0], ids[0] = distance, ids_N[row]
                _sink(best, ids, len(best))

    @njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
    def search(queries: Any, lines: Any, rows: Any, probes: int, answers: Any) -> None:
        dots_QC, reach_QC, near_Qw, looked_QMK = queries
        edges_CE, levels_L, offsets_R = lines[0], lines[3], rows[0]
        edges, flat = edges_CE.shape[1], (rows[1], rows[2].ravel(), rows[3], rows[4])
        scores = np.empty(near_Qw.shape[1] * edges, np.float32)
        regions = np.empty(len(scores), np.int64)
        for query in range(len(near_Qw)):
            dots_C, tables = dots_QC[query], (looked_QMK[query].ravel(), levels_L)
            _rank_regions(reach_QC[query], near_Qw[query], lines, (scores, regions))
            nearest = (answers[0][query], answers[1][query])
            for region in regions[: _pick_first(scores, regions, probes)]:
                cell = region // edges
                own = -2 * dots_C[cell]
                step = -2 * dots_C[edges_CE[cell, region % edges]] - own
                scan_region(offsets_R[region], offsets_R[region + 1], (own, step), tables, flat, nearest)
            _sort_heap(nearest[0], nearest[1])

    return search


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pick_cells(reach_QC: Any, cells: int) -> Any:
    """Give the nearest cells of each query, in no order; of equally near ones those that come first.

    Few are wanted of many: most are passed over by one comparison with the farthest of those kept.

    Shapes: (Q, C) -> (Q, cells) int64.
    """
    near_Qw = np.empty((len(reach_QC), cells), np.int64)
    kept = np.empty(cells, np.float32)
    for query in range(len(reach_QC)):
        reach_C, near_w = reach_QC[query], near_Qw[query]
        kept[:] = np.inf
        for cell in range(len(reach_C)):
            # What has overflowed is as far as can be, and a cell all the same.
            reach = reach_C[cell] if reach_C[cell] < FAR else FAR
            if reach < kept[0]:
                kept[0], near_w[0] = reach, cell
                _sink(kept, near_w, cells)
    return near_Qw


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def _rank_regions(reach_C: Any, near_w: Any, lines: Any, ranked: Any) -> None:
    """Write the regions of some cells, and how far off their rows lie, whether this shard holds any of them or not."""
    edges_CE, feet_CE, lengths_CE, _ = lines
    scores, regions = ranked
    edges, found = edges_CE.shape[1], 0
    for cell in near_w:
        own = reach_C[cell]
        for edge in range(edges):
            foot = feet_CE[cell, edge]
            other = reach_C[edges_CE[cell, edge]]
            scores[found] = own + foot * (other - own) + (foot * foot - foot) * lengths_CE[cell, edge]
            regions[found] = cell * edges + edge
            found += 1


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pick_first(scores: Any, regions: Any, probes: int) -> int:
    """Bring the regions of least score to the front; of equal ones, those ranked first. Give how many there are."""
    if len(scores) <= probes:
        return len(scores)
    limit = np.partition(scores, probes - 1)[probes - 1]
    room = probes - (scores < limit).sum()
    kept = 0
    for place in range(len(scores)):
        if scores[place] < limit or (scores[place] == limit and room > 0):
            room -= scores[place] == limit
            regions[kept] = regions[place]
            kept += 1
    return kept


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sink(best: Any, ids: Any, size: int) -> None:
    """Let the first of a heap sink to its place; the farthest comes first, of equal ones that of the highest id.

    Those that it passes rise by one place each and are written once; it is itself written where it comes to lie.
    """
    one, count = np.uint64(1), np.uint64(size)
    distance, own = best[0], ids[0]
    place, below = np.uint64(0), one
    while below < count:
        other = below + one
        if other < count and (best[other] > best[below] or (best[other] == best[below] and ids[other] > ids[below])):
            below = other
        if best[below] < distance or (best[below] == distance and ids[below] <= own):
            break
        best[place], ids[place] = best[below], ids[below]
        place, below = below, below + below + one
    best[place], ids[place] = distance, own


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sort_heap(best: Any, ids: Any) -> None:
    """Order what a heap holds, nearest first."""
    for size in range(len(best) - 1, 0, -1):
        best[0], best[size] = best[size], best[0]
        ids[0], ids[size] = ids[size], ids[0]
        _sink(best, ids, size)
