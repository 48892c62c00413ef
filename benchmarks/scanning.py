"""What a query costs by kind of code: the same rows, cells and probes, one core, ratios to product codes of 8 bits.

Codes are random, which changes no work: every kind reads as many items and looks up as many tables. All but `rabitq`,
which has a bit a dimension and 8 bytes (two bits and 20), are of equal bytes: of 4 bits there are twice as many
choices. Rounds of all kinds take turns; the ratio of a round is to the product codes of that round.

python benchmarks/scanning.py [--rows 400000] [--dim 128] [--books 8] [--cells 256] [--probes 16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import faiss
import numpy as np
import torch
from record import spread, write_result

from gsl_dist.codebook import Codebook, space_evenly
from gsl_dist.index.lists import Lists, join_lists, make_lists
from gsl_dist.quantizers.rabitq import code_rests


class Kind(NamedTuple):
    """What is scanned: a kind of codebook, the bits of a choice, what it stands for, and how lists hold it."""

    kind: str
    bits: int = 8
    residual: bool = False
    layout: str = "plain"
    rotated: bool = False


KINDS = {
    "pq": Kind("pq"),
    "pq residual": Kind("pq", residual=True),
    "opq": Kind("pq", rotated=True),
    "cq": Kind("cq"),
    "rq": Kind("rq"),
    "pq 4 bits": Kind("pq", 4),
    "pq 4 bits residual": Kind("pq", 4, residual=True),
    "fastscan": Kind("pq", 4, layout="fastscan"),
    "fastscan residual": Kind("pq", 4, residual=True, layout="fastscan"),
    "rabitq": Kind("rabitq", 1, residual=True, rotated=True),
    "rabitq 2 bits": Kind("rabitq", 2, residual=True, rotated=True),
    "rabitq fastscan": Kind("rabitq", 1, residual=True, layout="fastscan", rotated=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 400_000, "dim": 128, "books": 8, "cells": 256, "probes": 16, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--queries", type=int, default=50)
    wanted = parser.parse_args()
    faiss.omp_set_num_threads(1)
    shards = {name: make_shard(kind, wanted) for name, kind in KINDS.items()}
    queries = np.random.default_rng(1).normal(size=(wanted.queries, wanted.dim)).astype(np.float32)
    taken: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(wanted.rounds):
        for name, lists in shards.items():
            taken[name].append(measure(lists, queries, wanted.probes))
    ratios = {name: spread(list(np.divide(taken[name], taken["pq"]))) for name in KINDS}
    each = {name: float(np.median(taken[name])) / wanted.queries * 1e3 for name in KINDS}
    codes = wanted.rows * wanted.probes / wanted.cells
    rate = {name: codes / ms / 1e3 for name, ms in each.items()}
    write_result(
        "scanning",
        {"setting": vars(wanted), "ratio_to_pq": ratios, "ms_a_query": each, "million_codes_a_second": rate},
    )


def make_shard(shape: Kind, wanted: argparse.Namespace) -> Lists:
    rng = np.random.default_rng(0)
    choices, product = wanted.books * 8 // shape.bits, shape.kind == "pq"
    if shape.kind == "rabitq":
        books = space_evenly(wanted.dim, shape.bits)
    else:
        books = rng.normal(size=(choices, 1 << shape.bits, wanted.dim // choices if product else wanted.dim))
    codebook = Codebook(
        rng.normal(size=(wanted.cells, wanted.dim)),
        books,
        residual=shape.residual,
        kind=shape.kind,
        rotation=np.linalg.qr(rng.normal(size=(wanted.dim, wanted.dim)))[0] if shape.rotated else None,
        bias=rng.normal(size=books.shape[:2]) if shape.kind == "cq" else None,
    )
    cells = rng.integers(wanted.cells, size=wanted.rows)
    if shape.kind == "rabitq":
        # Random factors could be anything, and how far off a row is decides what is looked at.
        rests = torch.randn(wanted.rows, wanted.dim, generator=torch.Generator().manual_seed(0))
        codes = codebook.pack(code_rests(rests, shape.bits).numpy())
    else:
        codes = rng.integers(256, size=(wanted.rows, codebook.code_bytes), dtype=np.uint8)
    return join_lists([make_lists(codebook, np.arange(wanted.rows), cells, codes, "flat", shape.layout)])


def measure(lists: Lists, queries: np.ndarray, probes: int) -> float:
    # The time of this process: others on the machine do not count.
    started = time.process_time()
    # One query at a time, as a service gets them.
    for query_D in queries:
        lists.search(query_D[None], 10, probes)
    return time.process_time() - started


if __name__ == "__main__":
    main()
