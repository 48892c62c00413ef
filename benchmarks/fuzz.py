"""Sends a service what is nearly right, over and over, and watches that it neither fails nor hangs nor grows.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py [--requests 100000] [--mutants 40000] [--messages 100000] [--seed 0]

The service, with replicas and router in one process of its own, is sent mutants of valid requests of every route and
kind of body (`tests/mutants.py`); its resident memory is read at every tenth. First those that write nothing, where all
growth is a leak; then all routes; then messages of the gRPC door. Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
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
from mutants import attack, attack_rpc, list_requests
from worlds import make_index

from gsl_dist.service.reading import Limits
from gsl_dist.service.rpc import RpcDoor

Attack = Callable[..., tuple[dict[Any, int], list[tuple[Any, ...]]]]
"""Sends so many mutants of a seed, and gives how often which status came, and what failed."""

ROWS, PARTS = 400, 10
WRITES = ("/v1/items", "/v1/items/payload", "/v1/items/delete", "/v1/promote", "/v1/compact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="that write nothing")
    parser.add_argument("--mutants", type=int, default=40_000, help="of every route")
    parser.add_argument("--messages", type=int, default=100_000, help="of the gRPC door")
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
        (url, place), process = here.recv(), psutil.Process(service.pid)
        attacks: dict[str, tuple[int, Attack]] = {
            "reading": (wanted.requests, functools.partial(attack, url, requests=reading)),
            "all": (wanted.mutants, functools.partial(attack, url)),
            "rpc": (wanted.messages, functools.partial(attack_rpc, place)),
        }
        for name, (count, send) in attacks.items():
            result[name] = watch_attack(send, process, count, wanted.seed)
            print(name, result[name], flush=True)
        here.send("over")
        service.join()
    write_result("fuzz", result)


def watch_attack(send: Attack, process: psutil.Process, count: int, seed: int) -> dict[str, Any]:
    """Send so many mutants in parts, and give the statuses and the memory after each part."""
    statuses, failed, start = Counter[str](), [], time.monotonic()
    resident_mb = [process.memory_info().rss / 2**20]
    for part in range(PARTS):
        found, bad = send(count=count // PARTS, seed=seed * PARTS + part)
        statuses += Counter({str(status): times for status, times in found.items()})
        failed += bad
        resident_mb.append(process.memory_info().rss / 2**20)
    for failure in failed[:3]:
        print(*failure, flush=True)
    undocumented = sum(failure[0] != 503 for failure in failed)
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
    world = World(folder, rpc=RpcDoor, limits=Limits(batch=64, body_bytes=1 << 20))
    way.send((world.url, f"127.0.0.1:{world.rpc.port}"))
    way.recv()
    world.stop()


if __name__ == "__main__":
    main()
