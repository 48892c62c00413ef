"""Search in the order of lists, for many queries at once: each list is decoded once for all queries that probe it.

Query by query a scan looks up every code anew. Here queries and the lists that they probe are put in the order of the
lists, and one product of matrices measures a list against all queries that come to it: the more of them, the cheaper.
The nearest of each query are kept in a heap until the last list is behind it. `SweptLists` answer as the lists that
they are made of do, to the rounding of float32, so that whoever searches need not know.

Vectors that a version keeps are swept in the same way, all of them, where neighbours are to be exact.
"""

# Shapes: Q queries, D dims, k neighbours, P lists probed; n rows and q queries of one product, E = D + 2 columns

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.hits import Hits, merge_topk
from gsl_dist.index.coarse import Probed, follow_graph
from gsl_dist.index.lists import FaissLists, Lists
from gsl_dist.index.manifest import Manifest
from gsl_dist.index.refine import VectorStore, measure_exactly
from gsl_dist.index.selection import Places, Selection
from gsl_dist.index.shards import read_codes, turn_queries

UNSWEPT = ("vlq", "rabitq")
"""Kinds that are searched query by query alone: of lines regions are ranked by their own scan, and what a RaBitQ code
stands for is not all that lists know of a row."""

_LEAST_QUERIES, _FEW_QUERIES, _MOST_DIMS = 100, 16, 16
_BLOCK_ROWS, _BLOCK_FLOATS = 1 << 10, 1 << 18
_SPARE = 16


def suits_sweep(version: Manifest, per_list: float) -> bool:
    """Tell whether lists are swept faster than they are scanned, with so many queries to a list on average.

    As `benchmarks/matching.py` measured. For every query faiss decodes sums again, and reads codes that are not of 8
    bits one by one. Against a look-up stand the dims of its part in the product; blocks are scanned faster than that.
    """
    if version.kind in UNSWEPT or version.code_layout != "plain":
        return False
    if version.kind in ("rq", "lsq"):
        return per_list >= _FEW_QUERIES
    least = _LEAST_QUERIES if version.bits == 8 else _FEW_QUERIES
    return per_list >= least and version.dim <= _MOST_DIMS * version.sub_vectors


class Facing:
    """Rows that queries are measured against, by a single product of matrices.

    Both are measured from a place near the rows, so that small distances are not lost in the rounding of large ones;
    what else belongs to a distance stands in two columns more: (-2 q, 1, |q|^2) times (x, |x|^2, 1).

    Args:
        rows_nD: the rows.
        metric: what nearest means.
        centre_D: the place.
        squares_n: what stands in the place of squared lengths, if it was learned; there is no centre then.
    """

    def __init__(
        self, rows_nD: FloatArray, metric: str, centre_D: FloatArray, squares_n: FloatArray | None = None
    ) -> None:
        self._centre_D = centre_D if metric != "ip" and squares_n is None else None
        if self._centre_D is not None:
            rows_nD = rows_nD - self._centre_D
            squares_n = np.einsum("nd,nd->n", rows_nD, rows_nD)
        self._wide_nE = rows_nD
        if squares_n is not None:
            self._wide_nE = np.column_stack([rows_nD, squares_n, np.ones_like(squares_n)])

    def measure(self, queries_qD: FloatArray) -> FloatArray:
        """Give squared distances, or negative inner products where these are the metric.

        Shapes: (q, D) -> (q, n) float32.
        """
        if self._wide_nE.shape[1] == queries_qD.shape[1]:
            return -queries_qD @ self._wide_nE.T
        if self._centre_D is not None:
            queries_qD = queries_qD - self._centre_D
        wide_qE = np.ones((len(queries_qD), queries_qD.shape[1] + 2), np.float32)
        np.multiply(queries_qD, -2, out=wide_qE[:, :-2])
        wide_qE[:, -1] = np.einsum("qd,qd->q", queries_qD, queries_qD)
        return wide_qE @ self._wide_nE.T


