"""What stages would take on up to a thousand machines, and what a query would that asks them all, from measured costs.

    OMP_NUM_THREADS=1 python benchmarks/simulate.py [--kept]

Sums, not events: each stage takes what its slowest part takes (computing, reading, what goes through one process), and
a query takes what the slowest of those takes that it asks. What one core takes for a row or a code is what `gsl plan`
goes by (`gsl_dist/costs.json`); what the driver, the coordinator and a router take is measured here, and so is how much
longer than usual a replica takes now and then. What machines, network and store are is assumed, and said. With one and
two workers the same sums are compared with what `scaling.py` measured. Writes benchmarks/results/simulate.json;
`--kept` takes the costs that are in it already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import RESULTS, write_result

# The tests' own service and index.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from fleets import World
from worlds import make_index

from gsl_dist.client import Client
from gsl_dist.cluster.session import run_tasks, start_session
from gsl_dist.config import Resources
from gsl_dist.index.manifest import open_version, publish_version
from gsl_dist.index.search import open_searcher
from gsl_dist.plan import ID_BYTES, REFINE, K, Plan, Task, load_costs, make_plan
from gsl_dist.quantizers.kmeans import Stats
from gsl_dist.service.replica import Replica
from gsl_dist.storage import Folder

ROWS, DIM, CODE_BYTES, CELLS, RECALL = 10**10, 128, 16, 65_536, 0.9
MACHINES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ASSUMED = {
    "cores": 16,
    "memory_gb": 64,
    "network_gb_s": 1.25,
    "store_gb_s": 0.6,
    "store_limit_gb_s": 100.0,
    "round_trip_ms": 0.3,
    "slow_share": 0.005,
    "slow_times": 10.0,
    "days_between_failures": 30.0,
    "replaced_after_s": 60.0,
}
"""Of each machine, but the limit of the store as a whole; a slow machine is slow all the time."""
SAMPLE_PER_CELL, ITERATIONS, FAN_IN, SHARDS_A_WORKER = 64, 20, 8, 4
NOTE_BYTES, ENTRY_BYTES, KEPT_BYTES = 400, 700, 2
HEDGES = (None, 0.9, 0.95, 0.99)
DRAWS, POINTS, MEASURED_S = 400_000, 1001, 12.0
GB = 1e9


def main() -> None:
    """Measure, simulate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="store_true", help="take the costs that were measured last")
    path = RESULTS / "simulate.json"
    measured = json.loads(path.read_text())["measured"] if parser.parse_args().kept else measure_costs()
    rng = np.random.default_rng(0)
    result = {"rows": ROWS, "dim": DIM, "code_bytes": CODE_BYTES, "cells": CELLS, "assumed": ASSUMED}
    result |= {"measured": measured, "stages": [simulate_stages(machines, measured) for machines in MACHINES]}
    result["fan_out"] = [simulate_query(parts, measured, rng) for parts in MACHINES]
    write_result("simulate", result | {"checks": check_measured()})
    for line in (*result["stages"], *result["fan_out"]):
        print(line)


