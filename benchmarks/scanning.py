"""What a query costs by kind of code: the same codes, lists and queries, one core, ratios to product codes.

Codes are random, which changes no work: every kind reads as many items and looks up as many tables. Rounds of all kinds
take turns; the ratio of a round is to the product codes of that round. Kinds of `residual` codes are faiss's IVF-PQ of
residuals, with its precomputed tables, and `vlq`, whose regions are as many times more as a cell has lines. Codes a
second are counted between two numbers of probes, so that what a query costs beside its scan is left out.

python benchmarks/scanning.py [--rows 400000] [--dim 128] [--books 8] [--cells 256] [--probes 16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import faiss
import numpy as np
from record import spread, write_result

from gsl_dist.codebook import LEVELS, Codebook
from gsl_dist.index.lists import Lists, join_lists, make_lists

KINDS = ("pq", "opq", "cq", "rq", "residual pq", "vlq")
FURTHER = 4
SLOW = ("rq",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 400_000, "dim": 128, "books": 8, "cells": 256, "edges": 16, "probes": 16, "rounds": 7}
    for name, value in (defaults | {"queries": 50}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    wanted = parser.parse_args()
    faiss.omp_set_num_threads(1)
    lists = {kind: make_index(kind, wanted) for kind in wanted.kinds}
    queries = np.random.default_rng(1).normal(size=(wanted.queries, wanted.dim)).astype(np.float32)
    taken: dict[str, list[float]] = {kind: [] for kind in wanted.kinds}
    further: dict[str, list[float]] = {kind: [] for kind in wanted.kinds if kind not in SLOW}
    for index in lists.values():
        measure(index, queries[:2], 1)  # compiles what is compiled
    for _ in range(wanted.rounds):
        for kind, index in lists.items():
            many = wanted.probes * (wanted.edges if kind == "vlq" else 1)
            taken[kind].append(measure(index, queries, many))
            if kind in further:
                further[kind].append(measure(index, queries, FURTHER * many))
    figures: dict[str, Any] = {"setting": {**vars(wanted), "kinds": list(wanted.kinds)}}
    figures["ms_a_query"] = {kind: float(np.median(taken[kind])) / wanted.queries * 1e3 for kind in wanted.kinds}
    figures["million_codes_a_second"] = {
        kind: spread([codes / 1e6 / one for one in np.subtract(further[kind], taken[kind])])
        for kind in further
        for codes in [wanted.queries * (FURTHER - 1) * wanted.probes * wanted.rows / wanted.cells]
    }
    if "pq" in taken:
        figures["ratio_to_pq"] = {kind: spread(list(np.divide(taken[kind], taken["pq"]))) for kind in wanted.kinds}
    write_result(f"scanning-{wanted.books}" if wanted.books != defaults["books"] else "scanning", figures)


def make_index(kind: str, wanted: argparse.Namespace) -> Lists:
    """Give lists of random codes, as a replica opens them."""
    rng, codebook = np.random.default_rng(0), make_codebook(kind, wanted)
    codes = rng.integers(256, size=(wanted.rows, codebook.code_bytes), dtype=np.uint8)
    places = rng.integers(codebook.lists, size=wanted.rows)
    return join_lists([make_lists(codebook, np.arange(wanted.rows), places, codes)])


def make_codebook(kind: str, wanted: argparse.Namespace) -> Codebook:
    rng, product = np.random.default_rng(0), kind not in ("cq", "rq")
    books = rng.normal(size=(wanted.books, 256, wanted.dim // wanted.books if product else wanted.dim))
    coarse = rng.normal(size=(wanted.cells, wanted.dim))
    if kind == "vlq":
        edges = np.stack([rng.permutation(wanted.cells)[: wanted.edges] for _ in range(wanted.cells)])
        feet, levels = np.full(edges.shape, 0.25), np.linspace(0, 0.5, LEVELS)
        return Codebook(coarse, books, residual=True, kind="vlq", edges=edges, feet=feet, levels=levels)
    return Codebook(
        coarse,
        books,
        residual=kind == "residual pq",
        kind="pq" if product else kind,
        rotation=np.linalg.qr(rng.normal(size=(wanted.dim, wanted.dim)))[0] if kind == "opq" else None,
        bias=rng.normal(size=books.shape[:2]) if kind == "cq" else None,
    )


def measure(lists: Lists, queries: np.ndarray, probes: int) -> float:
    started = time.process_time()
    # One query at a time, as a service gets them.
    for query_D in queries:
        lists.search(query_D[None], 10, probes)
    return time.process_time() - started


if __name__ == "__main__":
    main()