class Nearest:
    """The k nearest rows of each query, of those that were shown so far."""

    def __init__(self, queries: int, k: int) -> None:
        self._heap = faiss.ResultHeap(queries, k)

    def compare(self, queries_QD: FloatArray, queries_q: NDArray[np.int64], ids_n: IdArray, facing: Facing) -> None:
        """Show rows to some of the queries, as many at a time as a product may hold."""
        step = max(1, _BLOCK_FLOATS // max(1, len(ids_n)))
        for start in range(0, len(queries_q), step):
            some_q = queries_q[start : start + step]
            self._heap.add_result_subset(some_q, facing.measure(queries_QD[some_q]), ids_n)

    def take(self) -> tuple[FloatArray, IdArray]:
        """Give distances and ids, nearest first; nothing is to be shown after."""
        self._heap.finalize()
        return self._heap.D, self._heap.I


@dataclass(frozen=True)
class SweptLists:
    """Lists of faiss, searched in their own order.

    Args:
        lists: of a kind that is none of `UNSWEPT`.
    """

    lists: FaissLists

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return self.lists.rows

    @property
    def places(self) -> Places:
        """Give where each row is, by id."""
        return self.lists.places

    @cached_property
    def _unturned(self) -> Codebook:
        # Queries are turned once; what codes stand for need not be turned back.
        return replace(self.lists.codebook, rotation=None)

    def search(
        self,
        queries_QD: FloatArray,
        k: int,
        probes: int,
        chosen: Selection | None = None,
        *,
        probed: Probed | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in its `probes` nearest cells, among those chosen.

        Shapes: (Q, D) -> distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """
        codebook = self.lists.codebook
        cells_QP = self._probe(queries_QD, probes) if probed is None else probed.lists
        turned_QD = codebook.rotate(queries_QD)
        places_n = None if chosen is None else np.sort(chosen.places_n)

        def work(part: slice, nearest: Nearest) -> None:
            for cell, queries_q in group_queries(cells_QP[part]):
                for ids_n, codes in self._cut_list(cell, places_n):
                    nearest.compare(turned_QD[part], queries_q, ids_n, self._face(cell, codes))

        distances_Qk, ids_Qk = keep_nearest(len(queries_QD), k, work)
        is_square = codebook.metric != "ip" and codebook.bias is None
        return np.maximum(distances_Qk, 0) if is_square else distances_Qk, ids_Qk

    def take(self, places_n: NDArray[np.int64]) -> tuple[IdArray, CodeArray]:
        """Give the cells (n,) and packed codes (n, code_bytes) of rows by their numbers in list order."""
        return self.lists.take(places_n)

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), cells (N,) and packed codes (N, code_bytes), in list order."""
        return self.lists.read()

    def write(self, path: Path) -> None:
        """Write the lists as a file that plain faiss opens."""
        self.lists.write(path)

    def _probe(self, queries_QD: FloatArray, probes: int) -> IdArray:
        turned, params = turn_queries(queries_QD, self.lists.codebook), follow_graph(self.lists.centroids, probes)
        return self.lists.centroids.search(turned, probes, params=params)[1]

    def _cut_list(self, cell: int, places_n: NDArray[np.int64] | None) -> Iterator[tuple[IdArray, CodeArray]]:
        """Yield the ids and codes of a list, or of the rows chosen of it, so many at a time."""
        index, (first, last) = self.lists.index, self.lists.offsets[cell : cell + 2]
        if first == last:
            return
        ids_n, codes = faiss.rev_swig_ptr(index.invlists.get_ids(cell), int(last - first)), read_codes(index, cell)
        if places_n is not None:
            own = slice(*np.searchsorted(places_n, (first, last)))
            ids_n, codes = ids_n[places_n[own] - first], codes[places_n[own] - first]
        for start in range(0, len(ids_n), _BLOCK_ROWS):
            yield ids_n[start : start + _BLOCK_ROWS], codes[start : start + _BLOCK_ROWS]

    def _face(self, cell: int, codes: CodeArray) -> Facing:
        codebook = self._unturned
        standing = codebook.stand_for(np.full(len(codes), cell), codebook.unpack(codes))
        learned_n = None if codebook.bias is None else standing.squares_n
        return Facing(standing.vectors_nD, codebook.metric, codebook.coarse[cell], learned_n)


def sweep_lists(lists: Lists) -> Lists:
    """Let lists be searched in their own order."""
    assert isinstance(lists, FaissLists) and lists.codebook.kind not in UNSWEPT, type(lists)
    return SweptLists(lists)


def group_queries(cells_QP: IdArray) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield every list that is probed, in order, and which queries probe it.

    Shapes: (Q, P), -1 where there is no list -> (q,) int64, ascending.
    """
    order_n = np.argsort(cells_QP, axis=None, kind="stable")
    sorted_n = cells_QP.ravel()[order_n]
    starts = np.flatnonzero(np.diff(sorted_n, prepend=-2))
    for queries_q, start in zip(np.split(order_n // max(1, cells_QP.shape[1]), starts[1:]), starts, strict=False):
        if sorted_n[start] >= 0:
            yield int(sorted_n[start]), queries_q


def keep_nearest(queries: int, k: int, work: Callable[[slice, Nearest], None]) -> tuple[FloatArray, IdArray]:
    """Let threads share queries, as many as faiss has by default, and give what each of them kept.

    Args:
        queries: how many.
        k: neighbours of each.
        work: shows rows to some queries.

    Shapes: -> distances (Q, k) float32, ids (Q, k) int64.
    """
    threads = max(1, min(faiss.omp_get_max_threads(), queries))
    edges = [queries * part // threads for part in range(threads + 1)]
    parts = [slice(*ends) for ends in itertools.pairwise(edges)]
    kept = [Nearest(part.stop - part.start, k) for part in parts]
    if threads == 1:
        work(parts[0], kept[0])
    else:
        # Each of them works alone: left to itself it would start as many threads again.
        with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, parts, kept))
    distances, ids = zip(*(nearest.take() for nearest in kept), strict=True)
    return np.concatenate(distances), np.concatenate(ids)


def rank_kept(
    queries_QD: FloatArray, stores: Sequence[VectorStore], k: int, metric: str = "l2", chosen_n: IdArray | None = None
) -> tuple[FloatArray, IdArray]:
    """Give the k nearest of all kept vectors to each query, or of those with the ids chosen.

    Products of matrices find a few more than are wanted; these are measured one by one, without what products round
    off, and ordered by distance and id.

    Shapes: (Q, D) -> distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
    """
    centre_D = queries_QD.mean(0) if len(queries_QD) else np.zeros(queries_QD.shape[1], np.float32)

    def work(part: slice, nearest: Nearest) -> None:
        queries_q = np.arange(part.stop - part.start)
        for ids_n, rows_nD in _read_stores(stores, chosen_n):
            nearest.compare(queries_QD[part], queries_q, ids_n, Facing(rows_nD, metric, centre_D))

    ids_Qw = keep_nearest(len(queries_QD), k + _SPARE, work)[1]
    distances_Qw = measure_exactly(queries_QD, ids_Qw, stores, metric)
    merged = merge_topk([Hits(ids_Qw, distances_Qw, 1, 1)], k)
    return merged.distances, merged.ids


def _read_stores(stores: Sequence[VectorStore], chosen_n: IdArray | None) -> Iterator[tuple[IdArray, FloatArray]]:
    """Yield ids and vectors of all rows, or of those with the ids chosen, so many at a time."""
    for store in stores:
        rows_n = np.arange(len(store.ids_N)) if chosen_n is None else np.sort(store.find(chosen_n))
        rows_n = rows_n[rows_n >= 0]
        for start in range(0, len(rows_n), _BLOCK_ROWS):
            some_n = rows_n[start : start + _BLOCK_ROWS]
            yield store.ids_N[some_n], store.read(some_n)
