"""Search over the shards of a version in one process.

`LocalSearcher` verifies and opens shards, searches them with faiss's threads and merges. It is what a replica holds,
what `gsl search` uses on a folder, and the yardstick that the service is compared with. Every parameter travels with
the call: nothing is ever set on an index that other threads may be searching.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import ArrayLike

from gsl_dist.codebook import Codebook, FloatArray
from gsl_dist.errors import QueryError
from gsl_dist.hits import Effort, Hits, merge_topk
from gsl_dist.index.lists import Lists, join_lists, open_lists
from gsl_dist.index.manifest import Manifest, ShardEntry, open_codebook, open_version, version_folder
from gsl_dist.index.refine import VectorStore, measure_exactly, open_vectors
from gsl_dist.storage import Folder

MAX_K = 16_384
DEFAULT_PROBES, DEFAULT_REFINE = 16, 4


def check_queries(queries: ArrayLike, dim: int) -> FloatArray:
    """Give queries as a float32 matrix, or say what is wrong with them.

    Shapes: (Q, D), or (D,) for a single query -> (Q, D) float32, contiguous.
    Raises:
        QueryError: not numbers, of another dimension, or not finite.
    """
    try:
        given = np.asarray(queries)
    except ValueError:
        given = np.empty(0, object)  # rows of different lengths
    # NumPy would read the string "1", True and None as numbers.
    if given.dtype.kind not in "fiu":
        raise QueryError("vectors", type(queries).__name__, f"they must be rows of {dim} numbers each")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        matrix = np.ascontiguousarray(given, dtype=np.float32)
    matrix = matrix[None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise QueryError("vectors", f"shape {matrix.shape}", f"the index holds vectors of {dim} numbers")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise QueryError(
            "vectors", f"row {int(np.argmin(finite))}", "every number must be finite (no NaN, no infinity)"
        )
    return matrix


def check_effort(effort: Effort, version: Manifest) -> Effort:
    """Check what is asked for, and settle what is left open by what is usual for the version.

    Raises:
        QueryError: out of range.
    """
    k, probes, refine = effort
    wanted = _read_count(k)
    if not 1 <= wanted <= MAX_K:
        raise QueryError("k", k, f"it must be a whole number from 1 to {MAX_K}")
    lists, name = version.lists, "cells" if version.edge_count == 1 else "regions"
    # As many rows as 4 regions hold lie in about one cell of an index without lines.
    usual = DEFAULT_PROBES * max(1, version.edge_count // 4)
    reach = min(usual, lists) if probes is None else _read_count(probes)
    if not 1 <= reach <= lists:
        raise QueryError("probes", probes, f"it must be a whole number from 1 to {lists}, the {name} of this index")
    return Effort(wanted, reach, _check_refine(refine, wanted, version))


def _check_refine(refine: int | None, k: int, version: Manifest) -> int:
    if refine is None:
        return min(DEFAULT_REFINE, MAX_K // k) if version.vectors else 1
    factor = _read_count(refine)
    if factor > 1 and not version.vectors:
        raise QueryError("refine", refine, "this version keeps no vectors to rank by: it was built without `vectors`")
    if not 1 <= factor <= MAX_K // k:
        raise QueryError("refine", refine, f"it must be a whole number from 1 to {MAX_K // k} where k is {k}")
    return factor


def _read_count(value: Any) -> int:
    # True would pass for 1, and faiss takes no NumPy integer.
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


@dataclass(frozen=True)
class LocalSearcher:
    """Shards of one version, open in this process as one set of lists.

    All shards share their cells and codewords, so their lists are joined when they are opened: a query then chooses its
    cells and computes its tables once, not once a shard.

    Args:
        manifest: the version.
        codebook: its codebook.
        lists: the joined lists of the shards.
        shards: the names of the shards held here.
        stores: their vectors, where the version keeps them.
    """

    manifest: Manifest
    codebook: Codebook
    lists: Lists
    shards: tuple[str, ...]
    stores: tuple[VectorStore, ...] = ()

    def search(self, queries: ArrayLike, k: int = 10, *, probes: int | None = None, refine: int | None = None) -> Hits:
        """Give the k nearest items of each query among the shards held here.

        Args:
            queries: vectors of the index's dimension.
            k: neighbours wanted for each.
            probes: lists to look into, cells or regions; by default 16 cells, or all if there are fewer.
            refine: candidates for each hit, ranked again by exact distances; by default 4 where vectors are kept.

        Shapes: queries (Q, D) or (D,) -> ids (Q, k) int64, distances (Q, k) float32.
        Raises:
            QueryError: queries, k, probes or refine are out of range.
        """
        matrix = check_queries(queries, self.codebook.dim)
        wanted, reach, factor = check_effort(Effort(k, probes, refine), self.manifest)
        assert reach is not None and factor is not None, "both were settled"
        return self.search_checked(matrix, wanted, reach, factor)

    def search_checked(self, queries: FloatArray, k: int, probes: int, refine: int = 1) -> Hits:
        """Search without looking at the arguments again."""
        distances, ids = self.lists.search(queries, k * refine, probes)
        if refine > 1:
            distances = measure_exactly(queries, ids, self.stores)
        found = Hits(ids, distances, len(self.shards), len(self.manifest.shards), self.manifest.version)
        # Puts items at equal distances in the order of their ids, as merging the answers of replicas does.
        return merge_topk([found], k)

    @property
    def rows(self) -> int:
        """Give the number of items held here."""
        return self.lists.rows


def open_searcher(
    location: str, version: str | None = None, *, names: Sequence[str] | None = None, threads: int | None = None
) -> LocalSearcher:
    """Verify and open the shards of a version.

    Args:
        location: the index folder.
        version: its name; the promoted one if not given.
        names: the shards to open; all if not given.
        threads: faiss threads of this process; left alone if not given.

    Raises:
        BadInput: no such version or shard.
        ArtefactError: a file is damaged or was built with another codebook.
    """
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    index = Folder(location)
    manifest = open_version(index, version)
    codebook = open_codebook(index, manifest)
    entries = [shard for shard in manifest.shards if names is None or shard.name in names]
    missing = set(names or ()) - {shard.name for shard in entries}
    if missing or not entries:
        known = ", ".join(shard.name for shard in manifest.shards)
        raise QueryError("shards", sorted(missing), f"version {manifest.version} has {known}", status=404)
    folder = version_folder(index, manifest.version)
    whole = join_lists([_open_shard(folder, entry, codebook) for entry in entries])
    stores = tuple(_open_vectors(folder, entry, manifest) for entry in entries if manifest.vectors)
    return LocalSearcher(manifest, codebook, whole, tuple(entry.name for entry in entries), stores)


def _open_shard(folder: Folder, entry: ShardEntry, codebook: Codebook) -> Lists:
    folder.check(entry.index)
    with folder.local(entry.index.name) as path:
        return open_lists(path, codebook)


def _open_vectors(folder: Folder, entry: ShardEntry, manifest: Manifest) -> VectorStore:
    assert entry.vectors is not None and manifest.vectors is not None, entry.name
    folder.check(entry.vectors)
    with folder.local(entry.vectors.name) as path:
        return open_vectors(path, entry.rows, manifest.dim, manifest.vectors)
