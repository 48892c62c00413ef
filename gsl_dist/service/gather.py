"""Single queries that come while others are under way are searched together: under load batches form by themselves.

As long as there is room, a query goes at once and waits for nobody. When as many searches are under way as replicas
have hands for, the next query waits, and with it all that come meanwhile and ask for the same; they go as one search
when one of those under way has ended. Nobody waits for a batch to fill, and nobody for long: what holds the others up
may be a replica that has stopped, so that those who wait go all the same after twice the time that a search takes of
late. A search of 32 queries costs a router and its replicas little more than one of a single query.

This module knows neither shards nor the network. Everything here runs on one event loop.
"""

# Shapes: Q queries, D dims

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from gsl_dist.codebook import FloatArray
from gsl_dist.hits import Effort

T = TypeVar("T")

Waiter = tuple[FloatArray, float, "asyncio.Future[T]"]
"""A query (1, D), when it came, and where its answer goes."""

_MOST_TOGETHER = 64
_LONGEST_WAIT_S, _START_S, _MEMORY = 0.02, 0.002, 0.1


class Gatherer(Generic[T]):
    """Searches for single queries, some of them together.

    Args:
        search: answers queries (Q, D) that ask for the same effort, one answer each.
        room: searches that may be under way before the next one waits.
        go: is told of every query that goes when it came, a time of `perf_counter`.
    """

    def __init__(
        self,
        search: Callable[[FloatArray, Effort], Awaitable[Sequence[T]]],
        room: int,
        go: Callable[[float], object] = lambda came: None,
    ) -> None:
        self._search, self._room, self._note = search, room, go
        self._open, self._pace_s = 0, _START_S
        self._waiting: dict[Effort, list[Waiter[T]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Sequence[T]]] = set()

    async def search(self, query_1D: FloatArray, effort: Effort) -> T:
        """Give the answer to one query; its effort has no filter, so that it tells queries apart.

        Raises:
            what the search for it, or for those that it went with, raised.
        """
        came = time.perf_counter()
        if self._open < self._room and not self._waiting:
            self._note(came)
            self._open += 1
            [answer] = await self._go(query_1D, effort)
            return answer
        loop = asyncio.get_running_loop()
        given: asyncio.Future[T] = loop.create_future()
        self._waiting.setdefault(effort, []).append((query_1D, came, given))
        if self._timer is None:
            self._timer = loop.call_later(min(2 * self._pace_s, _LONGEST_WAIT_S), self._send_all)
        return await given

    async def _go(self, queries_QD: FloatArray, effort: Effort) -> Sequence[T]:
        start = time.perf_counter()
        try:
            return await self._search(queries_QD, effort)
        finally:
            self._open -= 1
            self._pace_s += _MEMORY * (time.perf_counter() - start - self._pace_s)
            while self._waiting and self._open < self._room:
                self._send_next()

    def _send_next(self) -> None:
        """Search for those who have waited longest, and for all that wait with them."""
        effort = next(iter(self._waiting))
        waiters = self._waiting.pop(effort)
        if len(waiters) > _MOST_TOGETHER:
            self._waiting[effort] = waiters[_MOST_TOGETHER:]
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Whoever has gone away meanwhile is not searched for.
        going = [waiter for waiter in waiters[:_MOST_TOGETHER] if not waiter[2].done()]
        for _, came, _ in going:
            self._note(came)
        if going:
            self._open += 1
            queries_QD = np.concatenate([query for query, _, _ in going])
            task = asyncio.get_running_loop().create_task(self._go(queries_QD, effort))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._hand_out, [given for _, _, given in going]))

    def _send_all(self) -> None:
        self._timer = None
        while self._waiting:
            self._send_next()

    def _hand_out(self, awaited: Sequence[asyncio.Future[T]], done: asyncio.Task[Sequence[T]]) -> None:
        self._tasks.discard(done)
        for place, given in enumerate(awaited):
            if given.done():
                continue
            if done.cancelled():
                given.cancel()
            elif error := done.exception():
                given.set_exception(error)
            else:
                given.set_result(done.result()[place])
