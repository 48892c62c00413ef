"""This project beside what else there is, on real vectors: recall, time, memory and building, one core for all.

    OMP_NUM_THREADS=1 python benchmarks/peers.py build sift100k [--only WORD ...] [--seeds 1]
    OMP_NUM_THREADS=1 python benchmarks/peers.py time sift100k [--only WORD ...] [--rounds 5]

`build` makes every index that is not there yet, each in a process of its own, and asks it all queries at every effort:
a line of results/peers/DATA.jsonl holds recall, codes looked at, seconds, the highest resident memory and the size of
the file. `time` opens all indexes in one process that is held to one core, and goes through all of them at every
effort, round after round, so that noise strikes all alike: 10 neighbours a query in batches of 100 and one at a time,
and 100 neighbours in batches. What is counted is the time of the core, waiting for it apart: as all run on one, that is
what a query takes on a machine with nothing else to do. results/peers/DATA-times.json holds every round.

pip install ".[bench]"; a contender whose package is missing is named and passed over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from contenders import Array, Contender, Effort, Opened, make_faiss, make_ours, refine_faiss, refine_ours
from record import RESULTS, write_result
from rivals import make_hnswlib, make_lance, make_scann, make_usearch
from vectors import SUMS, Vectors, open_vectors

from gsl_dist.demo import read_commit
from gsl_dist.evaluate import recall_at

BUILT = Path("build/bench/peers").absolute()  # ScaNN notes where its files are
FILES = RESULTS / "peers"
BATCH = 100
FAR_S = 0.02  # of a query: what takes longer is measured on few queries
SIZES = {"photos": (8, 16), "sift100k": (8, 16), "glove": (10, 25), "cifar": (8, 16)}
CELLS = {"photos": 4096, "sift100k": 1024, "glove": 2048, "cifar": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "time"])
    parser.add_argument("data", choices=list(SUMS))
    parser.add_argument("--only", nargs="*", default=[""], help="contenders whose name has one of these words")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    FILES.mkdir(parents=True, exist_ok=True)
    faiss.omp_set_num_threads(1)
    if wanted.what == "build":
        build_all(wanted)
    else:
        time_all(wanted)


def list_contenders(data: str, dim: int) -> dict[str, Contender]:
    """Give what is compared on some data, by name."""
    cells, made = CELLS[data], {}
    for size in SIZES[data]:
        made |= list_faiss(size, cells, dim) | list_ours(size, cells, dim)
        made[f"lancedb ivf-pq {size}b {cells}"] = lance = make_lance(cells, size, dim, raw=False)
    made[f"lancedb ivf-pq {size}b {cells} + raw"] = make_lance(
        cells, size, dim, raw=True, shares=f"lancedb ivf-pq {size}b {cells}"
    )
    assert lance is not None
    made[f"faiss ivf-rabitq {cells}"] = make_faiss(f"IVF{cells},RaBitQ", dim / 8 + 8)
    made["hnswlib 16 + raw"] = make_hnswlib(16, dim)
    made |= {
        f"usearch 16 + {keeps}": make_usearch(16, dim, kept) for kept, keeps in (("f16", "float16"), ("i8", "int8"))
    }
    made[f"scann {cells // 2}"] = make_scann(cells // 2, dim, raw=False)
    made[f"scann {cells // 2} + raw"] = make_scann(cells // 2, dim, raw=True)
    return made


def list_faiss(size: int, cells: int, dim: int) -> dict[str, Contender]:
    """Give what faiss builds of codes of one size."""
    kept = size * max(1, min(dim // size, 8))  # 8 dims a byte, as faiss's guide has it
    made = {
        f"faiss ivf-pq {size}b {cells}": make_faiss(f"IVF{cells},PQ{size}np", size),
        f"faiss ivf-pq {size}b {4 * cells} hnsw": make_faiss(f"IVF{4 * cells}_HNSW32,PQ{size}np", size, hnsw=True),
        f"faiss opq {size}b {cells}": make_faiss(f"OPQ{size}_{kept},IVF{cells},PQ{size}np", size),
    }
    if dim % (2 * size) == 0:
        scan = f"faiss fast-scan {size}b {cells}"
        made[scan] = make_faiss(f"IVF{cells},PQ{2 * size}x4fsr", size)
        made[f"faiss opq fast-scan {size}b {cells}"] = make_faiss(
            f"OPQ{2 * size}_{dim},IVF{cells},PQ{2 * size}x4fsr", size
        )
        made[f"{scan} + int8"] = refine_faiss(made[scan], scan, "int8", size + dim)
        made[f"{scan} + raw"] = refine_faiss(made[scan], scan, "raw", size + 4 * dim)
    return made


def list_ours(size: int, cells: int, dim: int) -> dict[str, Contender]:
    """Give what this project builds of codes of one size."""
    product = {"kind": "opq", "sub_vectors": size, "cells": cells, "rotation_iterations": 20}
    lines = {"kind": "vlq", "sub_vectors": size, "cells": cells // 2, "edges": 16}
    sums = {"kind": "rq", "books": size, "joint_iterations": 6}
    made = {
        f"ours opq {size}b {cells}": make_ours(product),
        f"ours opq {size}b {cells // 2}": make_ours(product | {"cells": cells // 2}),
        f"ours opq {size}b {cells} ranked": make_ours(product, ranked="exact"),
        f"ours pq {size}b {4 * cells} hnsw": make_ours(
            {"kind": "pq", "sub_vectors": size, "cells": 4 * cells}, coarse="hnsw"
        ),
        f"ours vlq {size}b {cells // 2}x16": make_ours(lines),
        f"ours vlq {size}b {cells}x16": make_ours(lines | {"cells": cells}),
        f"ours vlq {size}b {cells // 2}x16 ranked": make_ours(lines, ranked="exact"),
        f"ours cq {size}b {cells} ranked": make_ours(sums | {"cells": cells, "residual": False}, ranked="tables"),
    }
    refined = [f"ours opq {size}b {cells} ranked", f"ours vlq {size}b {cells // 2}x16 ranked"]
    for kind, scanned in itertools.product(("pq", "opq"), (size, 2 * size)):
        if dim % (2 * scanned):
            continue
        words = (product if kind == "opq" else {"kind": kind, "cells": cells}) | {"sub_vectors": 2 * scanned, "bits": 4}
        made[f"ours {kind} fast-scan {scanned}b {cells}"] = make_ours(words)
        made[f"ours {kind} fast-scan {scanned}b {cells} ranked"] = make_ours(words, ranked="exact")
        refined.append(f"ours {kind} fast-scan {scanned}b {cells}")
    for scanned in (size, 2 * size):
        if dim % (2 * scanned) == 0:
            whole = f"ours opq fast-scan {scanned}b {cells // 2} whole"
            words = {"sub_vectors": 2 * scanned, "bits": 4, "cells": cells // 2, "residual": False}
            made[whole] = make_ours(product | words)
            made[f"{whole} + float16"] = refine_ours(made[whole], whole, "float16", dim)
            refined.append(whole)
    for name in refined:
        made[f"{name} + int8"] = refine_ours(made[name], name, "int8", dim)
    return made


def build_all(wanted: argparse.Namespace) -> None:
    path = FILES / f"{wanted.data}.jsonl"
    done = {tuple(json.loads(line)["key"]) for line in path.read_text().splitlines()} if path.exists() else set()
    for seed, name in itertools.product(range(wanted.seeds), list_contenders(wanted.data, find_dim(wanted.data))):
        if (wanted.data, name, seed) in done or not any(word in name for word in wanted.only):
            continue
        # A process of its own: its memory is its own, and so are its libraries' threads.
        task = multiprocessing.get_context("spawn").Process(target=build_one, args=(wanted.data, name, seed))
        task.start()
        task.join()
        if task.exitcode:
            print(f"{name}: not built (exit {task.exitcode})", flush=True)


def find_dim(data: str) -> int:
    return open_vectors(data).dim


def build_one(data: str, name: str, seed: int) -> None:
    """Build an index, ask it everything and write what was found."""
    faiss.omp_set_num_threads(1)
    vectors = open_vectors(data)
    contender = list_contenders(data, vectors.dim)[name]
    folder, started = place_of(data, contender.shares or name, seed), time.perf_counter()
    built = folder / "built"
    if not built.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        contender.build(vectors, seed, folder)
        waited = folder / "waited"
        built_s = time.perf_counter() - started + (float(waited.read_text()) if waited.exists() else 0)
        built.write_text(str(built_s))
    built_s = float(built.read_text()) if built.read_text() and contender.shares is None else None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    opened = contender.open(folder, vectors)
    points = [measure_point(opened, vectors, effort) for effort in contender.efforts]
    line = {"key": (data, name, seed), "keeps": contender.keeps, "bytes_per_item": contender.bytes_per_item}
    line |= {"build_s": built_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    line |= {"file_bytes": size, "rows": len(vectors.base), "commit": read_commit(), "points": points}
    with (FILES / f"{data}.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    best = max(points, key=lambda point: point["recall10"])
    print(name, seed, f"{built_s or 0:.0f} s", {key: np.round(value, 4) for key, value in best.items()}, flush=True)


def measure_point(opened: Opened, vectors: Vectors, effort: Effort) -> dict[str, Any]:
    point: dict[str, Any] = {"effort": effort}
    for k in (10, 100):
        found = np.concatenate([opened.search(batch, k, effort) for batch in cut_batches(vectors.queries)])
        for at in (1, 10) if k == 10 else (100,):
            point[f"recall{at}"] = recall_at(found, vectors.neighbours[:, :at], at)
        if k == 10:
            point["first_in_10"] = recall_at(found, vectors.neighbours[:, :1], 10)
    if opened.scanned is not None:
        point["scanned"] = opened.scanned(vectors.queries, effort)
    return point


def place_of(data: str, name: str, seed: int) -> Path:
    return BUILT / data / f"{name.replace(' ', '-')}-{seed}"


def cut_batches(queries: Array) -> list[Array]:
    return np.array_split(queries, max(1, len(queries) // BATCH))


def time_all(wanted: argparse.Namespace) -> None:
    """Go round all contenders and efforts, and write every round when it is over."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    vectors = open_vectors(wanted.data)
    opened = {
        name: contender.open(place_of(wanted.data, contender.shares or name, 0), vectors)
        for name, contender in list_contenders(wanted.data, vectors.dim).items()
        if (place_of(wanted.data, contender.shares or name, 0) / "built").exists()
        and any(word in name for word in wanted.only)
    }
    efforts = {name: list_contenders(wanted.data, vectors.dim)[name].efforts for name in opened}
    spent: dict[str, list[dict[str, Any]]] = {
        name: [{"effort": effort, "batch_us": [], "single_us": [], "batch100_us": []} for effort in efforts[name]]
        for name in opened
    }
    for number in range(wanted.rounds):
        for name, index in opened.items():
            for point in spent[name]:
                time_point(index, vectors.queries, point)
        setting = {"data": wanted.data, "rounds": number + 1, "batch": BATCH, "times": spent}
        write_result(f"peers/{wanted.data}-times", setting)
        print(f"round {number + 1} of {wanted.rounds}", flush=True)


def time_point(index: Opened, queries: Array, point: dict[str, Any]) -> None:
    """Add one round's microseconds a query in the three ways of asking."""
    effort = point["effort"]
    each_s = clock(lambda: index.search(queries[:BATCH], 10, effort)) / BATCH
    count = BATCH * int(np.clip(0.1 / (each_s * BATCH), 1, 5))
    batches, singles = cut_batches(queries[-count:]), queries[: int(np.clip(0.1 / each_s, 10, 200)), None]
    if each_s > FAR_S:
        batches, singles = [queries[-10:]], singles[:10]
    for name, parts, k in (("batch_us", batches, 10), ("single_us", singles, 10), ("batch100_us", batches, 100)):

        def ask(parts: Any = parts, k: int = k) -> None:
            for part in parts:
                index.search(part, k, effort)

        point[name].append(1e6 * clock(ask) / sum(len(part) for part in parts))


def clock(action: Callable[[], object]) -> float:
    """Give the seconds of a core that something takes, whichever thread of this process does it."""
    started = time.process_time()
    action()
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
