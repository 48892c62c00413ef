"""What one core takes for each part of the work: the costs that `gsl plan` adds up, and how well it predicts.

Small runs of several dimensions, cells and code lengths are timed, the least of three rounds: a shard encoded, its
lists built, queries asked one at a time. Costs are fitted to them, none below zero, each run weighing the same however
long it took. How many lists hold the true neighbours is measured on real vectors. Then a run of ten times the rows is
predicted and carried out.

OMP_NUM_THREADS=1 python benchmarks/costs.py [--rows 100000] [--write]      # --write: ship them with the package
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from prepare import cut, open_split
from record import write_result
from scipy.optimize import nnls

from gsl_dist.artefact import Card, publish_card
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode
from gsl_dist.cluster.model import CODEBOOK
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.hits import Effort
from gsl_dist.index.search import open_searcher
from gsl_dist.plan import SHIPPED, Costs, K, Reach, Task, make_plan
from gsl_dist.storage import Folder

PLACE = Path("build/bench/costs")
SHAPES = [(32, 4, 64), (32, 16, 512), (64, 8, 256), (128, 8, 64), (128, 16, 256), (128, 16, 1024), (64, 32, 1024)]
CHECKED = (96, 12, 512)
PROBES, KEPT, QUERIES, BATCH = 8, 10, 200, 20_000
ROUNDS = 3
REACHED = (0.2, 0.99)


class Timed(NamedTuple):
    """What a run took, and of what size it was."""

    rows: int
    dim: int
    code_bytes: int
    cells: int
    encode_s: float
    build_s: float
    index_bytes: int
    points: list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    runs = [measure(rows, *shape) for shape in SHAPES for rows in (wanted.rows // 2, wanted.rows)]
    costs = fit(runs, measure_reach())
    if wanted.write:
        SHIPPED.write_text(costs.model_dump_json(indent=2) + "\n")
    last = measure(10 * wanted.rows, *CHECKED)
    figures = {"costs": costs.model_dump(), "runs": [run._asdict() for run in runs], "fitted_rows": wanted.rows}
    write_result("costs", figures | {"run": last._asdict(), "check": check(costs, last)})


def measure(rows: int, dim: int, code_bytes: int, cells: int) -> Timed:
    """Encode, build and ask, in one process with one thread."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    write_corpus(rows, dim)
    save_codebook(dim, code_bytes, cells)
    tree = {"corpus": {"path": str(PLACE / "corpus.parquet"), "vector_column": "vector"}}
    tree |= {"codebook": str(PLACE / "codebook"), "output": str(PLACE / "codes"), "batch_rows": 8192}
    config = check_config(EncodeConfig, tree)
    encoder = ShardEncoder(config, "timed")
    encoder.encode_shard(0, 0, min(rows, 8192))  # what is done once a process is not counted
    encode_s = min(time_encoding(encoder, rows) for _ in range(ROUNDS))
    run_encode(config)
    places = {name: str(PLACE / name) for name in ("codes", "codebook", "index")}
    build_s = time_build(check_config(BuildConfig, places))
    searcher = open_searcher(str(PLACE / "index"))
    queries = draw(np.random.default_rng(2), QUERIES, dim)
    points = []
    for probes in (1, PROBES, 4 * PROBES):
        found = searcher.lists.index.quantizer.search(queries, probes)[1]
        sizes = np.diff(searcher.lists.offsets)
        scanned = float(sizes[found].sum(1).mean())
        points.append({"probes": probes, "scanned": scanned, "query_us": time_queries(searcher, queries, probes)})
    index_bytes = sum(shard.index.bytes for shard in searcher.manifest.shards)
    timed = Timed(rows, dim, code_bytes, cells, encode_s, build_s, index_bytes, points)
    print(timed, flush=True)
    return timed


def time_encoding(encoder: ShardEncoder, rows: int) -> float:
    started = time.perf_counter()
    encoder.encode_shard(0, 0, rows)
    return time.perf_counter() - started


def time_build(config: BuildConfig) -> float:
    """Time the build of a version without what Ray takes to start: a first one is made, then others."""
    run_build(config)
    spent = []
    for _ in range(ROUNDS):
        shutil.rmtree(PLACE / "index")
        started = time.perf_counter()
        run_build(config)
        spent.append(time.perf_counter() - started)
    return min(spent)


def time_queries(searcher: Any, queries: NDArray[np.float32], probes: int) -> float:
    spent = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for query in queries:
            searcher.find(query[None], Effort(KEPT, probes, 1))
        spent.append((time.perf_counter() - started) / len(queries))
    return 1e6 * min(spent)


def fit(runs: list[Timed], reach: Reach) -> Costs:
    """Give the costs that make the relative errors of all runs least."""
    encode = solve(
        [[1e-6 * r.rows, 1e-9 * r.rows * r.dim, 1e-9 * r.rows * r.dim * (r.cells + K)] for r in runs],
        [r.encode_s for r in runs],
    )
    build = solve([[1, 1e-6 * r.rows, 1e-9 * r.rows * r.code_bytes] for r in runs], [r.build_s for r in runs])
    asked = [(run, point) for run in runs for point in run.points]
    query = solve(
        [
            [1, *(1e-3 * r.dim * count for count in (r.cells, K)), *(1e-3 * r.code_bytes * count for count in looked)]
            for r, p in asked
            for looked in [(p["probes"] * K, p["scanned"])]
        ],
        [point["query_us"] for _, point in asked],
    )
    return Costs(
        made_on=f"{os.cpu_count()} cores of {platform.machine()}",
        encode_row_us=encode[0],
        encode_float_ns=encode[1],
        compare_ns=encode[2],
        build_shard_s=build[0],
        build_row_us=build[1],
        build_byte_ns=build[2],
        query_us=query[0],
        coarse_ns=query[1],
        table_ns=query[2],
        probe_ns=query[3],
        scan_ns=query[4],
        refine_us=measure_refine(),
        reach=reach,
    )


