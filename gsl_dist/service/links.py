"""The ways from a router to its replicas: a `Link` to each, and `Copies` of the same shards that stand in for another.

A link is one lasting connection about some shards of one version. When it ends, the link asks in the background where
the replica lives now, since Serve restarts a dead one at a new port. Starting works the same way: a new link knows no
address yet. What was written since the version was made is told to a replica before its link counts as connected.

A question goes to the copy that has the fewest waiting. If it fails, the next one is asked at once; if it takes longer
than 95 of 100 answers to as large a question did, the next one is asked as well, and the first answer counts.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gsl_dist.errors import BadInput, GslError
from gsl_dist.index.manifest import Manifest, ShardEntry
from gsl_dist.service.frames import Ask, Asker, greet

_log = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[str | None]]
"""Gives the address at which a replica answers now, or None while it does not."""

Changes = Callable[[], tuple[int, Sequence[bytes]]]
"""Gives what was written over a version, as whoever opens its rows must be told, and the last commit in it."""

_ASK_AGAIN_S, _CONNECT_S = 0.2, 2.0
_REMEMBERED, _ENOUGH, _LEAST_HEDGE_S = 256, 20, 0.002
_HEDGE_PERCENTILE, _UNKNOWN_S = 95, 1.0


@dataclass(frozen=True)
class Fleet:
    """The replicas of a service, and how they are reached.

    Args:
        resolve: finds the address of a replica by its name.
        replicas: parts that the shards of a version are spread over.
        copies: replicas that hold the same part.
        hands: searches that each of them does at a time.
        secret: what a router shows them.
        tls: encrypts the links.
        max_bytes: the longest message.
        timeout_s: how long a replica may take over a question.
        load_s: how long it may take to open its shards.
    """

    resolve: Resolve
    replicas: int = 1
    copies: int = 1
    hands: int = 2
    secret: str = ""
    tls: ssl.SSLContext | None = None
    max_bytes: int = 1 << 26
    timeout_s: float = 10.0
    load_s: float = 300.0

    def link(self, manifest: Manifest, changes: Changes) -> list[Copies]:
        """Make the links to everything that holds a part of a version."""
        groups = spread_shards(manifest.shards, self.replicas)
        return [
            Copies(
                shards,
                [Link(name, shards, self, manifest.version, changes) for name in name_copies(group, self.copies)],
            )
            for group, shards in groups.items()
            if shards
        ]


class Link:
    """The way to one replica, for one version.

    Args:
        name: the replica's name.
        shards: the shards that it is to hold.
        fleet: where it is found.
        version: the version that it is to serve.
        changes: what it must be told before it is asked.
    """

    def __init__(self, name: str, shards: Sequence[str], fleet: Fleet, version: str, changes: Changes) -> None:
        self.name, self.fleet = name, fleet
        self.waiting = 0
        self.held: bytes | None = None
        self.refusal: GslError | None = None
        self._greeting, self._changes = greet(fleet.secret, version, shards), changes
        self._asker: Asker | None = None
        self._search: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        """Tell whether the replica can be asked."""
        return self._asker is not None

    def ask(self, kind: Ask, body: bytes) -> asyncio.Future[bytes]:
        """Ask the replica, and give what its answer will be.

        Returns:
            the answer, or BadInput: the replica refuses the question, or ConnectionError: there will be none.
        """
        if self._asker is None:
            self.find()
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(ConnectionResetError("not connected"))
            return answer
        self.waiting += 1
        answer = self._asker.ask(kind, body)
        answer.add_done_callback(self._count)
        return answer

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
            address = await self.fleet.resolve(self.name)
            if address is None or not await self._try(address):
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _try(self, address: str) -> bool:
        host, _, port = address.rpartition(":")
        loop, fleet, asker = asyncio.get_running_loop(), self.fleet, None
        try:
            way = loop.create_connection(
                lambda: Asker(fleet.max_bytes, self._lose), host, int(port), ssl=fleet.tls, server_hostname=_name(fleet)
            )
            _, asker = await asyncio.wait_for(way, _CONNECT_S)
            held = await asyncio.wait_for(asker.ask(Ask.HOLD, self._greeting), fleet.load_s)
            told = -1
            while (coming := self._changes())[0] != told:
                told, bodies = coming
                for body in bodies:
                    await asyncio.wait_for(asker.ask(Ask.CHANGE, body), fleet.load_s)
        except (OSError, asyncio.TimeoutError, GslError) as error:
            _log.info("%s is not at %s: %s", self.name, address, error)
            self.refusal = error if isinstance(error, GslError) else self.refusal
            if asker is not None:
                asker.close()
            return False
        # Nothing was awaited since all that is written was told, so that nothing can have been missed.
        self._asker, self.held, self.refusal = asker, held, None
        _log.info("%s answers at %s", self.name, address)
        return True

    def _count(self, answer: asyncio.Future[bytes]) -> None:
        self.waiting -= 1
        if not answer.cancelled():
            answer.exception()  # looked at, or it would be logged as a fault where nobody waits any more

    def _lose(self, asker: Asker) -> None:
        # Serve restarts a dead replica elsewhere: look for it now, and not only when the next query has failed.
        if asker is self._asker:
            self._asker = None
            self.find()


class Copies:
    """Replicas that hold the same shards: any of them answers for all.

    Args:
        shards: what they hold.
        links: the ways to them.
    """

    def __init__(self, shards: Sequence[str], links: Sequence[Link]) -> None:
        self.shards, self.links = list(shards), list(links)
        self.hedges = 0
        self.latencies = Latencies()

    @property
    def is_connected(self) -> bool:
        """Tell whether one of them can be asked."""
        return any(link.is_connected for link in self.links)

    @property
    def held(self) -> bytes | None:
        """Give a bit for each list, set where rows lie in it; None until a copy was first connected."""
        return next((link.held for link in self.links if link.held is not None), None)

    def ask(self, kind: Ask, body: bytes) -> asyncio.Future[bytes | None]:
        """Ask a copy, and others where that is of use, and give what the first answer will be.

        Whoever waits no longer cancels it.

        Returns:
            the answer, None if there will be none, or BadInput: a replica refuses the question.
        """
        links = [link for link in self.links if link.is_connected]
        if len(links) > 1:
            links.sort(key=lambda link: link.waiting)
        race = _Race(self, links, kind, body)
        race.ask_next()
        return race.answer

    async def tell(self, body: bytes) -> None:
        """Tell all that are connected of a change; one that does not take it is cut off, to be told everything anew."""
        connected = [link for link in self.links if link.is_connected]
        answers = [link.ask(Ask.CHANGE, body) for link in connected]
        if answers:
            await asyncio.wait(answers, timeout=connected[0].fleet.timeout_s)
        for link, answer in zip(connected, answers, strict=True):
            if not answer.done() or answer.exception() is not None:
                link.close()
                link.find()


class _Race:
    """One question to the copies of a part.

    It is made of callbacks and not of tasks, since the answer to one query waits for all that is done here.

    Args:
        part: the copies.
        links: the ways to those that can be asked, the first to be asked first.
        kind: of the question.
        body: the question.
    """

    def __init__(self, part: Copies, links: list[Link], kind: Ask, body: bytes) -> None:
        self._part, self._links, self._question = part, links, (kind, body)
        self._loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[bytes | None] = self._loop.create_future()
        self._start, self._open = time.monotonic(), 0
        self._hedge: asyncio.TimerHandle | None = None

    def ask_next(self) -> None:
        """Ask the next copy, if there is one; without any, and when none owes an answer, there is none."""
        if self.answer.done():
            return
        if self._links:
            link = self._links.pop(0)
            self._part.hedges += self._open > 0
            self._open += 1
            link.ask(*self._question).add_done_callback(functools.partial(self._take, link))
        elif self._open == 0:
            self.answer.set_result(None)
        if self._links:
            patience_s = self._part.latencies.give_up_after(len(self._question[1]))
            self._hedge = self._loop.call_later(patience_s, self.ask_next)

    def _take(self, link: Link, given: asyncio.Future[bytes]) -> None:
        self._open -= 1
        # Who lost the race is left to end by itself: as long as it owes an answer, the others are asked first.
        if self.answer.done():
            return
        if self._hedge is not None:
            self._hedge.cancel()
        error = given.exception()
        if error is None:
            self._part.latencies.note(len(self._question[1]), time.monotonic() - self._start)
            self.answer.set_result(given.result())
        elif isinstance(error, BadInput):
            self.answer.set_exception(error)
            self.answer.exception()  # looked at: of several parts that refuse, one is told
        else:
            _log.warning("%s did not answer: %s %s", link.name, type(error).__name__, error)
            self.ask_next()


class Latencies:
    """How long answers took of late, by the size of what was asked."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._limits: dict[int, float] = {}

    def note(self, size: int, seconds: float) -> None:
        """Remember how long an answer took."""
        kind = size.bit_length()
        of_late = self._seconds.setdefault(kind, deque(maxlen=_REMEMBERED))
        of_late.append(seconds)
        if len(of_late) % _ENOUGH == 0:
            self._limits[kind] = max(float(np.percentile(of_late, _HEDGE_PERCENTILE)), _LEAST_HEDGE_S)

    def give_up_after(self, size: int) -> float:
        """Give after how many seconds another copy should be asked."""
        return self._limits.get(size.bit_length(), _UNKNOWN_S)


