"""How a service answers as more and more is asked of it, and what it costs beside an echo and beside one process.

    OMP_NUM_THREADS=1 python benchmarks/load.py [--services "2 by id" "2 by cell" "1 by id" "4 by id"] [--quick]

A million vectors in four shards, dealt out by id or by cell, held by one, two and four replicas of one thread each.
First as many connections as saturate the service ask without pause; then questions come at random at shares of that
rate from two processes that do not wait for answers (`offered.py`), so that what queues is seen. Those processes take
their time from the same cores.

Claims: the median of one query is at most 2.5 times that of an echo through the
same server; batches of 1,024 reach at least 0.9 of what one process with as many threads does; at 70% of saturation 99
of 100 queries take at most 5 times as long as the median. Writes benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from offered import Answers, ask_at_rate, ask_without_pause, write_post
from record import write_result
from serving import PROBES, SHARDS, K, build_index, compare_latency, compare_throughput, load_vectors

from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.config import Resources
from gsl_dist.index.portions import Sharding
from gsl_dist.index.search import open_searcher
from gsl_dist.measure import write_body
from gsl_dist.wire import QUERY_TYPE

ROWS, ASKERS, CONNECTIONS = 1_000_000, 2, 16
SERVICES = ("2 by id", "2 by cell", "1 by id", "4 by id")
NICENESS = 15
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
KINDS = {"json": "application/json", "binary": QUERY_TYPE}
HIGH = 0.7
TARGETS = {"ratio_to_echo": 2.5, "p99_over_median": 5.0, "batches": 0.9}


def main() -> None:
    """Build once, serve it three ways, measure, write and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer rounds")
    parser.add_argument("--services", nargs="*", default=list(SERVICES), choices=SERVICES, metavar="N by id|cell")
    wanted = parser.parse_args()
    quick = wanted.quick
    base, queries, name = load_vectors(ROWS)
    result: dict[str, Any] = {"vectors": name, "rows": ROWS, "shards": SHARDS, "k": K, "probes": PROBES}
    result |= {"askers": ASKERS, "targets": TARGETS, "services": {}}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder, start_askers() as askers:
        shardings: dict[str, Sharding] = {"id": "id", "cell": "cell"}
        for name, sharding in shardings.items():
            build_index(f"{folder}/{name}", base, sharding)
        del base
        for service in wanted.services:
            replicas, _, sharding_name = service.split()
            measured = measure_service(f"{folder}/{sharding_name}", int(replicas), queries, askers, quick=quick)
            result["services"][service] = measured
            print_load(service, measured)
            write_result("load", result)
    ray.shutdown()


def start_askers() -> Pool:
    """Start the processes that ask, as nice as Ray makes its workers: others are served before whom they ask."""
    return multiprocessing.get_context("spawn").Pool(ASKERS, os.nice, (NICENESS,))


def measure_service(
    folder: str, replicas: int, queries: NDArray[np.float32], askers: Pool, *, quick: bool
) -> dict[str, Any]:
    """Serve the index with so many replicas and measure it in every way."""
    config = ServeConfig(index=folder, port=0, replicas=replicas, resources=Resources(cpus=1))
    service = serve(config)
    try:
        local = open_searcher(folder, threads=replicas)
        measured = {
            "single": compare_latency(service.url, queries, 5, 200 if quick else 300),
            "batches": compare_throughput(service, local, queries, 5 if quick else 7),
        }
        del local
        measured["load"] = {
            body: measure_load(service.url, body, queries, askers, 1.0 if quick else 2.0, 1 if quick else 3)
            for body in KINDS
        }
        return measured
    finally:
        stop_service()


def measure_load(
    url: str, body: str, queries: NDArray[np.float32], askers: Pool, seconds: float, rounds: int
) -> dict[str, Any]:
    """Find the rate that saturates the service, and offer it shares of that."""
    requests = [
        write_post(url, "/v1/search", KINDS[body], write_body(query, K, PROBES, body == "binary"))
        for query in queries[:500]
    ]

    def saturate() -> dict[str, Any]:
        given = [(url, requests, CONNECTIONS, seconds)] * ASKERS
        return summarize_answers(askers.starmap(ask_without_pause, given))

    def offer(rate: float, seed: int) -> dict[str, Any]:
        given = [(url, requests, rate / ASKERS, seconds, ASKERS * seed + asker) for asker in range(ASKERS)]
        return summarize_answers(askers.starmap(ask_at_rate, given))

    saturate()
    start, (busy_s, own_s) = time.monotonic(), count_busy()
    reached, found = list[float](), [list[dict[str, Any]]() for _ in SHARES]
    for number in range(rounds):
        # What saturates the service changes with whatever else runs here: each round finds it anew.
        reached.append(saturate()["answered_per_s"])
        for share, shown in zip(SHARES, found, strict=True):
            shown.append({"offered_per_s": share * reached[-1]} | offer(share * reached[-1], number))
    points = [join_rounds(share, shown) for share, shown in zip(SHARES, found, strict=True)]
    busy_by_all, busy_by_us = (now - before for now, before in zip(count_busy(), (busy_s, own_s), strict=True))
    others = (busy_by_all - busy_by_us) / (time.monotonic() - start)
    shown = {"saturation_per_s": round(statistics.median(reached)), "cores_kept_by_others": round(others, 2)}
    return shown | {"rounds": rounds, "points": points}


def count_busy() -> tuple[float, float]:
    """Give the seconds that cores have worked: for anybody, and for this process and all that it started."""
    whole, own = psutil.cpu_times(), 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has just ended
            own += sum(process.cpu_times()[:2])
    return whole.user + whole.nice + whole.system, own


def join_rounds(share: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the medians of what the rounds showed, and how far the tails lay from the medians."""
    point = {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
    tails = [one["p99_ms"] / one["p50_ms"] for one in found]
    spread = {name: round(pick(tails), 2) for name, pick in (("", statistics.median), ("_min", min), ("_max", max))}
    return {"share": share, **point, **{f"p99_over_median{name}": value for name, value in spread.items()}}


def summarize_answers(parts: list[Answers]) -> dict[str, float]:
    """Give what a point of the curve shows, of all processes that asked."""
    kept_ms = 1e3 * np.concatenate([part.latencies_s[len(part.latencies_s) // 10 :] for part in parts])
    late_ms = 1e3 * np.concatenate([part.late_s for part in parts])
    answered = sum(part.statuses[200] / part.seconds for part in parts)
    other = sum(sum(part.statuses.values()) - part.statuses[200] for part in parts)
    tails = {f"p{p}_ms": float(np.percentile(kept_ms, p)) for p in (50, 99)}
    return {"answered_per_s": answered, **tails, "asked_late_p99_ms": float(np.percentile(late_ms, 99)), "other": other}


def print_load(service: str, measured: dict[str, Any]) -> None:
    print(f"\n{service}: batches {measured['batches']['ratio']} of one process", flush=True)
    for body, found in measured["load"].items():
        single = measured["single"][body]
        print(f"{body}: one query {single['served_p50_ms']} ms, {single['ratio']} times the echo;", end=" ")
        print(f"saturated at {found['saturation_per_s']} a second")
        for point in found["points"]:
            print("   ", {key: point[key] for key in ("share", "offered_per_s", "answered_per_s", "p50_ms", "p99_ms")})


if __name__ == "__main__":
    main()
