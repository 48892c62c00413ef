"""Search over the shards of a version in one process.

`LocalSearcher` verifies and opens shards, searches them with faiss's threads and merges. It is what a replica holds,
what `gsl search` uses on a folder, and the yardstick that the service is compared with. Every parameter travels with
the call: nothing is ever set on an index that other threads may be searching.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsl_dist.cache import Cache
from gsl_dist.codebook import Codebook, FloatArray, IdArray, Standing
from gsl_dist.errors import QueryError
from gsl_dist.filters import parse_where
from gsl_dist.hits import FAR, NO_ID, Effort, Hits, cut_within, merge_topk, show_distances
from gsl_dist.index.coarse import Probed
from gsl_dist.index.lists import Lists, join_lists, open_lists
from gsl_dist.index.manifest import Manifest, ShardEntry, open_codebook, open_version, version_folder
from gsl_dist.index.refine import VectorStore, measure_exactly, open_vectors
from gsl_dist.index.selection import Payload, Selection, find_sorted
from gsl_dist.storage import Folder
from gsl_dist.wire import check_number, check_share

MAX_K = 16_384
DEFAULT_PROBES, DEFAULT_REFINE = 16, 4
FEW_ROWS, ROWS_PER_HIT = 4096, 20
"""So few rows that a filter lets through are all measured; of more, so many are looked at for each hit wanted."""

_CHUNK_FLOATS = 1 << 24


def check_queries(queries: ArrayLike, dim: int, metric: str = "l2") -> FloatArray:
    """Give queries as a float32 matrix, or say what is wrong with them.

    Where the metric is the cosine, they are brought to length 1.

    Shapes: (Q, D), or (D,) for a single query -> (Q, D) float32, contiguous.
    Raises:
        QueryError: not numbers, of another dimension, not finite, or without a direction where that is what counts.
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
    return _bring_to_length_1(matrix) if metric == "cosine" else matrix


