"""What a query costs as the corpus grows: 1e5, 1e6 and 1e7 codes, four times the root of that as cells, one core.

Codes and centroids are random, which changes no work: a query compares as many centroids and reads as many codes as it
would of real vectors. It looks into the same number of cells at every size, as what is near it lies in about as many.
The slope is that of the logarithm of the time by that of the size; one half is what centroids and codes, both growing
with the root, come to.

python benchmarks/growth.py [--sizes 100000 1000000 10000000] [--books 16] [--probes 16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
from record import spread, write_result
from scanning import make_index

from gsl_dist.index.lists import Lists

KINDS = ("residual pq", "vlq")
CELLS_PER_ROOT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[100_000, 1_000_000, 10_000_000])
    for name, value in {"books": 16, "dim": 128, "edges": 16, "probes": 16, "rounds": 7, "queries": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    wanted = parser.parse_args()
    faiss.omp_set_num_threads(1)
    queries = np.random.default_rng(1).normal(size=(wanted.queries, wanted.dim)).astype(np.float32)
    indexes = {(kind, size): make_grown(kind, size, wanted) for kind in KINDS for size in wanted.sizes}
    taken: dict[str, dict[int, list[float]]] = {kind: {size: [] for size in wanted.sizes} for kind in KINDS}
    for _ in range(wanted.rounds + 1):
        for (kind, size), index in indexes.items():
            # Four times as many regions as cells of the other: as many codes are read.
            probes = wanted.probes * (4 if kind == "vlq" else 1)
            taken[kind][size].append(time_queries(index, queries, probes))
    figures = {}
    for kind, by_size in taken.items():
        # The first round warms up.
        least = {size: min(values[1:]) for size, values in by_size.items()}
        slope = float(np.polyfit(np.log(list(least)), np.log(list(least.values())), 1)[0])
        spreads = {str(size): spread(values[1:]) for size, values in by_size.items()}
        figures[kind] = {"slope": slope, "least_us": {str(size): at for size, at in least.items()}, "us": spreads}
    cells = {str(size): count_cells(size) for size in wanted.sizes}
    write_result("growth", {"setting": vars(wanted), "cells": cells, "by_kind": figures})


def make_grown(kind: str, size: int, wanted: argparse.Namespace) -> Lists:
    cells = count_cells(size)
    # With lines a cell is cut, so that a quarter as many serve; with 16 lines each, regions are four times as many.
    shape = {"rows": size, "cells": cells // 4 if kind == "vlq" else cells}
    return make_index(kind, argparse.Namespace(**vars(wanted) | shape))


def count_cells(size: int) -> int:
    return round(CELLS_PER_ROOT * size**0.5)


def time_queries(lists: Lists, queries: np.ndarray, probes: int) -> float:
    started = time.process_time()
    lists.search(queries, 10, probes)
    return 1e6 * (time.process_time() - started) / len(queries)


if __name__ == "__main__":
    main()
