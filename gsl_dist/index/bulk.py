"""A version searched by many queries at once, in bounded memory: some of its shards in each pass.

One process need not hold a version: the shards of a pass are opened and searched for the whole batch, the nearest are
kept, and those of the next pass take their place; a version of a single pass stays open. Candidates of all passes are
put together before any is ranked by its vector, so that what is found does not depend on the passes. With filters it
may: which rows are few, and how many lists are looked into, is decided in each.

Exact search compares with all vectors that a version keeps; they are mapped, and no lists are opened.
"""

# Shapes: Q queries, D dims, k neighbours, N rows, n of them

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import FloatArray, Standing
from gsl_dist.hits import Effort, Hits, merge_topk
from gsl_dist.index.manifest import Manifest, ShardEntry, open_codebook, version_folder
from gsl_dist.index.refine import VectorStore, measure_exactly
from gsl_dist.index.search import LocalSearcher, open_shards, open_store
from gsl_dist.index.selection import Payload, Places
from gsl_dist.index.sweep import rank_kept, sweep_lists
from gsl_dist.storage import Folder

# Lists that others are moved to grow by doubling; a filter holds where every row is, and columns.
_LIST_COPIES, _FILTER_BYTES = 2, 48
# A candidate as it was found, joined with others, and put in order.
_CANDIDATE_BYTES, _PROBE_BYTES, _VECTOR_COPIES = 120, 24, 3
_TABLE_BYTES, _SCRATCH_BYTES = 256 << 20, 32 << 20


class CodedSearch:
    """Finds neighbours by codes, and ranks candidates by the vectors that the version keeps if that is asked for.

    Args:
        index: the index folder.
        manifest: the version.
        effort: settled by `check_effort`.
        passes: names of the shards that are open in each pass.
        is_swept: whether lists are searched in their own order.
    """

    def __init__(
        self, index: Folder, manifest: Manifest, effort: Effort, passes: Sequence[Sequence[str]], *, is_swept: bool
    ) -> None:
        self._folder, self._manifest, self._effort = version_folder(index, manifest.version), manifest, effort
        self._codebook, self._passes, self._is_swept = open_codebook(index, manifest), passes, is_swept

    def find(self, queries_QD: FloatArray) -> Hits:
        """Give the k nearest of all items; smaller is nearer.

        Raises:
            QueryError: the filter asks for what the payload does not have.
            ArtefactError: a file is damaged.
        """
        k, _, refine, *_ = self._effort
        assert refine is not None, "it was settled"
        wanted, best = self._effort._replace(k=k * refine, refine=1), list[Hits]()
        for names in self._passes:
            searcher = self._only if len(self._passes) == 1 else self._open(names)
            best = [merge_topk([*best, searcher.gather(queries_QD, wanted)], wanted.k)]
        [found] = best
        if refine == 1:
            return found
        distances = measure_exactly(queries_QD, found.ids, self._stores, self._manifest.metric)
        return merge_topk([replace(found, distances=distances)], k)

    @cached_property
    def _only(self) -> LocalSearcher:
        return self._open(self._passes[0])

    @cached_property
    def _stores(self) -> list[VectorStore]:
        return open_stores(self._folder, self._manifest)

    def _open(self, names: Sequence[str]) -> LocalSearcher:
        entries = [shard for shard in self._manifest.shards if shard.name in names]
        searcher = open_shards(self._folder, self._manifest, self._codebook, entries)
        return replace(searcher, lists=sweep_lists(searcher.lists)) if self._is_swept else searcher


class ExactSearch:
    """Finds neighbours by comparing with every vector that a version keeps.

    Args:
        index: the index folder.
        manifest: a version that keeps vectors.
        k: neighbours wanted.
        where: which items may be hits.
    """

    def __init__(self, index: Folder, manifest: Manifest, k: int, where: Mapping[str, Any] | None = None) -> None:
        self._manifest, self._k, self._where = manifest, k, where
        self._folder = version_folder(index, manifest.version)
        self._stores = open_stores(self._folder, manifest)

    def find(self, queries_QD: FloatArray) -> Hits:
        """Give the k nearest of all items; smaller is nearer.

        Raises:
            QueryError: the filter asks for what the payload does not have.
            ArtefactError: a file is damaged.
        """
        chosen_n = None if self._where is None else self._payload.select(self._where).ids_n
        distances, ids = rank_kept(queries_QD, self._stores, self._k, self._manifest.metric, chosen_n)
        return Hits(ids, distances, len(self._stores), len(self._manifest.shards), self._manifest.version)

    @cached_property
    def _payload(self) -> Payload:
        def place() -> Places:
            return Places.of(np.concatenate([store.ids_N for store in self._stores]))

        def stand(places_n: NDArray[np.int64]) -> Standing:
            raise AssertionError("vectors are measured, not what codes stand for")

        return Payload(self._folder, _list_payload(self._manifest.shards), place, stand)


def open_stores(folder: Folder, manifest: Manifest) -> list[VectorStore]:
    """Map the vectors of every shard of a version that keeps them.

    Raises:
        ArtefactError: a file is damaged.
    """
    return [open_store(folder, manifest, entry) for entry in manifest.shards]


def plan_passes(manifest: Manifest, effort: Effort, room_bytes: int) -> list[list[str]]:
    """Give the shards of each pass, as they follow on one another; a shard that takes more than the room is alone."""
    passes: list[list[str]] = []
    left = 0
    for shard in manifest.shards:
        size = measure_shard(shard, effort)
        if not passes or size > left:
            passes.append([])
            left = room_bytes
        passes[-1].append(shard.name)
        left -= size
    return passes


def measure_shard(shard: ShardEntry, effort: Effort) -> int:
    """Give the bytes that a shard takes while it is open: its lists, if they are looked into, and what filters hold."""
    lists = 0 if effort.probes is None else _LIST_COPIES * shard.index.bytes
    return lists + (0 if effort.where is None else _FILTER_BYTES * shard.rows)


def measure_batch(manifest: Manifest, effort: Effort, batch_rows: int) -> int:
    """Give the bytes that a batch takes: its vectors, lists and candidates, and what products and tables take."""
    candidates, probes = effort.k * (effort.refine or 1), effort.probes or 0
    row = _VECTOR_COPIES * 4 * manifest.dim + _CANDIDATE_BYTES * candidates + _PROBE_BYTES * probes
    tables = manifest.cells * manifest.sub_vectors * (1 << manifest.bits) * 4 if probes else 0
    return batch_rows * row + min(tables, _TABLE_BYTES) + _SCRATCH_BYTES


def _list_payload(entries: Sequence[ShardEntry]) -> list[Any]:
    return [entry.payload for entry in entries if entry.payload]