def _bring_to_length_1(matrix: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        row = f"only zeros in row {int(np.argmin(lengths))}"
        raise QueryError("vectors", row, "the metric is the cosine, and such a vector has no direction")
    return (matrix / lengths).astype(np.float32)


def check_effort(effort: Effort, version: Manifest) -> Effort:
    """Check what is asked for, and settle what is left open by what is usual for the version.

    Raises:
        QueryError: out of range, or a recall that was not measured.
    """
    wanted = _read_count(effort.k)
    if not 1 <= wanted <= MAX_K:
        raise QueryError("k", effort.k, f"it must be a whole number from 1 to {MAX_K}")
    if effort.where is not None:
        parse_where(effort.where)
    if effort.recall is not None:
        effort = _reach_recall(effort, wanted, version)
    lists, name = version.lists, "cells" if version.edge_count == 1 else "regions"
    # As many rows as 4 regions hold lie in about one cell of an index without lines.
    usual = DEFAULT_PROBES * max(1, version.edge_count // 4)
    reach = min(usual, lists) if effort.probes is None else _read_count(effort.probes)
    if not 1 <= reach <= lists:
        allowed = f"it must be a whole number from 1 to {lists}, the {name} of this index"
        raise QueryError("probes", effort.probes, allowed)
    refine = _check_refine(effort.refine, wanted, version)
    within = None if effort.within is None else check_number("within", effort.within)
    return Effort(wanted, reach, refine, None, effort.where, within)


def _reach_recall(effort: Effort, k: int, version: Manifest) -> Effort:
    """Give the effort of the fastest point that reaches a recall, of those measured for the next larger k."""
    wanted = check_share(effort.recall)
    if effort.probes is not None or effort.refine is not None:
        raise QueryError("recall", wanted, "it stands for probes and refine: give it without them")
    if not version.points:
        raise QueryError("recall", wanted, f"nothing was measured for version {version.version}: run gsl tune")
    measured = sorted({point.k for point in version.points})
    nearest = next((count for count in measured if count >= k), measured[-1])
    points = [point for point in version.points if point.k == nearest]
    reaching = [point for point in points if point.recall >= wanted]
    if not reaching:
        best = max(point.recall for point in points)
        raise QueryError("recall", wanted, f"the most that was measured for {nearest} neighbours is {best:.3f}")
    point = min(reaching, key=lambda point: point.latency_ms)
    return effort._replace(probes=point.probes, refine=max(1, min(point.refine, MAX_K // k)))


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
        payload: what filters look at; None where there are none.
        stores: their vectors, where the version keeps them.
    """

    manifest: Manifest
    codebook: Codebook
    lists: Lists
    shards: tuple[str, ...]
    payload: Payload | None = None
    stores: tuple[VectorStore, ...] = ()

    def search(  # noqa: PLR0913 - what a query may ask for
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        probes: int | None = None,
        refine: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        within: float | None = None,
    ) -> Hits:
        """Give the k nearest items of each query among the shards held here.

        Args:
            queries: vectors of the index's dimension.
            k: neighbours wanted for each.
            probes: lists to look into, cells or regions; by default 16 cells, or all if there are fewer.
            refine: candidates for each hit, ranked again by exact distances; by default 4 where vectors are kept.
            recall: the share of true neighbours to find, instead of probes and refine, as `gsl tune` measured.
            where: which items may be hits, by payload columns and `id` (`gsl_dist.filters`).
            within: how far off a hit may be: at most, or at least where larger is nearer.

        Shapes: queries (Q, D) or (D,) -> ids (Q, k) int64, distances (Q, k) float32: squared L2; inner products or
            cosines, the largest first, where these are the metric.
        Raises:
            QueryError: queries, k, probes, refine, recall or where cannot be answered.
        """
        matrix = check_queries(queries, self.codebook.dim, self.codebook.metric)
        effort = check_effort(Effort(k, probes, refine, recall, where, within), self.manifest)
        return cut_within(show_distances(self.find(matrix, effort), self.codebook.metric), within, self.codebook.metric)

    def find(self, queries: FloatArray, effort: Effort, probed: Probed | None = None) -> Hits:
        """Search with queries and effort that were checked; of distances, smaller is nearer whatever the metric.

        Args:
            queries: of the dimension, and of length 1 where the metric is the cosine.
            effort: settled by `check_effort`.
            probed: the lists to look into, if they were found before.

        Raises:
            QueryError: the filter asks for what the payload does not have.
        """
        # Puts items at equal distances in the order of their ids, as merging the answers of replicas does.
        return merge_topk([self.gather(queries, effort, probed)], effort.k)

    def gather(self, queries: FloatArray, effort: Effort, probed: Probed | None = None) -> Hits:
        """Search as `find` does, for whoever merges answers: items at equal distances are in any order.

        Raises:
            QueryError: the filter asks for what the payload does not have.
        """
        k, probes, refine, _, where, _ = effort
        assert probes is not None and refine is not None, "both were settled"
        if where is not None:
            assert self.payload is not None, "opened without what filters look at"
            distances, ids = self._find_chosen(queries, k * refine, probes, self.payload.select(where))
        else:
            rest = None if self.payload is None else self.payload.rest
            distances, ids = self.lists.search(queries, k * refine, probes, rest, probed=probed)
        if refine > 1:
            distances = measure_exactly(queries, ids, self.stores, self.codebook.metric)
        found = Hits(ids, distances, len(self.shards), len(self.manifest.shards), self.manifest.version)
        return merge_topk([found], k) if refine > 1 else found

    def _find_chosen(
        self, queries: FloatArray, wanted: int, probes: int, chosen: Selection
    ) -> tuple[FloatArray, IdArray]:
        """Give the nearest of some rows: as many as are wanted, if there are as many."""
        # What a RaBitQ code stands for is not all that lists know of a row.
        if (len(chosen) <= FEW_ROWS or len(chosen) <= wanted) and self.codebook.kind != "rabitq":
            return self._measure_chosen(queries, wanted, chosen)
        # As many chosen rows are looked at as there would be rows without a filter, a few for each that is wanted.
        lists = self.codebook.lists
        reach = min(lists, max(probes, -(-ROWS_PER_HIT * wanted * lists // max(1, len(chosen)))))
        distances, ids = self.lists.search(queries, wanted, reach, chosen)
        short_Q = ids[:, -1] < 0
        if reach < lists and short_Q.any():
            distances[short_Q], ids[short_Q] = self.lists.search(queries[short_Q], wanted, lists, chosen)
        return distances, ids

    def _measure_chosen(self, queries: FloatArray, wanted: int, chosen: Selection) -> tuple[FloatArray, IdArray]:
        distances = np.full((len(queries), wanted), FAR, np.float32)
        ids = np.full((len(queries), wanted), NO_ID, np.int64)
        count = min(wanted, len(chosen))
        rows = max(1, _CHUNK_FLOATS // max(1, len(chosen)))
        for start in range(0, len(queries), rows) if count else ():
            some = slice(start, start + rows)
            found_Qn = self.codebook.measure(queries[some], chosen.standing)
            nearest_Qk = np.argpartition(found_Qn, count - 1, axis=1)[:, :count]
            distances[some, :count] = np.take_along_axis(found_Qn, nearest_Qk, axis=1)
            ids[some, :count] = chosen.ids_n[nearest_Qk]
        return distances, ids

    def recall_vectors(self, ids_n: IdArray) -> tuple[NDArray[np.bool_], FloatArray]:
        """Give which items are held here, and their vectors: those kept, or else what their codes stand for.

        Shapes: (n,) -> (n,) bool, (n, D) float32, zeros where an item is not held.
        """
        places = self.lists.places
        at_n = find_sorted(places.ids_N, ids_n)
        if self.payload is not None:
            at_n = np.where(self.payload.is_hidden(ids_n), -1, at_n)
        is_here_n, vectors_nD = at_n >= 0, np.zeros((len(ids_n), self.codebook.dim), np.float32)
        if not self.stores:
            lists_n, codes = self.lists.take(places.places_N[at_n[is_here_n]])
            vectors_nD[is_here_n] = self.codebook.decode(lists_n, self.codebook.unpack(codes))
        for store in self.stores:
            rows_n = np.where(is_here_n, store.find(ids_n), -1)
            vectors_nD[rows_n >= 0] = store.read(rows_n[rows_n >= 0])
        return is_here_n, vectors_nD

    @property
    def rows(self) -> int:
        """Give the number of items held here."""
        return self.lists.rows


def open_searcher(
    location: str,
    version: str | None = None,
    *,
    names: Sequence[str] | None = None,
    threads: int | None = None,
    cache: Cache | None = None,
) -> LocalSearcher:
    """Verify and open the shards of a version.

    Args:
        location: the index folder.
        version: its name; the promoted one if not given.
        names: the shards to open; all if not given.
        threads: faiss threads of this process; left alone if not given.
        cache: where files of a store are kept; they are fetched each time if not given.

    Raises:
        BadInput: no such version or shard.
        ArtefactError: a file is damaged or was built with another codebook.
    """
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    index = Folder(location, cache)
    manifest = open_version(index, version)
    codebook = open_codebook(index, manifest)
    entries = [shard for shard in manifest.shards if names is None or shard.name in names]
    missing = set(names or ()) - {shard.name for shard in entries}
    if missing or not entries:
        known = ", ".join(shard.name for shard in manifest.shards)
        raise QueryError("shards", sorted(missing), f"version {manifest.version} has {known}", status=404)
    folder = version_folder(index, manifest.version)
    searcher = open_shards(folder, manifest, codebook, entries)
    return replace(searcher, stores=tuple(open_store(folder, manifest, entry) for entry in entries if manifest.vectors))


def open_shards(folder: Folder, manifest: Manifest, codebook: Codebook, entries: Sequence[ShardEntry]) -> LocalSearcher:
    """Verify and open some shards of a version, and leave their vectors alone.

    Raises:
        ArtefactError: a file is damaged or was built with another codebook.
    """
    whole = join_lists([open_shard(folder, entry, codebook) for entry in entries])

    def stand(places_n: NDArray[np.int64]) -> Standing:
        lists_n, codes = whole.take(places_n)
        return codebook.stand_for(lists_n, codebook.unpack(codes))

    payload = Payload(folder, [entry.payload for entry in entries if entry.payload], lambda: whole.places, stand)
    return LocalSearcher(manifest, codebook, whole, tuple(entry.name for entry in entries), payload)


def open_shard(folder: Folder, entry: ShardEntry, codebook: Codebook) -> Lists:
    """Verify and open the lists of a shard.

    Raises:
        ArtefactError: the file is damaged or was built with another codebook.
    """
    with folder.held(entry.index) as path:
        return open_lists(path, codebook)


def open_store(folder: Folder, manifest: Manifest, entry: ShardEntry) -> VectorStore:
    """Verify and map the vectors of a shard.

    Raises:
        ArtefactError: the file is damaged.
    """
    assert entry.vectors is not None and manifest.vectors is not None, entry.name
    with folder.held(entry.vectors) as path:
        return open_vectors(path, entry.rows, manifest.dim, manifest.vectors)
