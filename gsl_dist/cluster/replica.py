"""A replica: some shards of one version, searched over TCP with raw bytes.

This module knows nothing of Ray: `serve.py` wraps a `Replica` in a Serve deployment, which owns its life.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import faiss
import numpy as np
import uvloop

from gsl_dist.cluster.frames import Frames, Status, greet
from gsl_dist.errors import ArtefactError, BadInput, ConfigError, pack_error
from gsl_dist.index.coarse import Probed, check_lists
from gsl_dist.index.search import LocalSearcher, check_effort, check_queries
from gsl_dist.wire import QUERY_HEAD_BYTES, pack_hits, unpack_query

_log = logging.getLogger(__name__)
_FEW_LISTS = 64


class Replica:
    """Answers searches over the shards that it holds.

    Args:
        searcher: the open shards.
        host: the address to bind.
        threads: faiss threads for each search.
        max_bytes: the longest query or answer.
    """

    def __init__(
        self, searcher: LocalSearcher, *, host: str = "127.0.0.1", threads: int = 1, max_bytes: int = 1 << 26
    ) -> None:
        self.searcher, self.max_bytes, self._host = searcher, max_bytes, host
        # On one core a second thread gains a single query nothing and costs it two changes of thread, a tenth of its
        # time; so it is answered where it arrives. Batches, and queries with long filters, go to the pool.
        dim, lists = searcher.codebook.dim, searcher.codebook.lists
        self._at_once_bytes = QUERY_HEAD_BYTES + 4 * dim + 8 * min(lists, _FEW_LISTS) if threads == 1 else 0
        self.greeting = greet(searcher.manifest.version, list(searcher.shards))
        # OpenMP counts threads for each calling thread, so every pool thread is told. One thread more than the cores
        # keeps a long batch from holding up every single query behind it.
        self._pool = ThreadPoolExecutor(threads + 1, "search", faiss.omp_set_num_threads, (threads,))
        self.loop = uvloop.new_event_loop()
        self._ready: Future[int] = Future()
        self._open: set[Answerer] = set()
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)

    def start(self) -> str:
        """Begin to answer, and give the address to ask at.

        Raises:
            ConfigError: the host cannot be bound.
        """
        # What a first search makes, tables and compiled loops, is made before anybody waits for it.
        self.probe()
        self._thread.start()
        try:
            return f"{self._host}:{self._ready.result()}"
        except OSError as error:
            raise ConfigError("host", self._host, f"a replica must be able to listen there ({error})") from error

    def probe(self) -> None:
        """Search once, as a query would."""
        self.searcher.search(np.ones(self.searcher.codebook.dim), 1, probes=1, refine=1)

    def stop(self) -> None:
        """Stop answering and hang up."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def answer(self, body: bytes) -> tuple[Status, bytes]:
        """Search for what a body asks, in whichever thread."""
        try:
            queries, effort, named = unpack_query(body)
            matrix = check_queries(queries, self.searcher.codebook.dim)
            probed = None if named is None else check_lists(Probed(*named), self.searcher.codebook)
            # The router turns distances to what users see, once all replicas' are merged.
            hits = self.searcher.find(matrix, check_effort(effort, self.searcher.manifest), probed)
            return Status.DONE, pack_hits(hits)
        except BadInput as error:
            return Status.REFUSED, pack_error(error).encode()
        except (ArtefactError, RuntimeError, MemoryError) as error:  # a damaged payload, or what faiss raises
            _log.exception("a search failed")
            return Status.FAILED, str(error).encode()

    def is_quick(self, body: bytes) -> bool:
        """Tell whether a body is best answered in the thread that received it."""
        return len(body) <= self._at_once_bytes

    def submit(self, body: bytes) -> Future[tuple[Status, bytes]]:
        """Search in the pool."""
        return self._pool.submit(self.answer, body)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            listening = self.loop.create_server(self._welcome, self._host, 0)
            server = cast(asyncio.Server, self.loop.run_until_complete(listening))
        except OSError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(server.sockets[0].getsockname()[1])
        self.loop.run_forever()
        server.close()
        for answerer in self._open:
            answerer.close()
        self.loop.run_until_complete(server.wait_closed())
        self.loop.close()

    def _welcome(self) -> Answerer:
        answerer = Answerer(self, self._open.discard)
        self._open.add(answerer)
        return answerer


class Answerer(Frames):
    """The replica's end of a connection."""

    def __init__(self, replica: Replica, lost: Callable[[Answerer], None]) -> None:
        super().__init__(replica.max_bytes)
        self._replica, self._lost, self._is_greeted = replica, lost, False

    def take(self, ticket: int, status: int, body: bytes) -> None:
        """Let the pool answer a question; before that, the router must have named the shards held here."""
        if self._is_greeted and self._replica.is_quick(body):
            self.send(ticket, *self._replica.answer(body))
        elif self._is_greeted:
            self._replica.submit(body).add_done_callback(lambda done: self._hand_back(ticket, done))
        elif body == self._replica.greeting:
            self._is_greeted = True
            self.send(ticket, Status.DONE, b"")
        else:
            self.send(ticket, Status.FAILED, b"other shards are held here")
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Be forgotten."""
        self._lost(self)

    def _hand_back(self, ticket: int, done: Future[tuple[Status, bytes]]) -> None:
        # Called in a pool thread; the transport belongs to the loop.
        if not done.cancelled() and not self._replica.loop.is_closed():
            self._replica.loop.call_soon_threadsafe(self.send, ticket, *done.result())


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
