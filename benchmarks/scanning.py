"""What a query costs by kind of code: the same codes, cells and probes, one core, ratios to product codes.

Codes are random, which changes no work: every kind reads as many items and looks up as many tables. Rounds of all kinds
take turns; the ratio of a round is to the product codes of that round.

python benchmarks/scanning.py [--rows 400000] [--dim 128] [--books 8] [--cells 256] [--probes 16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
from record import spread, write_result

from gsl_dist.codebook import Codebook
from gsl_dist.index.shards import create_shard, fill_shard, turn_queries

KINDS = ("pq", "opq", "cq", "rq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 400_000, "dim": 128, "books": 8, "cells": 256, "probes": 16, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--queries", type=int, default=50)
    wanted = parser.parse_args()
    faiss.omp_set_num_threads(1)
    shards = {kind: make_shard(kind, wanted) for kind in KINDS}
    queries = np.random.default_rng(1).normal(size=(wanted.queries, wanted.dim)).astype(np.float32)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(wanted.rounds):
        for kind, (codebook, index) in shards.items():
            taken[kind].append(measure(codebook, index, queries, wanted.probes))
    ratios = {kind: spread(list(np.divide(taken[kind], taken["pq"]))) for kind in KINDS}
    each = {kind: float(np.median(taken[kind])) / wanted.queries * 1e3 for kind in KINDS}
    write_result("scanning", {"setting": vars(wanted), "ratio_to_pq": ratios, "ms_a_query": each})


def make_shard(kind: str, wanted: argparse.Namespace) -> tuple[Codebook, faiss.IndexIVF]:
    rng, product = np.random.default_rng(0), kind in ("pq", "opq")
    books = rng.normal(size=(wanted.books, 256, wanted.dim // wanted.books if product else wanted.dim))
    codebook = Codebook(
        rng.normal(size=(wanted.cells, wanted.dim)),
        books,
        residual=False,
        kind="pq" if product else kind,
        rotation=np.linalg.qr(rng.normal(size=(wanted.dim, wanted.dim)))[0] if kind == "opq" else None,
        bias=rng.normal(size=books.shape[:2]) if kind == "cq" else None,
    )
    index = create_shard(codebook)
    codes = rng.integers(256, size=(wanted.rows, wanted.books), dtype=np.uint8)
    fill_shard(index, np.arange(wanted.rows), rng.integers(wanted.cells, size=wanted.rows), codes)
    return codebook, index


def measure(codebook: Codebook, index: faiss.IndexIVF, queries: np.ndarray, probes: int) -> float:
    started = time.perf_counter()
    # One query at a time, as a service gets them.
    for query_D in queries:
        index.search(turn_queries(query_D[None], codebook), 10, params=faiss.SearchParametersIVF(nprobe=probes))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