def simulate_stages(machines: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Give the seconds of each stage with so many machines, by what takes them, and the bytes through one process."""
    workers = machines * int(ASSUMED["cores"])
    plan = lay_plan(machines)
    stages = {
        "codebook": simulate_codebook(machines, measured),
        "encode": simulate_encode(workers, machines, measured),
        "build": simulate_build(workers, machines, plan, measured),
        "serve": simulate_start(machines, plan, measured),
    }
    for parts in stages.values():
        taken = {name: value for name, value in parts.items() if name.endswith("_s")}
        parts["bottleneck"] = max(taken, key=lambda name: taken[name]).removesuffix("_s")
        # Reading, computing and what the driver does go on side by side; the longest decides.
        parts["seconds"] = max(taken.values())
    return {"machines": machines, **stages}


def lay_plan(machines: int) -> Plan:
    size = {"rows": ROWS, "dim": DIM, "code_bytes": CODE_BYTES, "recall": RECALL, "cells": CELLS, "vectors": 1}
    machine = {"cores": int(ASSUMED["cores"]), "memory_gb": ASSUMED["memory_gb"]}
    return make_plan(Task(**size, machines=machines, **machine), load_costs())


def simulate_codebook(machines: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Give what all iterations take: computing, sending the codebook out, and adding up what comes back.

    A worker has the cores of a machine.

    `flat`: every worker hands its statistics to the coordinator, as it was; `joined`: tasks add them eight at a time.
    """
    sample, number = SAMPLE_PER_CELL * CELLS, 8 * DIM + 16
    compute_s = sample * DIM * (CELLS + K) * load_costs().compare_ns * 1e-9 / (machines * ASSUMED["cores"])
    sent_bytes = 4 * DIM * (CELLS + K)
    # Nodes that have a question pass it on: as many more know it in each round.
    sent_s = math.ceil(math.log2(machines + 1)) * sent_bytes / (ASSUMED["network_gb_s"] * GB)
    of_worker = min(CELLS, sample / machines) * number
    flat_bytes = machines * of_worker
    joined_bytes, joined_s, answers, size = flat_bytes, 0.0, machines, of_worker
    while answers > FAN_IN:
        joined_s += cost_to_take(FAN_IN * size, measured) + measured["task_ms"] * answers / FAN_IN / 1e3
        answers, size = math.ceil(answers / FAN_IN), min(CELLS * number, FAN_IN * size)
        joined_bytes = answers * size
    joined_s += cost_to_take(joined_bytes, measured)
    return {
        "computing_s": ITERATIONS * compute_s,
        "sending_s": ITERATIONS * sent_s,
        "answers_s": ITERATIONS * joined_s,
        "flat_answers": ITERATIONS * cost_to_take(flat_bytes, measured),
        "coordinator_bytes_flat": flat_bytes,
        "coordinator_bytes": joined_bytes,
    }


def cost_to_take(taken: float, measured: dict[str, Any]) -> float:
    """Give the seconds in which one process receives, unpacks and adds statistics."""
    return taken / GB * (1 / ASSUMED["network_gb_s"] + 1 / measured["unpack_gb_s"] + 1 / measured["add_gb_s"])


def simulate_encode(workers: int, machines: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Give what encoding takes; shards are so many that no worker waits long for another's last."""
    shards = min(100_000, max(1000, SHARDS_A_WORKER * workers))
    of_shard_s = load_costs().encode_s(ROWS / shards, DIM, CELLS)
    written = ROWS * (ID_BYTES + 4 + CODE_BYTES + KEPT_BYTES * DIM)
    return {
        "computing_s": math.ceil(shards / workers) * of_shard_s,
        "reading_s": (ROWS * 4 * DIM + written) / store_bytes_s(machines),
        "driver_s": shards * (measured["task_ms"] / 1e3 + measured["note_us"] / 1e6),
        "checking_in_the_driver": written / (measured["hash_gb_s"] * GB),
        "shards": shards,
        "driver_bytes": shards * NOTE_BYTES,
        "driver_bytes_before": written + shards * NOTE_BYTES,
    }


def simulate_build(workers: int, machines: int, plan: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    """Give what building takes, a shard a task; codes are checked and their ids compared before."""
    files = min(100_000, max(1000, SHARDS_A_WORKER * workers))
    stored = ROWS * (ID_BYTES + 4 + CODE_BYTES + KEPT_BYTES * DIM)
    busy = min(workers, plan.shards)
    return {
        "computing_s": load_costs().build_s(ROWS, CODE_BYTES, plan.shards) / busy
        + stored / (busy * GB * measured["hash_gb_s"]),
        "reading_s": (2 * stored + 2 * ID_BYTES * ROWS) / store_bytes_s(machines),
        "driver_s": (2 * files + plan.shards) * measured["task_ms"] / 1e3,
        "shards": plan.shards,
        "driver_bytes": (2 * files + plan.shards) * NOTE_BYTES,
        "manifest_bytes": plan.shards * ENTRY_BYTES,
    }


def simulate_start(machines: int, plan: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    """Give what it takes until all replicas answer: fetching, checking, and the manifest, which everyone reads."""
    held = plan.disk_gb * 2**30 / machines
    return {
        "fetching_s": plan.disk_gb * 2**30 / store_bytes_s(machines),
        "checking_s": held / (measured["hash_gb_s"] * GB),
        "manifest_s": plan.shards * measured["entry_us"] / 1e6,
        "driver_bytes": plan.shards * ENTRY_BYTES,
    }


def store_bytes_s(machines: int) -> float:
    return min(machines * ASSUMED["store_gb_s"], ASSUMED["store_limit_gb_s"]) * GB


def simulate_query(parts: int, measured: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Give what one query takes that asks so many parts of the index, with and without copies that stand in."""
    costs, plan = load_costs(), lay_plan(parts)
    down_s = ASSUMED["replaced_after_s"] + plan.disk_gb * 2**30 / parts / (ASSUMED["store_gb_s"] * GB)
    down = down_s / (ASSUMED["days_between_failures"] * 86_400 + down_s)
    told: dict[str, Any] = {"parts": parts, "down": down}
    # Dealt out by cell, a query asks those parts alone that hold a cell which it probes.
    for sharding, asked in (("by id", parts), ("by cell", parts * (1 - (1 - 1 / parts) ** plan.probes))):
        scanned_us = costs.scan_us(plan.probes, plan.scanned / asked, CODE_BYTES) + costs.refine_us * REFINE * 10
        usual_ms = ASSUMED["round_trip_ms"] + (costs.prepare_us(DIM, CELLS) + scanned_us) / 1e3
        own_ms = (measured["route_us"] + measured["call_us"] * asked) / 1e3
        told[sharding] = {"asked": asked, "replica_ms": usual_ms, "router_ms": own_ms, "router_per_s": 1e3 / own_ms}
        told[sharding] |= {"partial_alone": 1 - (1 - down) ** asked, "partial_of_two": 1 - (1 - down**2) ** asked}
        for hedge in HEDGES:
            took = own_ms + draw_slowest(usual_ms, asked, measured["tail"], hedge, rng)
            name = "alone" if hedge is None else f"hedged after {hedge:.0%}"
            told[sharding][name] = {f"p{p}_ms": float(np.percentile(took, p)) for p in (50, 99, 99.9)}
    return told


def draw_slowest(
    usual_ms: float, asked: float, tail: Sequence[float], hedge: float | None, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw the slowest answer of so many parts, for many queries.

    A part answers in what a replica was measured to take, over its median, and some machines are slower all the time.
    Hedged, a copy is asked as well when an answer takes longer than a share of all answers do; the first one counts.
    """

    def draw(count: int) -> NDArray[np.float64]:
        took = usual_ms * np.interp(rng.random(count), np.linspace(0, 1, len(tail)), tail)
        return took * np.where(rng.random(count) < ASSUMED["slow_share"], ASSUMED["slow_times"], 1)

    single = draw(DRAWS)
    if hedge is not None:
        after = np.quantile(single, hedge)
        single = np.where(single > after, np.minimum(single, after + draw(DRAWS)), single)
    # The largest of n draws is that of one whose place among all is the n-th root of a random one.
    return np.quantile(single, rng.random(20_000) ** (1 / asked), method="inverted_cdf")


def check_measured() -> list[dict[str, Any]]:
    """Compare the sums with what `scaling.py` measured with one and two workers."""
    path, costs = RESULTS / "scaling.jsonl", load_costs()
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    # Their sizes are those of `scaling.py`.
    core_s = {"encode vectors": costs.encode_s(1e6, 64, 1024), "build": costs.build_s(1e7, 16, 8)}
    checks = []
    for stage, seconds in core_s.items():
        own = [line for line in lines if line["stage"] == stage]
        for workers, name in ((1, "one_s"), (2, "two_s")) if own else ():
            measured = statistics.median(line[name] for line in own)
            predicted = seconds / workers
            checks.append({"stage": stage, "workers": workers, "predicted_s": predicted, "measured_s": measured})
    for stage in sorted({line["stage"] for line in lines}):
        # What is expected of two, knowing one and half of it: that what does not halve stays.
        own = [line for line in lines if line["stage"] == stage]
        one, two, half = (statistics.median(line[name] for line in own) for name in ("one_s", "two_s", "half_s"))
        checks.append({"stage": stage, "workers": 2, "from": "one worker", "predicted_s": half, "measured_s": two})
        checks[-1]["one_s"] = one
    return checks


def measure_costs() -> dict[str, Any]:
    """Measure what single processes take: driver, coordinator, router, and whoever opens a version."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure_arrays() | measure_files(Path(folder)) | measure_router(Path(folder))
    start_session(1)
    run_tasks(_do_nothing, [(number,) for number in range(50)], Resources(cpus=0.5))
    start = time.perf_counter()
    run_tasks(_do_nothing, [(number,) for number in range(1000)], Resources(cpus=0.5), at_once=4)
    return found | {"task_ms": time.perf_counter() - start}


def _do_nothing(number: int) -> int:
    return number


def measure_arrays() -> dict[str, float]:
    """Give what adding, unpacking and hashing take, in gigabytes a second."""
    rng = np.random.default_rng(0)
    # Far more than caches hold.
    stats = Stats(np.ones((1, CELLS)), rng.normal(size=(1, CELLS, DIM)), 0.0, 1)
    size, packed = stats.sums_GKd.nbytes / GB, pickle.dumps(stats)
    content = rng.bytes(64 << 20)
    return {
        "add_gb_s": size / clock(lambda: stats + stats),
        "unpack_gb_s": size / clock(lambda: pickle.loads(packed)),  # noqa: S301 - our own bytes
        "hash_gb_s": len(content) / GB / clock(lambda: hashlib.sha256(content).digest()),
    }


def measure_files(place: Path) -> dict[str, float]:
    """Give what a note, and an entry of a manifest, take to read, in microseconds."""
    folder = Folder(place / "notes")
    folder.write_sealed("note.json", {"made_by": "m", "files": [{"name": "n" * 20, "bytes": 1, "sha256": "0" * 64}]})
    manifest, taken = make_index(place / "small", rows=400, shards=2), []
    for shards in (100, 4100):
        entries = [manifest.shards[0].model_copy(update={"name": f"shard-{n:05d}"}) for n in range(shards)]
        index = Folder(place / f"index-{shards}")
        publish_version(index, manifest.model_copy(update={"shards": entries, "version": "v1"}))
        taken.append(clock(partial(open_version, index, "v1")))
    return {
        "note_us": 1e6 * clock(lambda: folder.read_sealed("note.json")),
        "entry_us": 1e6 * (taken[1] - taken[0]) / 4000,
    }


def clock(work: Callable[[], Any], rounds: int = 9) -> float:
    """Give the median time of some calls, after one."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Apart(World):
    """A service whose replicas live in another process, so that what this one takes is the router's."""

    def begin(self, name: str) -> None:
        """Have a replica started."""
        WAY.send(name)
        self.addresses[name] = WAY.recv()


WAY: Connection


def _hold(folder: str, parts: int, way: Connection) -> None:
    """Start replicas, one after another, as they are asked for."""
    from gsl_dist.service.links import spread_shards

    groups = spread_shards(open_searcher(folder).manifest.shards, parts)
    kept = []
    while (name := way.recv()) is not None:
        kept.append(
            Replica(lambda version, shards: open_searcher(folder, version, names=shards), secret="secret", threads=1)
        )
        kept[-1].hold("v1", groups[next(group for group in groups if name.startswith(group))])
        way.send(kept[-1].start())


def measure_router(place: Path) -> dict[str, Any]:
    """Give what a router takes for a query and for each replica that it asks, and how answers of one replica spread."""
    global WAY
    make_index(place / "fan", rows=32 * 200, shards=32)
    own_us, tail = {}, list[float]()
    for parts in (1, 8, 32):
        context = multiprocessing.get_context("spawn")
        WAY, there = context.Pipe()
        process = context.Process(target=_hold, args=(str(place / "fan"), parts, there), daemon=True)
        process.start()
        world = Apart(place / "fan", replicas=parts)
        with Client(world.url) as client:
            ask = partial(client.search, np.ones((1, 16), np.float32), 10, 8)
            clock(ask, rounds=200)
            start, own, times = time.perf_counter(), time.process_time(), list[float]()
            while (begun := time.perf_counter()) < start + MEASURED_S:
                ask()
                times.append(time.perf_counter() - begun)
            own_us[parts] = 1e6 * (time.process_time() - own) / len(times)
        world.stop()
        WAY.send(None)
        process.join()
        if parts == 1:
            tail = (np.quantile(times, np.linspace(0, 1, POINTS)) / np.median(times)).round(4).tolist()
    call_us = (own_us[32] - own_us[8]) / 24
    return {"call_us": call_us, "route_us": own_us[8] - 8 * call_us, "tail": tail, "router_us_by_parts": own_us}


if __name__ == "__main__":
    main()