def spread_shards(shards: Sequence[ShardEntry], replicas: int) -> dict[str, list[str]]:
    """Deal shards out so that each part holds about as many rows; a part is empty only if there are too few shards.

    Returns:
        the names of the shards of each part, `replica-0` and so on.
    """
    groups: list[list[ShardEntry]] = [[] for _ in range(replicas)]
    for shard in sorted(shards, key=lambda entry: (-entry.rows, entry.name)):
        # Equal rows are told apart by the number of shards, so that empty shards do not pile up in one place.
        min(groups, key=lambda group: (sum(entry.rows for entry in group), len(group))).append(shard)
    return {f"replica-{rank}": sorted(entry.name for entry in group) for rank, group in enumerate(groups)}


def name_copies(group: str, copies: int) -> list[str]:
    """Give the names of the replicas that hold a part."""
    return [group] if copies == 1 else [f"{group}-{copy}" for copy in range(copies)]


def name_shards(parts: Sequence[Copies]) -> tuple[str, ...]:
    """Give the shards of parts."""
    return tuple(shard for part in parts for shard in part.shards)


def find_owners(copies: Sequence[Copies], lists: int) -> NDArray[np.int64] | None:
    """Give for each list the only part that has rows in it, -1 where none has; None where lists lie in several parts.

    Shapes: -> (R,) of as many lists.
    """
    owners_R = np.full(lists, -1)
    for place, part in enumerate(copies):
        held_R = np.unpackbits(np.frombuffer(part.held or b"", np.uint8), count=lists).astype(bool)
        if (owners_R[held_R] >= 0).any():
            return None
        owners_R[held_R] = place
    return owners_R


def count_connected(copies: Sequence[Copies]) -> dict[str, int]:
    """Give how many replicas can be asked, and how many there are."""
    links = [link for part in copies for link in part.links]
    return {"connected": sum(link.is_connected for link in links), "replicas": len(links)}


def _name(fleet: Fleet) -> str | None:
    # Replicas are found by address; their certificate is that of the service, whichever machine they are on.
    return None if fleet.tls is None else "gsl"
