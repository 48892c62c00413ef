"""Asks a service at a rate that it does not choose: an open loop, over raw sockets that are kept alive.

Somebody who waits for an answer before asking again asks less of a slow service, and so never sees it queue. Here every
question has its time, drawn beforehand at random; it goes out then, on a connection of its own if all others wait, and
its latency counts from that time, also where this process was late. How late it was is given as well: what it cannot
send in time it cannot measure.

One thread, `select` and no event loop: their timers tick in milliseconds, which is what is measured here.
"""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

_MOST_CONNECTIONS = 100
_CHUNK = 1 << 16
_LAST_S = 10.0


@dataclass
class Answers:
    """What became of the questions of one process.

    Args:
        latencies_s: from the time of each to the end of its answer.
        late_s: from the time of each until it was sent.
        statuses: how many were answered how; 0: the connection broke, or nothing came.
        seconds: from the first question to the last answer.
    """

    latencies_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0


def write_post(url: str, path: str, kind: str, body: bytes) -> bytes:
    """Give a request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: {kind}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def draw_times(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Give the times of questions that come independently of each other."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds))
    return np.cumsum(gaps)


def ask_at_rate(url: str, requests: Sequence[bytes], rate: float, seconds: float, seed: int) -> Answers:
    """Ask so many questions a second, whatever becomes of them."""
    return Crowd(url, requests, _MOST_CONNECTIONS).ask_at(draw_times(rate, seconds, seed).tolist())


def ask_without_pause(url: str, requests: Sequence[bytes], connections: int, seconds: float) -> Answers:
    """Ask on so many connections, on each again as soon as it has its answer."""
    return Crowd(url, requests, connections).ask_for(seconds)


class Crowd:
    """Connections to one service, each with one question at a time.

    Args:
        url: the service, http only.
        requests: taken one after another, over and over.
        most: connections; what comes while all of them wait waits too.
    """

    def __init__(self, url: str, requests: Sequence[bytes], most: int) -> None:
        place = urlsplit(url)
        self._place, self._most = (place.hostname or "", place.port or 80), most
        self._requests = itertools.cycle(requests)
        self._idle: list[socket.socket] = []
        self._busy: dict[socket.socket, tuple[float, bytearray]] = {}
        self._start = 0.0
        self.answers = Answers()

    def ask_at(self, times: Sequence[float]) -> Answers:
        """Ask at times, counted from now."""
        due, self._start = deque(times), time.perf_counter()
        while due or self._busy:
            while due and due[0] <= self._now() and self._has_room():
                self._send(due.popleft())
            # If one is due and every connection waits, the next thing to happen is an answer.
            self._take(max(0.0, due[0] - self._now()) if due and self._has_room() else _LAST_S)
        return self._finish()

    def ask_for(self, seconds: float) -> Answers:
        """Ask on every connection, again as soon as it has its answer, for so long."""
        self._start = time.perf_counter()
        while self._busy or self._now() < seconds:
            while self._has_room() and self._now() < seconds:
                self._send(self._now())
            if self._busy:
                self._take(_LAST_S)
        return self._finish()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _has_room(self) -> bool:
        return len(self._busy) < self._most

    def _finish(self) -> Answers:
        self.answers.seconds = self._now()
        for connection in self._idle:
            connection.close()
        return self.answers

    def _send(self, due: float) -> None:
        connection = self._idle.pop() if self._idle else socket.create_connection(self._place)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers.late_s.append(self._now() - due)
        connection.sendall(next(self._requests))
        self._busy[connection] = due, bytearray()

    def _take(self, wait_s: float) -> None:
        ready, _, _ = select.select(list(self._busy), [], [], wait_s)
        for connection in ready if ready or wait_s < _LAST_S else list(self._busy):
            chunk, answer = connection.recv(_CHUNK) if ready else b"", self._busy[connection][1]
            answer += chunk
            if not chunk or is_whole(answer):
                self._end(connection, int(answer[9:12]) if chunk else 0)

    def _end(self, connection: socket.socket, status: int) -> None:
        due, _ = self._busy.pop(connection)
        self.answers.statuses[status] += 1
        self.answers.latencies_s.append(self._now() - due)
        if status:
            self._idle.append(connection)
        else:
            connection.close()


def is_whole(answer: bytearray) -> bool:
    """Tell whether an answer has come to its end: its length is always announced."""
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    head = bytes(answer[:head_end]).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return len(answer) >= head_end + 4 + length
