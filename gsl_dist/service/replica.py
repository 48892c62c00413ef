"""A replica: some shards of a version, or of several while one takes over from another, searched over TCP.

What a replica holds is what its routers ask for: the first frame of a connection names a version and shards, and they
are verified and opened unless they are held already. When the last connection that named them has ended, they are let
go after a while. Every connection is about one such holding, so that answers of two versions never mix.

Queries that came in together, since a search was under way when they arrived, are searched as one if they ask for the
same: under load batches form by themselves, and nobody waits for one to fill. A query whose asker has stopped waiting
is not searched.

This module knows nothing of Ray: `gsl_dist.cluster.serve` wraps a `Replica` in a Serve deployment, which owns its life.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import asyncio
import functools
import ipaddress
import itertools
import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import faiss
import numpy as np
import pyarrow as pa
import uvloop

from gsl_dist.errors import ArtefactError, BadInput, ConfigError, GslError, QueryError, pack_error
from gsl_dist.hits import Effort, Hits
from gsl_dist.index.coarse import Probed, check_lists
from gsl_dist.index.lists import FaissLists
from gsl_dist.index.search import LocalSearcher, check_effort
from gsl_dist.service.frames import Ask, Frame, Frames, Status, read_greeting
from gsl_dist.wire import QUERY_HEAD_BYTES, pack_hits, pack_table, read_patience, tell_apart, unpack_query, unpack_table

_log = logging.getLogger(__name__)

Open = Callable[[str, tuple[str, ...]], LocalSearcher]
"""Verifies and opens shards of a version."""

Answer = tuple[Status, bytes]

_FEW_LISTS, _MOST_TOGETHER = 64, 64
_FAULTS = (ArtefactError, RuntimeError, MemoryError)  # a damaged payload, or what faiss raises
_GRACE_S = 5.0


@dataclass
class Holding:
    """Shards of one version, which lists they have rows in, and how many connections are about them."""

    version: str
    shards: tuple[str, ...]
    searcher: LocalSearcher
    held: bytes = b""
    users: int = 0

    def answer(self, kind: int, body: bytes) -> Answer:
        """Answer one question, in whichever thread."""
        try:
            return Status.DONE, _ANSWERS[Ask(kind)](self.searcher, body)
        except GslError as error:
            is_refused = isinstance(error, BadInput)
            if not is_refused:
                _log.exception("a question failed")
            return Status.REFUSED if is_refused else Status.FAILED, pack_error(error).encode()
        except (*_FAULTS, KeyError, ValueError, pa.ArrowException) as error:
            _log.exception("a question failed")
            return Status.FAILED, str(error).encode()

    def answer_alone(self, kind: int, body: bytes) -> list[Answer]:
        """Answer one question as if it were several."""
        return [self.answer(kind, body)]

    def search_together(self, bodies: Sequence[bytes]) -> list[Answer]:
        """Search queries that ask for the same as one batch; each by itself if one of them cannot be answered."""
        if len(bodies) > 1:
            try:
                return [(Status.DONE, pack_hits(hits)) for hits in _search_batch(self.searcher, bodies)]
            except (BadInput, *_FAULTS):
                _log.info("a batch of %d queries is answered one by one", len(bodies))
        return [self.answer(Ask.SEARCH, body) for body in bodies]


class Replica:
    """Answers searches over the shards that it holds.

    Args:
        open_held: verifies and opens shards.
        host: the address to bind.
        threads: faiss threads for each search.
        max_bytes: the longest query or answer.
        secret: what a router shows.
        tls: the certificate, where links are encrypted.
        grace_s: how long shards stay open that nobody asks for.
    """

    def __init__(  # noqa: PLR0913 - what a service sets up
        self,
        open_held: Open,
        *,
        host: str = "127.0.0.1",
        threads: int = 1,
        max_bytes: int = 1 << 26,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        grace_s: float = _GRACE_S,
    ) -> None:
        self.max_bytes, self.secret, self.threads = max_bytes, secret, threads
        self._open_held, self._host, self._tls, self._grace_s = open_held, host, tls, grace_s
        self._held: dict[tuple[str, tuple[str, ...]], Holding] = {}
        # OpenMP counts threads for each calling thread, so every pool thread is told. One thread more than the cores
        # keeps a long batch from holding up every single query behind it.
        self.pool = ThreadPoolExecutor(threads + 1, "search", faiss.omp_set_num_threads, (threads,))
        self._opening = ThreadPoolExecutor(1, "open", faiss.omp_set_num_threads, (threads,))
        self.loop = uvloop.new_event_loop()
        self._ready: Future[int] = Future()
        self._connections: set[Answerer] = set()
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)

    def start(self) -> str:
        """Begin to answer, and give the address to ask at.

        Raises:
            ConfigError: the host cannot be bound.
        """
        self._thread.start()
        try:
            return f"{self._host}:{self._ready.result()}"
        except OSError as error:
            raise ConfigError("host", self._host, f"a replica must be able to listen there ({error})") from error

    def hold(self, version: str, shards: Sequence[str]) -> Holding:
        """Open shards, unless they are held; what a first search makes, tables and compiled loops, is made as well.

        Raises:
            BadInput, ArtefactError: as `open_searcher`.
        """
        key = version, tuple(sorted(shards))
        if key not in self._held:
            searcher = self._open_held(*key)
            holding = Holding(*key, searcher, tell_lists(searcher))
            probe(searcher)
            self._held[key] = holding
        return self._held[key]

    def hold_soon(self, version: str, shards: Sequence[str]) -> Future[Holding]:
        """Open shards in a thread that searches nothing."""
        return self._opening.submit(self.hold, version, shards)

    def release(self, holding: Holding) -> None:
        """Count one connection less; the last one's shards are let go when nobody has come back for them."""
        holding.users -= 1
        if holding.users == 0 and not self.loop.is_closed():
            self.loop.call_later(self._grace_s, self._let_go, holding)

    def probe(self) -> None:
        """Search everything that is held once, as a query would."""
        for holding in list(self._held.values()):
            probe(holding.searcher)

    @property
    def held(self) -> list[tuple[str, tuple[str, ...]]]:
        """List the versions held, and of each the shards."""
        return list(self._held)

    def stop(self) -> None:
        """Stop answering and hang up."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        for pool in (self.pool, self._opening):
            pool.shutdown(cancel_futures=True)

    def _let_go(self, holding: Holding) -> None:
        if holding.users == 0 and self._held.pop((holding.version, holding.shards), None) is not None:
            _log.info("version %s is let go", holding.version)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        faiss.omp_set_num_threads(self.threads)
        try:
            listening = self.loop.create_server(self._welcome, self._host, 0, ssl=self._tls)
            server = cast(asyncio.Server, self.loop.run_until_complete(listening))
        except OSError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(server.sockets[0].getsockname()[1])
        self.loop.run_forever()
        server.close()
        for answerer in self._connections:
            answerer.close()
        self.loop.run_until_complete(server.wait_closed())
        self.loop.close()

    def _welcome(self) -> Answerer:
        answerer = Answerer(self, self._connections.discard)
        self._connections.add(answerer)
        return answerer


class Answerer(Frames):
    """The replica's end of a connection."""

    def __init__(self, replica: Replica, lost: Callable[[Answerer], None]) -> None:
        super().__init__(replica.max_bytes)
        self._replica, self._lost = replica, lost
        self._holding: Holding | None = None
        self._quick_bytes = 0

    def take(self, frames: list[Frame]) -> None:
        """Answer questions; before that, the router must have named the shards that they are about."""
        if self._holding is None:
            self._greet(*frames[0])
            return
        searches = []
        for ticket, kind, body in frames:
            if kind == Ask.SEARCH:
                searches.append((ticket, body))
            else:
                work = self._replica.pool.submit(self._holding.answer_alone, kind, body)
                work.add_done_callback(functools.partial(self._hand_back, [ticket]))
        for together in _group_alike(searches):
            self._search([ticket for ticket, _ in together], [body for _, body in together])

    def connection_lost(self, error: Exception | None) -> None:
        """Be forgotten."""
        if self._holding is not None:
            self._replica.release(self._holding)
        self._lost(self)

    def _greet(self, ticket: int, kind: int, body: bytes) -> None:
        try:
            version, shards = read_greeting(body if kind == Ask.HOLD else b"", self._replica.secret)
        except GslError as error:
            self.send(ticket, Status.REFUSED, pack_error(error).encode())
            self.close()
            return
        opening = self._replica.hold_soon(version, shards)
        opening.add_done_callback(lambda done: self._call(self._settle, ticket, done))

    def _settle(self, ticket: int, opened: Future[Holding]) -> None:
        if opened.cancelled() or opened.exception() is not None:
            error = None if opened.cancelled() else opened.exception()
            told = pack_error(error) if isinstance(error, GslError) else str(error or "the replica stops")
            self.send(ticket, Status.REFUSED, told.encode())
            self.close()
            return
        holding = opened.result()
        holding.users += 1
        if self.is_closing:
            # Who asked for it has gone; it is let go after a while, unless somebody else comes.
            self._replica.release(holding)
            return
        self._holding = holding
        # On one core a second thread gains a single query nothing and costs it two changes of thread, a tenth of its
        # time; so it is answered where it arrives. Batches, and queries with long filters, go to the pool.
        codebook = holding.searcher.codebook
        longest = QUERY_HEAD_BYTES + 4 * codebook.dim + 8 * min(codebook.lists, _FEW_LISTS)
        self._quick_bytes = longest if self._replica.threads == 1 else 0
        self.send(ticket, Status.DONE, holding.held)

    def _search(self, tickets: list[int], bodies: list[bytes]) -> None:
        assert self._holding is not None, "questions come after the greeting"
        if len(bodies[0]) <= self._quick_bytes:
            self._send_all(tickets, self._holding.search_together(bodies))
            return
        work = self._replica.pool.submit(_search_in_time, self._holding, bodies, time.monotonic())
        work.add_done_callback(functools.partial(self._hand_back, tickets))

    def _hand_back(self, tickets: list[int], done: Future[list[Answer]]) -> None:
        if not done.cancelled():
            self._call(self._send_all, tickets, done.result())

    def _call(self, work: Callable[..., None], *given: object) -> None:
        # Called in a pool thread; the transport belongs to the loop.
        if not self._replica.loop.is_closed():
            self._replica.loop.call_soon_threadsafe(work, *given)

    def _send_all(self, tickets: list[int], answers: list[Answer]) -> None:
        for ticket, answer in zip(tickets, answers, strict=True):
            self.send(ticket, *answer)


