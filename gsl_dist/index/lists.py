"""The lists that codes of every kind are searched in: those of faiss, or those of regions (`gsl_dist.index.vlq`).

Whoever builds, opens or searches a shard comes through here and need not know which they are. A shard is a file of its
lists; in memory the lists of all shards of a process are one.
"""

# Shapes: N rows, D dims, Q queries, k neighbours

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import faiss

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.index import vlq
from gsl_dist.index.shards import (
    CoarseSearch,
    CodeLayout,
    create_shard,
    fill_shard,
    join_shards,
    read_distances,
    read_lists,
    read_shard,
    turn_queries,
    write_shard,
)

_TABLE_BYTES = 256 << 20
# Candidates that the search of a graph keeps: the nearest cells are among them for 99 of 100 queries and more.
_WIDTHS_PER_PROBE, _LEAST_WIDTH = 2, 64


class Lists(Protocol):
    """Codes of one codebook, list by list."""

    @property
    def rows(self) -> int:
        """Give the number of rows."""

    def search(self, queries_QD: FloatArray, k: int, probes: int) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in the `probes` lists that come first.

        Shapes: (Q, D) -> squared distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """

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
    def linked(self) -> bool:
        """Tell whether cells are found through an HNSW graph."""
        return isinstance(faiss.downcast_index(self.index.quantizer), faiss.IndexHNSW)

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return int(self.index.ntotal)

    def search(self, queries_QD: FloatArray, k: int, probes: int) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in its `probes` nearest cells.

        Shapes: (Q, D) -> squared distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """
        turned, params = turn_queries(queries_QD, self.codebook), faiss.SearchParametersIVF(nprobe=probes)
        if self.linked:
            width = _WIDTHS_PER_PROBE * probes + _LEAST_WIDTH
            # Kept here as well: faiss holds no more than a pointer.
            params.quantizer_params = followed = faiss.SearchParametersHNSW(efSearch=width)
            params.referenced_objects = [followed]
        answered, ids = self.index.search(turned, k, params=params)
        return read_distances(answered, ids, queries_QD, self.codebook), ids

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), cells (N,) and packed codes (N, code_bytes), in list order."""
        return read_lists(self.index)

    def write(self, path: Path) -> None:
        """Write the lists as a file that plain faiss opens."""
        write_shard(self.index, self.codebook, path)


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
    if codebook.residual and codebook.kind == "pq" and table_bytes <= _TABLE_BYTES:
        whole.use_precomputed_table = 1
        whole.precompute_table()
    return first
