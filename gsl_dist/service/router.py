"""The router: it knows which version is served, and takes writes over it.

It makes the next version ready beside the one that is served, lets new queries go there once every part is connected,
and lets go of the old one when its last query is answered: none fails, and none is answered from two. It writes the
log, too: a write is acknowledged when it is on the disk and every part that answers knows of it. How a query is
answered is for `gsl_dist.service.served`.

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
from numpy.typing import ArrayLike

from gsl_dist.errors import GslError, Overloaded, QueryError
from gsl_dist.hits import NO_ID, Effort, Hits
from gsl_dist.index.coarse import open_coarse
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import Manifest, current_version, open_version, promote_version
from gsl_dist.index.overlay import Overlay, read_overlay
from gsl_dist.index.sample import Sample, read_sample
from gsl_dist.index.search import check_queries
from gsl_dist.service.links import Fleet
from gsl_dist.service.meters import Meters
from gsl_dist.service.served import Served
from gsl_dist.storage import Folder

_log = logging.getLogger(__name__)

Coarse = Literal["router", "replicas"]
Asked = tuple[list[Write], asyncio.Future[int]]
"""Writes, and who waits for the number of their commit."""

_POLL_S = 0.05
_PROBED, _REMEMBERED = 4, 200


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
                    space, after = self._served.manifest.space, self._served.overlay.seq
                    seq = await asyncio.to_thread(self._log.append, writes, space, after)
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
