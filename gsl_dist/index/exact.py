"""Exact distances to kept vectors, compiled: a candidate costs one pass over its row, and no array is made of rows.

`gsl_dist.index.refine` does the same with numpy, some ten times slower. No lock of Python is held.
"""

# Shapes: Q queries, D dims, n candidates, N rows

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""What each float16 stands for, by its bits: the compiler knows no float16, and a look-up is as fast."""


def measure_rows(
    queries_QD: Any, places_Qn: Any, store: tuple[Any, Any, Any], distances_Qn: Any, products: bool = False
) -> None:
    """Write the squared distance of each query to the rows at some places; where a place is below 0, write nothing.

    With `products`, negative inner products.

    Shapes: queries (Q, D) float32; places (Q, n) int64; store: kept (N, D) float16 or uint8, low and step (D,) float32,
        of bytes; distances (Q, n) float32.
    """
    kept_ND, low_D, step_D = store
    if kept_ND.dtype == np.float16:
        _measure_halves(queries_QD, places_Qn, kept_ND.view(np.uint16), _HALVES, distances_Qn, products)
    else:
        _measure_bytes(queries_QD, places_Qn, (kept_ND, low_D, step_D), distances_Qn, products)


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def _measure_bytes(queries_QD: Any, places_Qn: Any, store: Any, distances_Qn: Any, products: bool) -> None:
    kept_ND, low_D, step_D = store
    for query in range(len(places_Qn)):
        query_D = queries_QD[query]
        for candidate in range(places_Qn.shape[1]):
            if places_Qn[query, candidate] >= 0:
                row_D, total = kept_ND[places_Qn[query, candidate]], np.float32(0)
                for dim in range(len(query_D)):
                    number = low_D[dim] + np.float32(row_D[dim]) * step_D[dim]
                    away = number - query_D[dim]
                    total += -number * query_D[dim] if products else away * away
                distances_Qn[query, candidate] = total


@njit(nogil=True, cache=True, fastmath=True)  # type: ignore[untyped-decorator]
def _measure_halves(
    queries_QD: Any, places_Qn: Any, bits_ND: Any, halves: Any, distances_Qn: Any, products: bool
) -> None:
    for query in range(len(places_Qn)):
        query_D = queries_QD[query]
        for candidate in range(places_Qn.shape[1]):
            if places_Qn[query, candidate] >= 0:
                row_D, total = bits_ND[places_Qn[query, candidate]], np.float32(0)
                for dim in range(len(query_D)):
                    number = halves[row_D[dim]]
                    away = number - query_D[dim]
                    total += -number * query_D[dim] if products else away * away
                distances_Qn[query, candidate] = total