def probe(searcher: LocalSearcher) -> None:
    """Search once, as a query would: with vectors beside the codes, candidates are ranked by them."""
    searcher.search(np.ones(searcher.codebook.dim), 1, probes=1, refine=2 if searcher.stores else 1)


def tell_lists(searcher: LocalSearcher) -> bytes:
    """Give a bit for each list, set where rows lie in it; nothing where routers name no lists."""
    lists = searcher.lists
    return np.packbits(np.diff(lists.offsets) > 0).tobytes() if isinstance(lists, FaissLists) else b""


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _search_in_time(holding: Holding, bodies: list[bytes], came: float) -> list[Answer]:
    # What waited in the pool for longer than its asker waits is left alone.
    waited = time.monotonic() - came
    if all((patience := read_patience(body)) is not None and waited > patience for body in bodies):
        return [(Status.FAILED, b"the time to answer had passed before the search began")] * len(bodies)
    return holding.search_together(bodies)


def _group_alike(searches: list[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """Put single queries together that ask for the same, without changing anything about who is first."""
    if len(searches) < 2:
        return [searches] if searches else []
    groups: dict[tuple[bytes, int], list[tuple[int, bytes]]] = {}
    for search in searches:
        groups.setdefault((tell_apart(search[1]), len(search[1])), []).append(search)
    cut = range(0, len(searches), _MOST_TOGETHER)
    return [group[at : at + _MOST_TOGETHER] for group in groups.values() for at in cut if group[at:]]


def _search_batch(searcher: LocalSearcher, bodies: Sequence[bytes]) -> list[Hits]:
    asked = [_read_search(searcher, body) for body in bodies]
    if any(question[1] != asked[0][1] for question in asked):  # filters are told apart by their length alone
        return [searcher.gather(*question) for question in asked]
    queries_QD = np.concatenate([question[0] for question in asked])
    named = [question[2] for question in asked if question[2] is not None]
    probed = Probed(*(np.concatenate(arrays) for arrays in zip(*named, strict=True))) if named else None
    whole = searcher.gather(queries_QD, asked[0][1], probed)
    ends = [0, *itertools.accumulate(len(question[0]) for question in asked)]
    return [
        replace(whole, ids=whole.ids[start:end], distances=whole.distances[start:end])
        for start, end in itertools.pairwise(ends)
    ]


def _read_search(searcher: LocalSearcher, body: bytes) -> tuple[np.ndarray, Effort, Probed | None]:
    queries, effort, named = unpack_query(body)
    # The numbers in them were looked at by the router, which alone may ask; here they must only fit what is held.
    if queries.shape[1] != searcher.codebook.dim:
        raise QueryError("vectors", f"{queries.shape[1]} numbers each", f"the index holds {searcher.codebook.dim}")
    probed = None if named is None else check_lists(Probed(*named), searcher.codebook)
    return queries, check_effort(effort, searcher.manifest), probed


def _answer_search(searcher: LocalSearcher, body: bytes) -> bytes:
    # The router puts hits in order and turns distances to what users see, once all replicas' are merged.
    return pack_hits(searcher.gather(*_read_search(searcher, body)))


def _answer_fetch(searcher: LocalSearcher, body: bytes) -> bytes:
    """Give columns of rows, and whether they are here; the vector of each, where that is asked for."""
    asked = unpack_table(body)
    ids_n = asked["id"].to_numpy()
    names = asked.schema.metadata[b"columns"].decode().splitlines()
    assert searcher.payload is not None, "replicas open it"
    is_here_n, vectors_nD = searcher.recall_vectors(ids_n)
    columns: dict[str, pa.Array] = {"#here": pa.array(is_here_n)}
    if b"vectors" in asked.schema.metadata:
        flat = pa.array(vectors_nD.ravel())
        columns["#vector"] = pa.FixedSizeListArray.from_arrays(flat, searcher.codebook.dim)
    table = searcher.payload.fetch(ids_n, names)
    for name, column in columns.items():
        table = table.append_column(name, column) if table.num_columns else pa.table({name: column})
    return pack_table(table)


def _answer_change(searcher: LocalSearcher, body: bytes) -> bytes:
    """Hide rows, where a table has ids alone, or give them other values in its other columns."""
    change = unpack_table(body)
    assert searcher.payload is not None, "replicas open it"
    if change.column_names == ["id"]:
        searcher.payload.hide(change["id"].to_numpy())
    else:
        searcher.payload.patch(change)
    return b""


_ANSWERS: dict[Ask, Callable[[LocalSearcher, bytes], bytes]] = {
    Ask.SEARCH: _answer_search,
    Ask.FETCH: _answer_fetch,
    Ask.CHANGE: _answer_change,
}
