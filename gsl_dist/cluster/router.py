"""The router: one query goes to every replica at once, their answers become one.

Each replica is reached over one persistent connection (a `Link`). A replica that fails or is late is left out of the
answer, which says so; it is never asked twice for one query. When a replica is gone, its link asks in the background
where it lives now, since Serve restarts a dead replica at a new port. Starting works the same way: a new link knows no
address yet.

This module knows nothing of Ray or HTTP. Everything here runs on one event loop, the one that owns the connections.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from numpy.typing import ArrayLike

from gsl_dist.cluster.frames import Asker, greet
from gsl_dist.codebook import FloatArray
from gsl_dist.errors import ShardUnavailable
from gsl_dist.hits import Effort, Hits, merge_topk, show_distances
from gsl_dist.index.coarse import CoarseStep, Probed
from gsl_dist.index.manifest import Manifest, ShardEntry
from gsl_dist.index.search import check_effort, check_queries
from gsl_dist.wire import pack_query, unpack_hits

_log = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[str | None]]
"""Gives the address at which a replica answers now, or None while it does not."""

_ASK_AGAIN_S = 0.2
_GREET_S = 2.0


class Link:
    """The way to one replica.

    Args:
        name: the replica's name.
        shards: the shards that it holds.
        version: the version that it serves.
        resolve: finds its address.
        max_bytes: the longest message.
    """

    def __init__(self, name: str, shards: Sequence[str], version: str, resolve: Resolve, max_bytes: int) -> None:
        self.name, self.shards = name, list(shards)
        self._greeting, self._resolve, self._max_bytes = greet(version, self.shards), resolve, max_bytes
        self._asker: Asker | None = None
        self._search: asyncio.Task[None] | None = None

    async def ask(self, body: bytes, timeout_s: float) -> Hits | None:
        """Give the replica's answer, or None if it has none in time.

        Raises:
            QueryError: the replica refuses the query.
        """
        if self._asker is None:
            self.find()
            return None
        try:
            return unpack_hits(await self._asker.ask(body, timeout_s))
        except (ConnectionError, asyncio.TimeoutError) as error:
            _log.warning("%s did not answer: %s %s", self.name, type(error).__name__, error)
            return None

    def find(self) -> None:
        """Start to look for the replica, unless that is under way."""
        if self._search is None or self._search.done():
            self._search = asyncio.get_running_loop().create_task(self._connect())

    def close(self) -> None:
        """Hang up."""
        if self._search is not None:
            self._search.cancel()
        asker, self._asker = self._asker, None
        if asker is not None:
            asker.close()

    async def _connect(self) -> None:
        while self._asker is None:
            address = await self._resolve(self.name)
            if address is None or not await self._try(address):
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _try(self, address: str) -> bool:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            way = loop.create_connection(lambda: Asker(self._max_bytes, self._lose), host, int(port))
            _, asker = await asyncio.wait_for(way, _GREET_S)
            await asker.ask(self._greeting, _GREET_S)
        except (OSError, asyncio.TimeoutError) as error:
            _log.info("%s is not at %s: %s", self.name, address, error)
            return False
        self._asker = asker
        _log.info("%s answers at %s", self.name, address)
        return True

    def _lose(self, asker: Asker) -> None:
        # Serve restarts a dead replica elsewhere: look for it now, and not only when the next query has failed.
        if asker is self._asker:
            self._asker = None
            self.find()


class Router:
    """Searches a version whose shards are spread over replicas.

    Args:
        manifest: the version.
        groups: the shards that each replica holds, by its name.
        resolve: finds the address of a replica.
        coarse: finds the lists of a query for all replicas; None: each finds them for itself.
        timeout_s: how long a replica may take.
        max_bytes: the longest message.
    """

    def __init__(
        self,
        manifest: Manifest,
        groups: Mapping[str, Sequence[str]],
        resolve: Resolve,
        *,
        coarse: CoarseStep | None = None,
        timeout_s: float = 10.0,
        max_bytes: int = 1 << 26,
    ) -> None:
        self.manifest, self._coarse, self._timeout_s = manifest, coarse, timeout_s
        self._links = [Link(name, shards, manifest.version, resolve, max_bytes) for name, shards in groups.items()]

    def start(self) -> None:
        """Let every link look for its replica; to be called on the loop that will search."""
        for link in self._links:
            link.find()

    def close(self) -> None:
        """Hang up everywhere."""
        for link in self._links:
            link.close()

    async def search(self, queries: ArrayLike, effort: Effort, *, require_all: bool = False) -> Hits:
        """Give the nearest items of each query among the shards that answer in time, as users see them.

        Shapes: queries (Q, D) or (D,) -> ids (Q, k) int64, distances (Q, k) float32.
        Raises:
            QueryError: queries or effort cannot be answered.
            ShardUnavailable: no shard answered, or one did not and all are required.
        """
        metric = self.manifest.metric
        matrix, effort = check_queries(queries, self.manifest.dim, metric), check_effort(effort, self.manifest)
        body = pack_query(matrix, effort, await self._probe(matrix, effort))
        answers = await asyncio.gather(*(link.ask(body, self._timeout_s) for link in self._links))
        missing = [
            shard for link, answer in zip(self._links, answers, strict=True) for shard in link.shards if answer is None
        ]
        found = [answer for answer in answers if answer is not None]
        if not found or (missing and require_all):
            raise ShardUnavailable(missing, len(self.manifest.shards))
        return show_distances(found[0] if len(answers) == 1 else merge_topk(found, effort.k), metric)

    async def _probe(self, matrix: FloatArray, effort: Effort) -> Probed | None:
        """Find the lists that queries look into; with a filter each replica finds its own, it may need more."""
        assert effort.probes is not None, "it was settled"
        if self._coarse is None or effort.where is not None:
            return None
        if len(matrix) == 1:
            return self._coarse.probe(matrix, effort.probes)
        # A batch would hold up the loop, and with it every other query.
        return await asyncio.get_running_loop().run_in_executor(None, self._coarse.probe, matrix, effort.probes)


def spread_shards(shards: Sequence[ShardEntry], replicas: int) -> dict[str, list[str]]:
    """Deal shards out to replicas so that each holds about as many rows; every replica gets one.

    Returns:
        the names of the shards of each replica, `replica-0` and so on.
    """
    groups: list[list[ShardEntry]] = [[] for _ in range(replicas)]
    for shard in sorted(shards, key=lambda entry: (-entry.rows, entry.name)):
        # Equal rows are told apart by the number of shards, so that empty shards do not pile up in one place.
        min(groups, key=lambda group: (sum(entry.rows for entry in group), len(group))).append(shard)
    return {f"replica-{rank}": sorted(entry.name for entry in group) for rank, group in enumerate(groups)}
