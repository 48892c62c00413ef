"""Vector and line quantization against faiss's IVF-PQ: recall by codes scanned and by time, on the same rows.

`vlq` codes take M bytes and one for the level. Beside it stand IVF-PQ with as many cells, with four times as many, with
these found by an HNSW, and with one more byte of codewords where the dimension divides. All are trained on the rows
that they hold. Every contender is searched at several probes, all in turn, several times over, by one thread; the time
of a query is the least of the rounds, in batches of `--batch`. What was measured is written as points of a curve.

OMP_NUM_THREADS=1 python benchmarks/lines.py sift [--rows 100000] [--cells 512] [--edges 16] [--bytes 8] [--seeds 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from prepare import Split, cut, open_split
from record import RESULTS, spread, write_result

from gsl_dist.evaluate import recall_at
from gsl_dist.index.lists import Lists, make_lists
from gsl_dist.quantizers import LineConfig, LloydConfig, make_quantizer, train_codebook

PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KEPT = 100
Search = Callable[[NDArray[np.float32], int], tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class Contender:
    """An index that is searched at so many probes.

    Args:
        search: gives distances and ids of queries at a number of probes.
        scanned: gives the mean number of codes that a query looks at.
        probes: the numbers that it is searched at.
        bytes_per_item: of a code, the id apart.
    """

    search: Search
    scanned: Callable[[NDArray[np.float32], int], float]
    probes: tuple[int, ...]
    bytes_per_item: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    for name, value in {"rows": 100_000, "cells": 512, "edges": 16, "bytes": 8, "seeds": 1, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, default=100)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    split = cut(open_split(wanted.data), wanted.rows)
    runs = [measure(make_contenders(split, wanted, seed), split, wanted) for seed in range(wanted.seeds)]
    curves = {
        name: [merge_points([run[name][place] for run in runs]) for place in range(len(points))]
        for name, points in runs[0].items()
    }
    (RESULTS / "lines").mkdir(parents=True, exist_ok=True)
    write_result(f"lines/{wanted.data}-{wanted.bytes}", {"setting": vars(wanted), "curves": curves})


def make_contenders(split: Split, wanted: argparse.Namespace, seed: int) -> dict[str, Contender]:
    dim, many = split.database.shape[1], 4 * wanted.cells
    made = {
        f"vlq {wanted.cells} x {wanted.edges}": make_vlq(split, wanted, seed),
        f"ivf-pq {wanted.cells}": make_ivf(split, wanted.cells, wanted.bytes, seed),
        f"ivf-pq {many}": make_ivf(split, many, wanted.bytes, seed),
        f"ivf-pq {many} by hnsw": make_ivf(split, many, wanted.bytes, seed, hnsw=True),
    }
    if dim % (wanted.bytes + 1) == 0:
        made[f"ivf-pq {many}, a byte more"] = make_ivf(split, many, wanted.bytes + 1, seed)
    return made


def make_vlq(split: Split, wanted: argparse.Namespace, seed: int) -> Contender:
    config = LineConfig(kind="vlq", sub_vectors=wanted.bytes, cells=wanted.cells, edges=wanted.edges)
    rows_ND, quantizer = torch.from_numpy(split.database), make_quantizer(config, split.database.shape[1])
    codebook = train_codebook(rows_ND, quantizer, LloydConfig(iterations=15), seed=seed).codebook
    regions_N, codes_NM = (part.numpy() for part in quantizer.encode(rows_ND, codebook))
    lists = make_lists(codebook, np.arange(len(rows_ND)), regions_N, codebook.pack(codes_NM))
    probes = tuple(max(1, count * wanted.edges // 4) for count in PROBES if count <= 4 * wanted.cells)
    return Contender(
        lambda queries, count: lists.search(queries, KEPT, count),
        lambda queries, count: count_found(lists, queries, count),
        probes,
        codebook.code_bytes,
    )


def make_ivf(split: Split, cells: int, code_bytes: int, seed: int, *, hnsw: bool = False) -> Contender:
    dim = split.database.shape[1]
    coarse = faiss.IndexHNSWFlat(dim, 32) if hnsw else faiss.IndexFlatL2(dim)
    if hnsw:
        coarse.hnsw.efConstruction, coarse.hnsw.efSearch = 200, 128
    index = faiss.IndexIVFPQ(coarse, dim, cells, code_bytes, 8)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 15, 1234 + seed, 1 << 20
    index.pq.cp.seed, index.pq.cp.max_points_per_centroid = 1234 + seed, 1 << 20
    if hnsw:
        index.quantizer_trains_alone = 2
    index.train(split.database)
    index.add(split.database)

    def search(queries: NDArray[np.float32], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return index.search(queries, KEPT, params=faiss.SearchParametersIVF(nprobe=count))

    def scanned(queries: NDArray[np.float32], count: int) -> float:
        _, probed = index.quantizer.search(queries, count)
        sizes = np.array([index.invlists.list_size(cell) for cell in range(cells)])
        return float(sizes[probed].sum(1).mean())

    return Contender(search, scanned, tuple(count for count in PROBES if count <= cells), code_bytes)


def count_found(lists: Lists, queries: NDArray[np.float32], probes: int) -> float:
    """Count what a search looks at: all that it finds when as many are asked for as there are."""
    found = [lists.search(query[None], lists.rows, probes)[1] for query in queries[:200]]
    return float(np.mean([(ids >= 0).sum() for ids in found]))


def measure(contenders: dict[str, Contender], split: Split, wanted: argparse.Namespace) -> dict[str, list[Any]]:
    """Give the points of each contender's curve; rounds go through all of them, so that noise strikes all alike."""
    batches = np.array_split(split.queries, max(1, len(split.queries) // wanted.batch))
    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(wanted.rounds):
        for name, contender in contenders.items():
            for probes in contender.probes:
                started = time.perf_counter()
                for batch in batches:
                    contender.search(batch, probes)
                taken = (time.perf_counter() - started) / len(split.queries)
                spent.setdefault((name, probes), []).append(taken)
    return {
        name: [describe_point(contender, split, probes, min(spent[name, probes])) for probes in contender.probes]
        for name, contender in contenders.items()
    }


def describe_point(contender: Contender, split: Split, probes: int, seconds: float) -> dict[str, float]:
    _, found = contender.search(split.queries, probes)
    figures = {f"recall{k}": recall_at(found, split.neighbours[:, :k], k) for k in (1, 10, 100)}
    scanned = contender.scanned(split.queries, probes)
    shown = {"probes": probes, "scanned": scanned, "query_us": 1e6 * seconds, "bytes": contender.bytes_per_item}
    print(shown | {name: round(value, 4) for name, value in figures.items()}, flush=True)
    return shown | figures


def merge_points(points: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread([point[name] for point in points]) for name in points[0]}


if __name__ == "__main__":
    main()
