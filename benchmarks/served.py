"""The served system beside what else answers over a wire: recall against latency and throughput, two cores for all.

    OMP_NUM_THREADS=1 python benchmarks/served.py build [--rows 100000] [--only WORD ...]
    OMP_NUM_THREADS=1 python benchmarks/served.py time [--rows 100000] [--only WORD ...] [--rounds 5]

`build` makes every index that is not there yet. `time` starts one system after another, round after round, and asks it
at every effort in three ways: one query at a time by one client, 1,024 queries by one call where there is such a call,
and one query at a time by each of four clients, processes of their own. Servers and clients share the two cores. What a
client does to ask and to read the answer counts, as its users have it. Recall is the share of the true 10 nearest that
are found. Every round of a system is a line of results/served-ROWS.jsonl; what is there is not measured again. It
tells how many cores other jobs kept busy meanwhile.

Vectors are those of `serving.py`. pip install ".[peers]"; a system that cannot be built for want of a package or of a
server is named, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
from databases import Lance, Milvus, Postgres
from systems import PROBES, REFINED, Array, Asker, Effort, Ours, Pickled, System

from gsl_dist.evaluate import recall_at

BUILT, RESULTS = Path("build/bench/served").absolute(), Path(__file__).parent / "results"
CELLS = {100_000: 512, 1_000_000: 2048}
K, BATCH, CLIENTS, DIM = 10, 1024, 4, 128
SINGLES, SINGLES_S, BATCHES_S, CROWD_S = (100, 400), 1.0, 0.7, 0.8
ALIKE = 0.97
WIDTHS = tuple((width,) for width in (10, 16, 32, 64, 128, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "time"])
    parser.add_argument("--rows", type=int, choices=list(CELLS), default=min(CELLS))
    parser.add_argument("--only", nargs="*", default=[""], help="systems whose name has one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    names = [name for name in list_systems(wanted.rows) if any(word in name for word in wanted.only)]
    done = {tuple(line["key"]) for line in read_lines(wanted.rows)}
    prepare_data(wanted.rows)
    turns = [("build", -1)] if wanted.what == "build" else [("time", number) for number in range(wanted.rounds)]
    for (what, number), name in itertools.product(turns, names):
        if (what, name, number) in done:
            continue
        # A process of its own: Ray, caches and threads of one system are gone when the next one starts.
        work = build_one if what == "build" else time_one
        task = multiprocessing.get_context("spawn").Process(target=work, args=(wanted.rows, name, number))
        task.start()
        task.join()
        if task.exitcode:
            print(f"{name}: not measured (exit {task.exitcode})", flush=True)


def list_systems(rows: int) -> dict[str, System]:
    """Give what is compared among so many rows, by name."""
    cells, raw = CELLS[rows], 4 * DIM
    pq = {"kind": "pq", "sub_vectors": 16}
    whole = {"kind": "opq", "sub_vectors": 32, "bits": 4, "residual": False}
    ours = Ours("ours pq", "codes", 16, PROBES, cells, quantizer=pq)
    best = Ours("ours opq 4 bits + float16", "float16", 16 + 2 * DIM, REFINED, cells // 2, quantizer=whole)
    best = replace(best, vectors="float16", layout="fastscan")
    table = Lance("LanceDB ivf-pq", "codes", 16, PROBES, cells)
    found = [
        ours,
        replace(ours, name="ours pq + int8", keeps="int8", bytes_per_item=16 + DIM, efforts=REFINED, vectors="int8"),
        best,
        *(replace(best, name=f"{best.name}, {body}", body=body, efforts=REFINED[1::2]) for body in ("bytes", "json")),
        Pickled("pickled pq", "codes", 16, PROBES, cells, "IVF{cells},PQ16np"),
        Pickled("pickled pq + int8", "int8", 16 + DIM, REFINED, cells, "IVF{cells},PQ16np,Refine(SQ8)"),
        Pickled(
            "pickled fast-scan + float16",
            "float16",
            16 + 2 * DIM,
            REFINED,
            cells,
            "IVF{cells},PQ32x4fsr,Refine(SQfp16)",
        ),
        table,
        replace(table, name="LanceDB ivf-pq + raw", keeps="raw", bytes_per_item=16 + raw, efforts=REFINED),
        *list_databases(cells, raw),
    ]
    return {system.name: system for system in found}


def list_databases(cells: int, raw: int) -> list[System]:
    """Give those that know no codes of some bytes."""
    graph, lists = {"M": 16, "efConstruction": 200}, {"nlist": cells}
    hnsw = "hnsw (embedding vector_l2_ops) with (m = 16, ef_construction = 200)"
    ivf = f"ivfflat (embedding vector_l2_ops) with (lists = {cells})"
    # A graph has two links a level for each, on the lowest: 4 bytes in faiss, 6 in pgvector, whose indexes hold the
    # vectors a second time.
    return [
        Milvus("Milvus Lite hnsw", "raw", raw + 8 * 16, WIDTHS, 0, "HNSW", graph, "ef"),
        Milvus("Milvus Lite ivf-sq8", "int8", DIM, PROBES, cells, "IVF_SQ8", lists, "nprobe"),
        Postgres("pgvector hnsw", "raw", 2 * raw + 12 * 16, WIDTHS, 0, hnsw, "hnsw.ef_search"),
        Postgres("pgvector ivfflat", "raw", 2 * raw, PROBES, cells, ivf, "ivfflat.probes"),
    ]


# vectors and results


def prepare_data(rows: int) -> None:
    """Write base, queries and true neighbours once."""
    folder = BUILT / str(rows)
    if (folder / "asked.npz").exists():
        return
    # Here, since every client imports this module: those two take seconds to load.
    import faiss
    from serving import load_vectors

    base, queries, name = load_vectors(rows)
    queries = queries[:1000]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "base.npy", base)
    exact = faiss.IndexFlatL2(base.shape[1])
    exact.add(base)
    np.savez(folder / "asked.npz", queries=queries, neighbours=exact.search(queries, K)[1], name=name)


def open_asked(rows: int) -> tuple[Array, Array, str]:
    """Give queries, their true neighbours and what the vectors are called."""
    arrays = np.load(BUILT / str(rows) / "asked.npz")
    return arrays["queries"], arrays["neighbours"], str(arrays["name"])


def place_of(rows: int, name: str) -> Path:
    """Give the folder of an index; who differs in how it is asked alone shares one."""
    return BUILT / str(rows) / name.partition(",")[0].replace(" ", "-")


def read_lines(rows: int) -> Iterator[dict[str, Any]]:
    path = RESULTS / f"served-{rows}.jsonl"
    yield from map(json.loads, path.read_text().splitlines() if path.exists() else [])


def write_line(rows: int, line: dict[str, Any]) -> None:
    from gsl_dist.demo import read_commit

    kept = {"commit": read_commit(), "cores": os.cpu_count(), "vectors": open_asked(rows)[2]}
    with (RESULTS / f"served-{rows}.jsonl").open("a") as stream:
        stream.write(json.dumps(line | kept) + "\n")


# what is measured


def build_one(rows: int, name: str, number: int) -> None:
    """Build an index unless it is there, and write what it took."""
    system, folder = list_systems(rows)[name], place_of(rows, name)
    if not (folder / "built").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        base, started = np.load(BUILT / str(rows) / "base.npy"), time.perf_counter()
        try:
            system.build(base, folder)
        except (ImportError, SystemExit) as error:
            print(f"{name}: cannot be built here: {error}", flush=True)
            write_line(rows, {"key": ("missing", name, number), "reason": str(error)})
            return
        (folder / "built").write_text(str(time.perf_counter() - started))
    built_s = float((folder / "built").read_text())
    # What PostgreSQL wrote ahead is no part of the index.
    files = (path for path in folder.rglob("*") if path.is_file() and "pg_wal" not in path.parts)
    size = sum(path.stat().st_size for path in files)
    facts = {"wire": system.wire, "software": system.software, "keeps": system.keeps, "cells": system.cells}
    facts |= {"bytes_per_item": system.bytes_per_item, "file_bytes": size, "build_s": built_s}
    write_line(rows, {"key": ("build", name, number)} | facts)
    print(f"{name}: {built_s:.0f} s, {size / rows:.0f} bytes an item on disk", flush=True)


def time_one(rows: int, name: str, number: int) -> None:
    """Start a system, ask it at every effort, and write one round."""
    system, (queries, neighbours, _) = list_systems(rows)[name], open_asked(rows)
    # Here, since every client imports this module: it takes seconds to load.
    from load import count_busy

    spawn = multiprocessing.get_context("spawn")
    with system.serve(place_of(rows, name)) as address, spawn.Pool(CLIENTS, connect_here, (system, address)) as crowd:
        asker = system.connect(address)
        points, started, (busy_s, own_s) = [], time.monotonic(), count_busy()
        for effort in system.efforts:
            points.append(measure_point(asker, crowd, queries, neighbours, effort))
            shown = {word: round(value, 3) for word, value in points[-1].items() if word != "effort"}
            print(number, name, effort, shown, flush=True)
        asker.close()
        busy_by_all, busy_by_us = (now - before for now, before in zip(count_busy(), (busy_s, own_s), strict=True))
        others = (busy_by_all - busy_by_us) / (time.monotonic() - started)
    write_line(rows, {"key": ("time", name, number), "points": points, "cores_kept_by_others": round(others, 2)})


def measure_point(asker: Asker, crowd: Pool, queries: Array, neighbours: Array, effort: Effort) -> dict[str, Any]:
    """Ask in every way at one effort; what recall is counted by warms the system up."""
    point: dict[str, Any] = {"effort": effort}
    if asker.has_batches:
        found = asker.ask_batch(queries, K, effort)
    else:
        found = np.stack([fill(asker.ask_one(query, K, effort)) for query in queries])
    point["recall10"] = recall_at(found, neighbours, K)
    spent_s, alike = time_singles(asker, queries, found, effort)
    if alike < ALIKE:
        raise SystemExit(f"one at a time and in a batch, answers agree in {alike:.3f} only")
    point |= {"p50_ms": 1e3 * np.percentile(spent_s, 50), "p99_ms": 1e3 * np.percentile(spent_s, 99)}
    point["singles"] = len(spent_s)
    if asker.has_batches:
        point["batch_qps"] = time_batches(asker, np.resize(queries, (BATCH, queries.shape[1])), effort)
    starts = np.linspace(0, len(queries), CLIENTS, endpoint=False).astype(int)
    told = crowd.starmap(ask_here, [(np.roll(queries, -start, axis=0), effort) for start in starts])
    return point | {"crowd_qps": sum(count for count, _ in told) / max(seconds for _, seconds in told)}


def time_singles(asker: Asker, queries: Array, found: Array, effort: Effort) -> tuple[list[float], float]:
    """Give the seconds of each query, and the share of its answers that the batch had too."""
    spent_s, alike = list[float](), list[float]()
    for query, expected in zip(queries[: SINGLES[1]], found, strict=False):
        if len(spent_s) >= SINGLES[0] and sum(spent_s) > SINGLES_S:
            break
        started = time.perf_counter()
        ids = asker.ask_one(query, K, effort)
        spent_s.append(time.perf_counter() - started)
        alike.append(np.isin(ids, expected).mean())
    return spent_s, float(np.mean(alike))


def time_batches(asker: Asker, queries: Array, effort: Effort) -> float:
    """Give the queries a second of batches, one after another."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < BATCHES_S:
        asker.ask_batch(queries, K, effort)
        count += len(queries)
    return count / (time.perf_counter() - started)


def fill(ids: Array) -> Array:
    """Give k ids, -1 where fewer were found."""
    return np.pad(ids[:K], (0, K - len(ids[:K])), constant_values=-1)


# in each client's process

_asker: Asker | None = None


def connect_here(system: System, address: Any) -> None:
    global _asker
    _asker = system.connect(address)


def ask_here(queries: Array, effort: Effort) -> tuple[int, float]:
    """Ask one query after another for a while; give how many were answered, and in how many seconds."""
    assert _asker is not None
    _asker.ask_one(queries[-1], K, effort)
    started = time.perf_counter()
    for count, query in enumerate(itertools.cycle(queries)):
        if (seconds := time.perf_counter() - started) > CROWD_S:
            return count, seconds
        _asker.ask_one(query, K, effort)
    raise AssertionError("a cycle has no end")


if __name__ == "__main__":
    main()
