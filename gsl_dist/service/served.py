"""One version as it is served: a query goes to its parts at once, the answers become one.

What a query is answered from is one `Served`: the version, the links to its parts, and what was written over it. A part
that does not answer in time is left out, and the answer says which shards that were. Nothing is ever asked twice for
one query but the copies of a part (`gsl_dist.service.links`).

This module knows nothing of Ray or HTTP. Everything here runs on one event loop, the one that owns the connections.
"""

# Shapes: Q queries, D dims, k neighbours, R lists

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import GslError, QueryError, ShardUnavailable
from gsl_dist.hits import Effort, Hits, cut_within, merge_topk, show_distances
from gsl_dist.index.coarse import CoarseStep, Probed
from gsl_dist.index.manifest import Manifest
from gsl_dist.index.overlay import Overlay
from gsl_dist.index.search import check_effort
from gsl_dist.service.frames import Ask
from gsl_dist.service.gather import Gatherer
from gsl_dist.service.links import Copies, Fleet, find_owners, name_shards
from gsl_dist.service.meters import Meters
from gsl_dist.wire import pack_query, pack_table, unpack_hits, unpack_table

_FEW_FLOATS, _FEW_PRODUCTS = 1 << 18, 1 << 24


class Served:
    """One version as it is served.

    Args:
        manifest: the version.
        overlay: what was written over it.
        coarse: finds the lists of a query for all replicas; None: each finds them for itself.
        fleet: the replicas.
        meters: count what happens.
    """

    def __init__(
        self, manifest: Manifest, overlay: Overlay, coarse: CoarseStep | None, fleet: Fleet, meters: Meters
    ) -> None:
        self.manifest, self.overlay, self._coarse, self._fleet, self._meters = manifest, overlay, coarse, fleet, meters
        self._changes: tuple[int, list[bytes]] = -1, []
        self.copies = fleet.link(manifest, self.changes)
        self._gatherer = Gatherer(self._search_few, fleet.hands * fleet.copies, functools.partial(meters.note, "queue"))
        self._owners_R: IdArray | None = None
        self._is_dealt = coarse is not None
        self.users = 0

    @property
    def is_connected(self) -> bool:
        """Tell whether every part can be asked."""
        return all(part.is_connected for part in self.copies)

    def find(self) -> None:
        """Let every link look for its replica."""
        for part in self.copies:
            for link in part.links:
                link.find()

    def close(self) -> None:
        """Hang up everywhere."""
        for part in self.copies:
            for link in part.links:
                link.close()

    @property
    def refusal(self) -> GslError | None:
        """Give why a replica would not open its shards, if one said so."""
        return next((link.refusal for part in self.copies for link in part.links if link.refusal), None)

    async def search(
        self,
        queries_QD: FloatArray,
        effort: Effort,
        *,
        require_all: bool = False,
        timeout_s: float | None = None,
        everywhere: bool = False,
    ) -> Hits:
        """Give the nearest items of each query among the shards that answer in time, as users see them.

        Where each list lies in one part alone, as by cell, those are asked that hold what the queries look into: the
        others have nothing to say, whether they live or not.

        Args:
            queries_QD: as `check_queries` gives them.
            effort: how many, which, and how hard to look.
            require_all: raise instead of leaving shards out.
            timeout_s: how long the caller waits; by default, and at most, what the fleet is given.
            everywhere: ask all parts, to see which of them answer.

        Shapes: (Q, D) -> ids (Q, k) int64, distances (Q, k) float32.
        Raises:
            QueryError: the effort cannot be made.
            ShardUnavailable: no shard answered, or one did not and all are required.
        """
        effort = check_effort(effort, self.manifest)
        if len(queries_QD) == 1 and timeout_s is None and effort.where is None and not everywhere:
            found = await self._gatherer.search(queries_QD, effort)
        else:
            patience_s = min(timeout_s or self._fleet.timeout_s, self._fleet.timeout_s)
            found = await self._search(queries_QD, effort, patience_s, everywhere=everywhere)
        if not found.absent:
            return found.near
        missing, total = found.missing, len(self.manifest.shards)
        if require_all or len(found.absent) == len(found.asked):
            raise ShardUnavailable(list(missing), total)
        return replace(found.near, shards_answered=total - len(missing), missing=missing)

    async def _search(
        self, queries_QD: FloatArray, effort: Effort, patience_s: float, *, everywhere: bool = False
    ) -> Found:
        start, metric = time.perf_counter(), self.manifest.metric
        probed = await self._find_lists(queries_QD, effort)
        body = pack_query(queries_QD, effort._replace(within=None), probed, patience_s)
        asked = self._meters.note("coarse", start)
        parts = self.copies if everywhere else self._choose_parts(probed)
        answers = await _ask_all(parts, Ask.SEARCH, body, patience_s - (asked - start))
        answered = self._meters.note("fanout", asked)
        absent = _find_absent(parts, answers)
        found = [unpack_hits(answer) for answer in answers if answer is not None]
        if self.overlay.rows or not found:
            found.append(await self._search_new(queries_QD, effort))
        near = merge_topk(found, effort.k)
        total = len(self.manifest.shards)
        whole = Hits(near.ids, near.distances, total, total, self.manifest.version)
        shown = cut_within(show_distances(whole, metric), effort.within, metric)
        self._meters.note("merge", answered)
        return Found(shown, probed, parts, absent)

    async def _search_few(self, queries_QD: FloatArray, effort: Effort) -> list[Found]:
        """Answer queries together, each as if it had been alone: what it does not need it does not miss."""
        found = await self._search(queries_QD, effort, self._fleet.timeout_s)
        return [self._take_row(found, row) for row in range(len(queries_QD))] if len(queries_QD) > 1 else [found]

    def _take_row(self, found: Found, row: int) -> Found:
        ids, distances = found.near.ids[row : row + 1], found.near.distances[row : row + 1]
        near = replace(found.near, ids=ids, distances=distances)
        if not found.absent or found.probed is None:
            return Found(near, None, found.asked, found.absent)
        own = self._choose_parts(found.probed.take_row(row))
        return Found(near, None, own, [part for part in own if part in found.absent])

    async def fetch(
        self, ids_n: IdArray, columns: Sequence[str], *, vectors: bool = False, require_all: bool = True
    ) -> Fetched:
        """Give columns, and vectors if asked for, of items by their ids; what no part has stays null.

        Shapes: (n,) -> n rows; vectors (n, D).
        Raises:
            QueryError: there is no such column.
            ShardUnavailable: a part does not answer, and all are required.
        """
        for name in columns:
            if name not in self.overlay.schema.names:
                known = ", ".join(self.overlay.schema.names)
                raise QueryError("payload", name, f"the columns of this version are {known}")
        wanted, at_n = np.unique(ids_n, return_inverse=True)
        told = {"columns": "\n".join(columns)} | ({"vectors": "1"} if vectors else {})
        body = pack_table(pa.table({"id": wanted}).replace_schema_metadata(told))
        answers = await _ask_all(self.copies, Ask.FETCH, body, self._fleet.timeout_s)
        absent = _find_absent(self.copies, answers)
        if absent and require_all:
            raise ShardUnavailable(list(name_shards(absent)), len(self.manifest.shards))
        own = self.overlay.fetch(wanted, columns)
        parts = [unpack_table(answer) for answer in answers if answer is not None]
        return _pick(len(wanted), own, parts, columns, self.manifest.dim).take(at_n)

    async def tell(self, tables: Sequence[pa.Table]) -> None:
        """Tell every part of changes; one that is not there now is told of all when it is."""
        for table in tables:
            body = pack_table(table)
            await asyncio.gather(*(part.tell(body) for part in self.copies))

    def changes(self) -> tuple[int, list[bytes]]:
        """Give all that whoever opens the version's rows must be told, and the last commit in it."""
        if self._changes[0] != self.overlay.seq:
            self._changes = self.overlay.seq, [pack_table(table) for table in self.overlay.changes()]
        return self._changes

    def _choose_parts(self, probed: Probed | None) -> list[Copies]:
        """Give the parts that have rows in lists that are looked into, and one of all if none has."""
        if self._is_dealt and self._owners_R is None and all(part.held is not None for part in self.copies):
            self._owners_R = find_owners(self.copies, self.manifest.lists)
            self._is_dealt = self._owners_R is not None
        if probed is None or self._owners_R is None:
            return self.copies
        places = np.unique(self._owners_R[probed.lists[probed.lists >= 0]])
        return [self.copies[place] for place in places.tolist() if place >= 0] or self.copies[:1]

    async def _find_lists(self, matrix: FloatArray, effort: Effort) -> Probed | None:
        """Find the lists that queries look into; with a filter each replica finds its own, it may need more."""
        assert effort.probes is not None, "it was settled"
        if self._coarse is None or effort.where is not None:
            return None
        if len(matrix) * self.manifest.cells * self.manifest.dim <= _FEW_PRODUCTS:
            return self._coarse.probe(matrix, effort.probes)
        # A batch would hold up the loop, and with it every other query.
        return await asyncio.get_running_loop().run_in_executor(None, self._coarse.probe, matrix, effort.probes)

    async def _search_new(self, matrix: FloatArray, effort: Effort) -> Hits:
        if len(matrix) * self.overlay.rows * self.manifest.dim <= _FEW_FLOATS and effort.where is None:
            return self.overlay.search(matrix, effort)
        return await asyncio.get_running_loop().run_in_executor(None, self.overlay.search, matrix, effort)


