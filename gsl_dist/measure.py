"""How fast a service answers, always beside a yardstick taken in the same run.

A millisecond measured here is worth nothing on another machine, a ratio within one loop is: so each search is followed
by an echo that goes through the same server and reads the same body.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gsl_dist.errors import GslError
from gsl_dist.hits import Effort
from gsl_dist.wire import QUERY_TYPE, pack_query

_WARM_UP = 50


def measure_latency(
    url: str, queries: NDArray[np.float32], k: int, probes: int, rounds: int, *, binary: bool = False
) -> dict[str, float]:
    """Time single queries over one persistent connection, each followed by an echo of the same body.

    Args:
        url: the service, http only.
        queries: taken one after another, over and over.
        k: neighbours wanted.
        probes: cells to look into.
        rounds: how many searches and echoes to time.
        binary: send raw bytes and not JSON.

    Returns:
        `served_p50_ms`, `served_p99_ms`, `echo_p50_ms`, `echo_p99_ms`.
    """
    kind = QUERY_TYPE if binary else "application/json"
    bodies = [write_body(query, k, probes, binary) for query in queries]
    times: dict[str, list[float]] = {"served": [], "echo": []}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        for turn in range(_WARM_UP + rounds):
            for name, path in (("served", "/v1/search"), ("echo", "/v1/echo")):
                times[name].append(_time_post(connection, path, bodies[turn % len(bodies)], kind))
    finally:
        connection.close()
    kept = {name: 1e3 * np.array(taken[_WARM_UP:]) for name, taken in times.items()}
    return {f"{name}_p{p}_ms": float(np.percentile(ms, p)) for name, ms in kept.items() for p in (50, 99)}


def measure_throughput(
    search: Callable[[NDArray[np.float32]], Any], queries: NDArray[np.float32], batch: int, rounds: int
) -> float:
    """Give the queries a second that `search` answers, one batch after another; the median of the rounds."""
    batches = [queries[start : start + batch] for start in range(0, len(queries), batch)]
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for part in batches:
            search(part)
        rates.append(len(queries) / (time.perf_counter() - start))
    return statistics.median(rates)


def write_body(query: NDArray[np.float32], k: int, probes: int, binary: bool) -> bytes:
    """Give the body that asks for the neighbours of one query."""
    if binary:
        return pack_query(query[None], Effort(k, probes))
    return json.dumps({"vectors": [query.tolist()], "k": k, "probes": probes}).encode()


def _time_post(connection: http.client.HTTPConnection, path: str, body: bytes, kind: str) -> float:
    start = time.perf_counter()
    connection.request("POST", path, body, {"content-type": kind})
    answer = connection.getresponse()
    content = answer.read()
    taken = time.perf_counter() - start
    if answer.status != 200:
        raise GslError(f"{path} answered {answer.status}: {content[:200]!r}")
    return taken
