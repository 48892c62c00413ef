"""Sends a service what is nearly right, over and over, and watches that it neither fails nor hangs nor grows.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py [--requests 100000] [--mutants 40000] [--seed 0]

The service, with replicas and router in one process of its own, is sent mutants of valid requests of every route and
kind of body (`tests/mutants.py`); its resident memory is read at every tenth. First those that write nothing, where all
growth is a leak; then all routes. Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from record import write_result

# The tests' own service and mutants.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from fleets import World
from mutants import attack, list_requests
from worlds import make_index

from gsl_dist.service.reading import Limits

ROWS, PARTS = 400, 10
WRITES = ("/v1/items", "/v1/items/payload", "/v1/items/delete", "/v1/promote", "/v1/compact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="that write nothing")
    parser.add_argument("--mutants", type=int, default=40_000, help="of every route")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    reading = [asked for asked in list_requests() if asked.path not in WRITES]
    result: dict[str, Any] = {"seed": wanted.seed}
    with tempfile.TemporaryDirectory() as folder:
        build_small(folder)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        service = context.Process(target=hold_service, args=(folder, there), daemon=True)
        service.start()
        url, process = here.recv(), psutil.Process(service.pid)
        for name, requests, count in (("reading", reading, wanted.requests), ("all", list_requests(), wanted.mutants)):
            result[name] = watch_attack(url, process, requests, count, wanted.seed)
            print(name, result[name], flush=True)
        here.send("over")
        service.join()
    write_result("fuzz", result)


def watch_attack(url: str, process: psutil.Process, requests: list[Any], count: int, seed: int) -> dict[str, Any]:
    """Send so many mutants in parts, and give the statuses and the memory after each part."""
    statuses, failed, start = Counter[str](), [], time.monotonic()
    resident_mb = [process.memory_info().rss / 2**20]
    for part in range(PARTS):
        found, bad = attack(url, count // PARTS, seed * PARTS + part, requests=requests)
        statuses += Counter({str(status): times for status, times in found.items()})
        failed += bad
        resident_mb.append(process.memory_info().rss / 2**20)
    for status, asked, told in failed[:3]:
        print(status, asked, told, flush=True)
    undocumented = sum(status != 503 for status, _, _ in failed)
    # The first part makes what is made once: pools, tables, what allocators keep.
    return {
        "requests": count,
        "statuses": dict(sorted(statuses.items())),
        "failed": undocumented,
        "resident_mb": np.round(resident_mb, 1).tolist(),
        "grown_mb_after_first_part": round(resident_mb[-1] - resident_mb[1], 1),
        "requests_per_s": round(count / (time.monotonic() - start)),
    }


def build_small(folder: str) -> None:
    """Publish a version of random codes with columns of several types."""
    rows = np.arange(ROWS)
    columns = {"label": rows % 7, "title": [f"title {row}" if row % 5 else None for row in rows], "price": rows / 3}
    columns |= {"when": pa.array(rows, pa.timestamp("s")), "tags": pa.array([[1, row] for row in rows])}
    make_index(Path(folder), payload=pa.table(columns), vectors="float16")


def hold_service(folder: str, way: Connection) -> None:
    """Serve an index until told that it is over."""
    logging.disable()  # thousands of refusals
    world = World(folder, limits=Limits(batch=64, body_bytes=1 << 20))
    way.send(world.url)
    way.recv()
    world.stop()


if __name__ == "__main__":
    main()