@dataclass(frozen=True)
class Found:
    """What the parts that answered have near some queries.

    Args:
        near: the hits, as if every shard had answered.
        probed: the lists that were looked into, where the router found them.
        asked: the parts that were asked.
        absent: those of them that did not answer.
    """

    near: Hits
    probed: Probed | None
    asked: Sequence[Copies]
    absent: Sequence[Copies]

    @property
    def missing(self) -> tuple[str, ...]:
        """Give the shards that no copy answered for."""
        return name_shards(self.absent)


@dataclass(frozen=True)
class Fetched:
    """What is known of some items.

    Shapes: is_here_n (n,); vectors_nD (n, D) float32; table n rows.
    """

    is_here_n: NDArray[np.bool_]
    vectors_nD: FloatArray
    table: pa.Table

    def take(self, at_n: NDArray[np.integer]) -> Fetched:
        """Give some of them."""
        table = self.table.take(pa.array(at_n)) if self.table.num_columns else self.table
        return Fetched(self.is_here_n[at_n], self.vectors_nD[at_n], table)


async def _ask_all(parts: Sequence[Copies], kind: Ask, body: bytes, timeout_s: float) -> list[bytes | None]:
    answers = [part.ask(kind, body) for part in parts]
    done, late = await asyncio.wait(answers, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    for answer in late:
        answer.cancel()
    return [answer.result() if answer in done else None for answer in answers]


def _find_absent(parts: Sequence[Copies], answers: Sequence[bytes | None]) -> list[Copies]:
    return [part for part, answer in zip(parts, answers, strict=True) if answer is None]


def _pick(
    count: int,
    own: tuple[NDArray[np.bool_], FloatArray, pa.Table],
    parts: Sequence[pa.Table],
    columns: Sequence[str],
    dim: int,
) -> Fetched:
    """Put together what new rows and the parts know of items; each item is in one of them at most.

    Shapes: own, of n items; parts, n rows each.
    """
    is_here_n, vectors_nD, table = own[0].copy(), own[1].copy(), own[2]
    source_n, tables = np.zeros(count, np.int64), [table]
    for number, part in enumerate(parts, 1):
        here_n = part["#here"].to_numpy() & ~is_here_n
        is_here_n |= here_n
        source_n[here_n] = number
        if "#vector" in part.column_names:
            flat = part["#vector"].combine_chunks().flatten().to_numpy()
            vectors_nD[here_n] = flat.reshape(-1, dim)[here_n]
        tables.append(part.select(list(columns)).cast(table.schema))
    at_n = source_n * count + np.arange(count)
    merged = pa.concat_tables(tables).take(pa.array(at_n)) if columns else pa.table({})
    return Fetched(is_here_n, vectors_nD, merged)
