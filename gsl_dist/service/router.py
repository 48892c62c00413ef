"""The router: one query goes to every part of a version at once, the answers become one.

What a query is answered from is one `Served`: the version, the links to its parts, and what was written over it. A part
that does not answer in time is left out, and the answer says which shards that were. Nothing is ever asked twice for
one query but the copies of a part (`gsl_dist.service.links`).

The `Router` knows which version is served. It makes the next one ready beside it, lets new queries go there once every
part is connected, and lets go of the old one when its last query is answered: none fails, and none is answered from
two. It writes the log, too: a write is acknowledged when it is on the disk and every part that answers knows of it.

This module knows nothing of Ray or HTTP. Everything here runs on one event loop, the one that owns the connections.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import GslError, Overloaded, QueryError, ShardUnavailable
from gsl_dist.hits import NO_ID, Effort, Hits, cut_within, merge_topk, show_distances
from gsl_dist.index.coarse import CoarseStep, Probed, open_coarse
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import Manifest, current_version, open_version, promote_version
from gsl_dist.index.overlay import Overlay, read_overlay
from gsl_dist.index.sample import Sample, read_sample
from gsl_dist.index.search import check_effort, check_queries
from gsl_dist.service.frames import Ask
from gsl_dist.service.links import Copies, Fleet, find_missing, find_owners
from gsl_dist.service.meters import Meters
from gsl_dist.storage import Folder
from gsl_dist.wire import pack_query, pack_table, unpack_hits, unpack_table

_log = logging.getLogger(__name__)

Coarse = Literal["router", "replicas"]
Asked = tuple[list[Write], asyncio.Future[int]]
"""Writes, and who waits for the number of their commit."""

_POLL_S = 0.05
_PROBED, _REMEMBERED = 4, 200
_FEW_FLOATS = 1 << 18


@dataclass(frozen=True)
class RouterConfig:
    """How a router works.

    Args:
        coarse: who finds the lists of a query: the router once for all, or each replica.
        follow_s: how often it looks which version is promoted; None: it stays with the one it began with.
        max_new_rows: rows that may lie over a version; the next ones are refused until it is compacted.
        switch_s: how long the parts of the next version may take to open.
        probe_s: how often it measures its recall, where `gsl tune` left a sample; None: never.
    """

    coarse: Coarse = "router"
    follow_s: float | None = None
    max_new_rows: int = 100_000
    switch_s: float = 300.0
    probe_s: float | None = None


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
        start = time.perf_counter()
        metric, patience_s = self.manifest.metric, min(timeout_s or self._fleet.timeout_s, self._fleet.timeout_s)
        effort = check_effort(effort, self.manifest)
        probed = await self._find_lists(queries_QD, effort)
        body = pack_query(queries_QD, effort._replace(within=None), probed, patience_s)
        asked = self._meters.note("coarse", start)
        parts = self.copies if everywhere else self._choose_parts(probed)
        answers = await _ask_all(parts, Ask.SEARCH, body, patience_s - (asked - start))
        answered = self._meters.note("fanout", asked)
        missing, total = find_missing(parts, answers), len(self.manifest.shards)
        found = [unpack_hits(answer) for answer in answers if answer is not None]
        if missing and (require_all or not found):
            raise ShardUnavailable(list(missing), total)
        if self.overlay.rows:
            found.append(await self._search_new(queries_QD, effort))
        near = merge_topk(found, effort.k)
        whole = Hits(near.ids, near.distances, total - len(missing), total, self.manifest.version, missing)
        shown = cut_within(show_distances(whole, metric), effort.within, metric)
        self._meters.note("merge", answered)
        return shown

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
        missing = find_missing(self.copies, answers)
        if missing and require_all:
            raise ShardUnavailable(list(missing), len(self.manifest.shards))
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
        if len(matrix) == 1:
            return self._coarse.probe(matrix, effort.probes)
        # A batch would hold up the loop, and with it every other query.
        return await asyncio.get_running_loop().run_in_executor(None, self._coarse.probe, matrix, effort.probes)

    async def _search_new(self, matrix: FloatArray, effort: Effort) -> Hits:
        if len(matrix) * self.overlay.rows * self.manifest.dim <= _FEW_FLOATS and effort.where is None:
            return self.overlay.search(matrix, effort)
        return await asyncio.get_running_loop().run_in_executor(None, self.overlay.search, matrix, effort)


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


class Router:
    """Answers queries from the version that is served, and takes writes over it.

    Args:
        index: the index folder.
        fleet: the replicas.
        version: the first to be served; the promoted one if not given.
        config: how it works.
        meters: count what happens.

    Raises:
        BadInput, ArtefactError: there is no such version, or it or the write log is damaged.
    """

    def __init__(
        self,
        index: str,
        fleet: Fleet,
        *,
        version: str | None = None,
        config: RouterConfig = RouterConfig(),
        meters: Meters | None = None,
    ) -> None:
        self.index, self.config, self.meters, self._fleet = Folder(index), config, meters or Meters(), fleet
        self._log = WriteLog(self.index)
        self._served = self._open(version)
        self._switching, self._writing = asyncio.Lock(), asyncio.Lock()
        self._waiting: list[Asked] = []
        self._committer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.open_requests = 0

    @property
    def manifest(self) -> Manifest:
        """Give the version that new queries are answered from."""
        return self._served.manifest

    @property
    def overlay(self) -> Overlay:
        """Give what was written over it."""
        return self._served.overlay

    def start(self) -> None:
        """Let every link look for its replica; to be called on the loop that will search."""
        self._served.find()
        self.meters.tell_version(self._served.manifest)
        if self.config.follow_s is not None:
            self._keep(self._follow(self.config.follow_s))
        if self.config.probe_s is not None:
            self._keep(self._watch_recall(self.config.probe_s))

    def close(self) -> None:
        """Hang up everywhere."""
        for task in self._tasks:
            task.cancel()
        self._served.close()

    @contextlib.contextmanager
    def hold(self) -> Iterator[Served]:
        """Give the version served now, which stays whole for as long as the block lasts."""
        served = self._served
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1

    async def search(
        self, queries: ArrayLike, effort: Effort, *, require_all: bool = False, timeout_s: float | None = None
    ) -> Hits:
        """Check queries (Q, D) or (D,), and search the version served now, as `Served.search` does.

        Raises:
            QueryError: queries or effort cannot be answered.
            ShardUnavailable: no shard answered, or one did not and all are required.
        """
        with self.hold() as served:
            matrix = check_queries(queries, served.manifest.dim, served.manifest.metric)
            return await served.search(matrix, effort, require_all=require_all, timeout_s=timeout_s)

    async def promote(self, version: str) -> Manifest:
        """Serve another version: it is made ready, queries go there, then the pointer moves.

        Raises:
            BadInput, ArtefactError: there is no such version, it is damaged, or a replica has no room for it.
            GslError: its parts were not ready in time; what was served is served on.
        """
        await self._switch(version)
        return await asyncio.to_thread(promote_version, self.index, version)

    async def write(self, writes: Sequence[Write]) -> int:
        """Write to the log and give the number of the commit; from then on queries find what was written.

        Commits wait for each other: all that comes while one is written goes into the next.

        Raises:
            QueryError: a write does not fit the version.
            Overloaded: too much lies over the version; compact it.
        """
        new = sum(write.operation == "upsert" for write in writes)
        if self.overlay.rows + new > self.config.max_new_rows:
            raise Overloaded(self.overlay.rows, 60.0)
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((list(writes), done))
        if self._committer is None or self._committer.done():
            self._committer = self._keep(self._commit())
        return int(await done)

    async def _commit(self) -> None:
        async with self._writing:
            while self._waiting:
                came, self._waiting = self._waiting, []
                waiting, writes = _check_each(came, self._served.overlay)
                if not waiting:
                    continue
                try:
                    space = self._served.manifest.space
                    seq = await asyncio.to_thread(self._log.append, writes, space)
                    # A version that takes over meanwhile reads the log anew, under the lock of commits.
                    await self._served.tell(self._served.overlay.apply(writes, seq))
                    self.meters.tell_writes(self.overlay)
                except OSError as error:
                    _settle(waiting, GslError(f"the write log cannot be written: {error}"))
                except GslError as error:
                    _settle(waiting, error)
                else:
                    _settle(waiting, seq)

    async def _switch(self, version: str) -> None:
        async with self._switching:
            if version == self.manifest.version:
                return
            coming = await asyncio.to_thread(self._open, version)
            coming.find()
            try:
                await self._await_parts(coming)
                async with self._writing:
                    await self._catch_up(coming)
                    going, self._served = self._served, coming
            finally:
                if self._served is not coming:
                    coming.close()
            _log.info("version %s is served, after %s", version, going.manifest.version)
            self.meters.tell_version(coming.manifest)
            self._keep(self._drain(going))

    async def _await_parts(self, coming: Served) -> None:
        deadline = time.monotonic() + self.config.switch_s
        while not coming.is_connected:
            if coming.refusal is not None:
                raise coming.refusal
            if time.monotonic() > deadline:
                raise GslError(f"version {coming.manifest.version} was not ready within {self.config.switch_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _catch_up(self, coming: Served) -> None:
        """Lay what was written since the version was opened over it."""
        after, space = coming.overlay.seq, coming.manifest.space
        for seq, writes in await asyncio.to_thread(lambda: list(self._log.read(after, space))):
            await coming.tell(coming.overlay.apply(coming.overlay.fit(writes), seq))

    async def _follow(self, every_s: float) -> None:
        failed = None
        while True:
            await asyncio.sleep(every_s)
            try:
                promoted = await asyncio.to_thread(current_version, self.index)
                if promoted not in (None, failed, self.manifest.version):
                    failed = promoted
                    await self._switch(str(promoted))
                    failed = None
            except (GslError, OSError) as error:
                _log.error("the promoted version cannot be served, %s stays: %s", self.manifest.version, error)

    async def _watch_recall(self, every_s: float) -> None:
        """Ask some queries whose true neighbours are known now and then, and tell the share that was found."""
        rng, sample, found = np.random.default_rng(), None, deque[float](maxlen=_REMEMBERED)
        while True:
            await asyncio.sleep(every_s)
            try:
                with self.hold() as served:
                    version = served.manifest.version
                    if sample is None or sample.truth.version != version:
                        sample = await asyncio.to_thread(read_sample, self.index, version)
                        found.clear()
                    if sample is not None:
                        found.extend(await _measure_recall(served, sample, rng))
                        self.meters.recall.labels(str(sample.truth.ids.shape[1])).set(float(np.mean(found)))
            except (GslError, OSError) as error:
                _log.warning("recall was not measured: %s", error)

    async def _drain(self, going: Served) -> None:
        while going.users:
            await asyncio.sleep(_POLL_S)
        going.close()

    def _open(self, version: str | None) -> Served:
        manifest = open_version(self.index, version)
        coarse = open_coarse(self.index, manifest) if self.config.coarse == "router" else None
        overlay = read_overlay(self.index, manifest, self._log)
        return Served(manifest, overlay, coarse, self._fleet, self.meters)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # A task that nobody refers to may be forgotten before it has ended.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _ask_all(parts: Sequence[Copies], kind: Ask, body: bytes, timeout_s: float) -> list[bytes | None]:
    answers = [part.ask(kind, body) for part in parts]
    done, late = await asyncio.wait(answers, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    for answer in late:
        answer.cancel()
    return [answer.result() if answer in done else None for answer in answers]


async def _measure_recall(served: Served, sample: Sample, rng: np.random.Generator) -> list[float]:
    rows = rng.choice(len(sample.queries_QD), size=min(_PROBED, len(sample.queries_QD)), replace=False)
    queries, truth = sample.lay_over(served.overlay, rows)
    matrix = check_queries(queries, served.manifest.dim, served.manifest.metric)
    hits = await served.search(matrix, Effort(truth.shape[1]))
    known = [(own[own != NO_ID], got) for own, got in zip(truth, hits.ids, strict=True)]
    return [float(np.isin(own, got).mean()) for own, got in known if len(own)]


def _check_each(came: Sequence[Asked], overlay: Overlay) -> tuple[list[Asked], list[Write]]:
    """Refuse what does not fit, each for itself, and give what is left, and all its writes."""
    waiting, writes = list[Asked](), list[Write]()
    for batch, done in came:
        try:
            writes += overlay.check(batch)
            waiting.append((batch, done))
        except QueryError as error:
            _settle([(batch, done)], error)
    return waiting, writes


def _settle(waiting: Sequence[Asked], outcome: int | GslError) -> None:
    for _, done in waiting:
        if done.done():
            continue
        if isinstance(outcome, GslError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)


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
