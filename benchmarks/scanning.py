"""What a query costs by kind of code: the same rows, lists and queries, one core, ratios to product codes of 8 bits.

Codes are random, which changes no work: every kind reads as many items and looks up as many tables. All but `rabitq`,
which has a bit a dimension and 8 bytes, are of equal bytes: of 4 bits there are twice as many choices. Rounds of all
kinds take turns; the ratio of a round is to the product codes of that round. `residual` codes are faiss's IVF-PQ of
residuals, with its precomputed tables; the regions of `vlq` are as many times more as a cell has lines. Codes a second
are counted between two numbers of probes, so that what a query costs beside its scan is left out.

python benchmarks/scanning.py [--rows 400000] [--dim 128] [--books 8] [--cells 256] [--probes 16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from record import spread, write_result

from gsl_dist.codebook import LEVELS, Codebook, space_evenly
from gsl_dist.index.lists import Lists, join_lists, make_lists
from gsl_dist.index.shards import CodeLayout
from gsl_dist.quantizers.rabitq import code_rests


class Kind(NamedTuple):
    """What is scanned: a kind of codebook, the bits of a choice, what it stands for, and how lists hold it."""

    kind: str
    bits: int = 8
    residual: bool = False
    layout: CodeLayout = "plain"
    rotated: bool = False


KINDS = {
    "pq": Kind("pq"),
    "opq": Kind("pq", rotated=True),
    "cq": Kind("cq"),
    "rq": Kind("rq"),
    "residual pq": Kind("pq", residual=True),
    "vlq": Kind("vlq", residual=True),
    "pq 4 bits": Kind("pq", 4),
    "fastscan": Kind("pq", 4, layout="fastscan"),
    "residual fastscan": Kind("pq", 4, residual=True, layout="fastscan"),
    "rabitq": Kind("rabitq", 1, residual=True, rotated=True),
    "rabitq fastscan": Kind("rabitq", 1, residual=True, layout="fastscan", rotated=True),
}
FURTHER = 4
SLOW = ("rq",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 400_000, "dim": 128, "books": 8, "cells": 256, "edges": 16, "probes": 16, "rounds": 7}
    for name, value in (defaults | {"queries": 50}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kinds", nargs="*", choices=[*KINDS], default=[*KINDS])
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


def make_index(name: str, wanted: argparse.Namespace) -> Lists:
    """Give lists of random codes, as a replica opens them."""
    rng, shape, codebook = np.random.default_rng(0), KINDS[name], make_codebook(KINDS[name], wanted)
    places = rng.integers(codebook.lists, size=wanted.rows)
    if shape.kind == "rabitq":
        # Random factors could be anything, and how far off a row is decides what is looked at.
        rests = torch.randn(wanted.rows, wanted.dim, generator=torch.Generator().manual_seed(0))
        codes = codebook.pack(code_rests(rests, shape.bits).numpy())
    else:
        codes = rng.integers(256, size=(wanted.rows, codebook.code_bytes), dtype=np.uint8)
    return join_lists([make_lists(codebook, np.arange(wanted.rows), places, codes, "flat", shape.layout)])


def make_codebook(shape: Kind, wanted: argparse.Namespace) -> Codebook:
    rng, product = np.random.default_rng(0), shape.kind in ("pq", "vlq")
    choices, lines = wanted.books * 8 // shape.bits, {}
    if shape.kind == "rabitq":
        books = space_evenly(wanted.dim, shape.bits)
    else:
        books = rng.normal(size=(choices, 1 << shape.bits, wanted.dim // choices if product else wanted.dim))
    if shape.kind == "vlq":
        edges = np.stack([rng.permutation(wanted.cells)[: wanted.edges] for _ in range(wanted.cells)])
        lines = {"edges": edges, "feet": np.full(edges.shape, 0.25), "levels": np.linspace(0, 0.5, LEVELS)}
    return Codebook(
        rng.normal(size=(wanted.cells, wanted.dim)),
        books,
        residual=shape.residual,
        kind=shape.kind,
        rotation=np.linalg.qr(rng.normal(size=(wanted.dim, wanted.dim)))[0] if shape.rotated else None,
        bias=rng.normal(size=books.shape[:2]) if shape.kind == "cq" else None,
        **lines,
    )


def measure(lists: Lists, queries: np.ndarray, probes: int) -> float:
    started = time.process_time()
    # One query at a time, as a service gets them.
    for query_D in queries:
        lists.search(query_D[None], 10, probes)
    return time.process_time() - started


if __name__ == "__main__":
    main()
