"""The lists that codes of every kind are searched in: those of faiss, or those of regions (`gsl_dist.index.vlq`).

Whoever builds, opens or searches a shard comes through here and need not know which they are. A shard is a file of its
lists; in memory the lists of all shards of a process are one.
"""

# Shapes: N rows, D dims, Q queries, k neighbours

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.hits import FAR, NO_ID
from gsl_dist.index import vlq
from gsl_dist.index.coarse import Probed, follow_graph, search_probed
from gsl_dist.index.selection import Places, Selection
from gsl_dist.index.shards import (
    CoarseSearch,
    CodeLayout,
    create_shard,
    fill_shard,
    join_shards,
    read_codes,
    read_distances,
    read_ids,
    read_lists,
    read_shard,
    turn_queries,
    write_shard,
)

_TABLE_BYTES = 256 << 20
_UNSELECTED = ("rq", "lsq")
"""Kinds whose lists faiss cannot search for some rows only."""


class Lists(Protocol):
    """Codes of one codebook, list by list."""

    @property
    def rows(self) -> int:
        """Give the number of rows."""

    @property
    def places(self) -> Places:
        """Give where each row is, by id; made when it is first asked for, and kept."""

    def search(
        self,
        queries_QD: FloatArray,
        k: int,
        probes: int,
        chosen: Selection | None = None,
        *,
        probed: Probed | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in the `probes` lists that come first, among those chosen.

        Which lists come first is found here, unless it is told. Distances are squared; where the metric is the inner
        product, they are its negative.

        Shapes: (Q, D) -> distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """

    def take(self, places_n: NDArray[np.int64]) -> tuple[IdArray, CodeArray]:
        """Give the lists (n,) and packed codes (n, code_bytes) of rows by their numbers in list order."""

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), lists (N,) and packed codes (N, code_bytes), in list order."""

    def write(self, path: Path) -> None:
        """Write the lists as one file."""


@dataclass(frozen=True)
class FaissLists:
    """Lists that faiss searches.

    Args:
        index: the lists; what turns queries is not in it.
        codebook: theirs.
    """

    index: faiss.IndexIVF
    codebook: Codebook

    @cached_property
    def centroids(self) -> faiss.Index:
        """Give what finds cells."""
        return faiss.downcast_index(self.index.quantizer)

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return int(self.index.ntotal)

    @cached_property
    def offsets(self) -> IdArray:
        """Give the number of the first row of each cell, and of all rows (C + 1,)."""
        sizes = [self.index.invlists.list_size(cell) for cell in range(self.index.nlist)]
        return np.cumsum([0, *sizes], dtype=np.int64)

    @cached_property
    def places(self) -> Places:
        """Give where each row is, by id."""
        return Places.of(read_ids(self.index))

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
        if chosen is not None and self.codebook.kind in _UNSELECTED:
            return self._measure_lists(queries_QD, k, probes, chosen)
        turned = turn_queries(queries_QD, self.codebook)
        params = look_into(probes) if chosen is None else faiss.SearchParametersIVF(nprobe=probes, sel=chosen.selector)
        if probed is not None and probed.lists.shape[1] == probes:
            answered, ids = search_probed(self.index, turned, k, probed, params)
            return read_distances(answered, ids, queries_QD, self.codebook), ids
        if (followed := follow_graph(self.centroids, probes)) is not None:
            params = faiss.SearchParametersIVF(nprobe=probes, sel=params.sel, quantizer_params=followed)
            # Kept here as well: faiss holds no more than a pointer.
            params.referenced_objects = [followed]
        answered, ids = self.index.search(turned, k, params=params)
        return read_distances(answered, ids, queries_QD, self.codebook), ids

    def _measure_lists(
        self, queries_QD: FloatArray, k: int, probes: int, chosen: Selection
    ) -> tuple[FloatArray, IdArray]:
        """Decode what was chosen of each query's lists, as faiss decodes all of them, and measure it."""
        distances_Qk, ids_Qk = np.full((len(queries_QD), k), FAR, np.float32), np.full((len(queries_QD), k), NO_ID)
        order_n = np.argsort(chosen.places_n)
        starts = np.searchsorted(chosen.places_n[order_n], self.offsets)
        turned = turn_queries(queries_QD, self.codebook)
        _, cells_QP = self.centroids.search(turned, probes, params=follow_graph(self.centroids, probes))
        for row, cells_P in enumerate(cells_QP):
            found_n = np.concatenate([order_n[starts[cell] : starts[cell + 1]] for cell in cells_P if cell >= 0])
            if len(found_n) == 0:
                continue
            lists_n, codes = self.take(chosen.places_n[found_n])
            standing = self.codebook.stand_for(lists_n, self.codebook.unpack(codes))
            far_n = self.codebook.measure(queries_QD[row : row + 1], standing)[0]
            nearest_k = np.argsort(far_n, kind="stable")[:k]
            distances_Qk[row, : len(nearest_k)] = far_n[nearest_k]
            ids_Qk[row, : len(nearest_k)] = chosen.ids_n[found_n[nearest_k]]
        return distances_Qk, ids_Qk

    def take(self, places_n: NDArray[np.int64]) -> tuple[IdArray, CodeArray]:
        """Give the cells (n,) and packed codes (n, code_bytes) of rows by their numbers in list order."""
        cells_n = np.searchsorted(self.offsets, places_n, side="right") - 1
        codes = np.empty((len(places_n), self.codebook.code_bytes), np.uint8)
        order_n = np.argsort(cells_n, kind="stable")
        starts = np.flatnonzero(np.diff(cells_n[order_n], prepend=-1))
        for own_n in np.split(order_n, starts[1:]) if len(starts) else ():
            cell = int(cells_n[own_n[0]])
            codes[own_n] = read_codes(self.index, cell)[places_n[own_n] - self.offsets[cell]]
        return cells_n, codes

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), cells (N,) and packed codes (N, code_bytes), in list order."""
        return read_lists(self.index)

    def write(self, path: Path) -> None:
        """Write the lists as a file that plain faiss opens."""
        write_shard(self.index, self.codebook, path)


@lru_cache(maxsize=64)
def look_into(probes: int) -> faiss.SearchParametersIVF:
    """Give the parameters of a search in so many lists; nobody changes them, so that they are made once."""
    return faiss.SearchParametersIVF(nprobe=probes)


def name_file(shard: str, codebook: Codebook) -> str:
    """Give the name of a shard's file."""
    return f"{shard}.{'lines' if codebook.kind == 'vlq' else 'faiss'}"