def solve(terms: list[list[float]], taken: list[float]) -> list[float]:
    weights = 1 / np.asarray(taken)[:, None]
    return [float(cost) for cost in nnls(np.asarray(terms) * weights, np.ones(len(taken)))[0]]


def measure_refine() -> float:
    """Give the microseconds to measure one candidate by a kept vector of 128 dimensions."""
    from gsl_dist.index.refine import keep_vectors, measure_exactly

    rng = np.random.default_rng(0)
    store = keep_vectors(np.arange(100_000), draw(rng, 100_000, 128), "float16")
    queries, ids = draw(rng, QUERIES, 128), rng.integers(100_000, size=(QUERIES, 40))
    measure_exactly(queries[:1], ids[:1], [store])  # compiles what is compiled
    started = time.perf_counter()
    for query, candidates in zip(queries, ids, strict=True):
        measure_exactly(query[None], candidates[None], [store])
    return 1e6 * (time.perf_counter() - started) / ids.size


def measure_reach() -> Reach:
    """Fit how the share of true neighbours in probed lists grows, on descriptors of photographs."""
    split = cut(open_split("sift"), None)
    terms, odds, crowding = [], [], []
    for cells in (128, 256, 512, 1024, 2048):
        trained = faiss.Kmeans(split.database.shape[1], cells, niter=10, seed=0, max_points_per_centroid=256)
        trained.train(split.database)
        own_N = trained.index.search(split.database, 1)[1][:, 0]
        _, probed = trained.index.search(split.queries, cells)
        rank_QC = np.argsort(probed, axis=1)
        place_Qk = np.take_along_axis(rank_QC, own_N[split.neighbours[:, :KEPT]], axis=1)
        sizes = np.bincount(own_N, minlength=cells)
        for probes in (1, 2, 4, 8, 16, 32, 64, 128):
            share = float((place_Qk < probes).mean())
            if REACHED[0] < share < REACHED[1]:
                terms.append([1.0, np.log(probes), np.log(cells)])
                odds.append(np.log(share / (1 - share)))
                crowding.append(sizes[probed[:, :probes]].sum(1).mean() * cells / probes / len(own_N))
    constant, by_probes, by_cells = np.linalg.lstsq(np.asarray(terms), np.asarray(odds), rcond=None)[0]
    worst = np.abs(np.asarray(terms) @ [constant, by_probes, by_cells] - odds).max()
    print(f"reach: log odds within {worst:.2f}", flush=True)
    return Reach(constant=constant, by_probes=by_probes, by_cells=by_cells, crowding=float(np.mean(crowding)))


def check(costs: Costs, run: Timed) -> dict[str, dict[str, float]]:
    """Compare a run with what was predicted for it."""
    task = Task(rows=run.rows, dim=run.dim, code_bytes=run.code_bytes, cells=run.cells, cores=1)
    plan = make_plan(task, costs)
    point = run.points[-1]
    scanned = costs.scan_us(int(point["probes"]), point["scanned"], run.code_bytes)
    query = costs.prepare_us(run.dim, run.cells) + scanned
    pairs = {
        "encode_s": (3600 * plan.encode_hours, run.encode_s),
        "build_s": (3600 * plan.build_hours, run.build_s),
        "index_bytes": (2**30 * plan.disk_gb, run.index_bytes),
        "query_us": (query, point["query_us"]),
    }
    found = {name: {"predicted": p, "measured": m, "off": p / m - 1} for name, (p, m) in pairs.items()}
    print(found, flush=True)
    return found


def draw(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    centres = np.random.default_rng(9).normal(size=(500, dim)) * 2
    return (centres[rng.integers(500, size=rows)] + rng.normal(size=(rows, dim))).astype(np.float32)


def write_corpus(rows: int, dim: int) -> None:
    rng, schema = np.random.default_rng(0), pa.schema([("vector", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(PLACE / "corpus.parquet", schema) as writer:
        for start in range(0, rows, BATCH):
            flat = pa.array(draw(rng, min(BATCH, rows - start), dim).ravel())
            writer.write_table(pa.table([pa.FixedSizeListArray.from_arrays(flat, dim)], schema=schema))


def save_codebook(dim: int, code_bytes: int, cells: int) -> None:
    """Make a codebook of rows as centroids and random codewords: what it costs does not depend on how good it is."""
    rng = np.random.default_rng(1)
    coarse = draw(rng, cells, dim)
    books = rng.normal(size=(code_bytes, 256, dim // code_bytes))
    folder = Folder(PLACE / "codebook")
    codebook = Codebook(coarse, books, residual=True)
    codebook.save(folder, CODEBOOK)
    facts = {"codebook_fingerprint": codebook.fingerprint, "source": "fitted"}
    publish_card(folder, Card(kind="codebook", made_by="timed", files=[folder.pin(CODEBOOK)], config={}, facts=facts))


if __name__ == "__main__":
    main()