def make_lists(
    codebook: Codebook,
    ids_N: IdArray,
    lists_N: IdArray,
    codes: CodeArray,
    coarse_search: CoarseSearch = "flat",
    code_layout: CodeLayout = "plain",
) -> Lists:
    """Put codes into their lists, which a query finds as `coarse_search` says and scans as `code_layout` says.

    Shapes: ids_N, lists_N (N,) int64; codes (N, code_bytes) uint8, packed.
    Raises:
        DataError: two rows have the same id, an id is negative, or a list is out of range.
    """
    if codebook.kind == "vlq":
        return vlq.make_lists(codebook, ids_N, lists_N, codes)
    index = create_shard(codebook, coarse_search, code_layout)
    fill_shard(index, ids_N, lists_N, codes)
    return FaissLists(index, codebook)


def open_lists(path: Path, codebook: Codebook) -> Lists:
    """Open the file of a shard whose checksum was verified, and check that it has this codebook.

    Raises:
        ArtefactError: it is no shard of this codebook's kind, or was built with another codebook.
    """
    if codebook.kind == "vlq":
        return vlq.open_lists(path, codebook)
    return FaissLists(read_shard(path, codebook), codebook)


def join_lists(shards: Sequence[Lists]) -> Lists:
    """Join the lists of shards with one codebook; what was joined is not to be used again.

    Product codes of residuals also get faiss's table of what cells and codewords have to do with each other, where it
    is small.
    """
    first, *others = shards
    if isinstance(first, vlq.LineLists):
        return vlq.join_lists(cast("Sequence[vlq.LineLists]", shards))
    assert isinstance(first, FaissLists), type(first)
    codebook, whole = first.codebook, first.index
    for shard in cast("Sequence[FaissLists]", others):
        join_shards(whole, shard.index)
    table_bytes = codebook.cells * codebook.sub_vectors * codebook.codewords * 4
    is_used = codebook.residual and codebook.kind == "pq" and codebook.metric != "ip"
    if is_used and table_bytes <= _TABLE_BYTES:
        whole.use_precomputed_table = 1
        whole.precompute_table()
    return first
