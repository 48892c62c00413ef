"""Many cells: Lloyd's iterations by way of super-cells against looking at all cells, on one core.

For each number of cells, cells are trained by two levels, each way in a process of its own, and by looking at all where
that is not too long; otherwise one iteration of it is measured on fewer rows and scaled up (`measured_rows` says on how
many). Rows that were not trained on then tell how many are given their true nearest cell by two levels, and what is
lost. Errors are means of the squared distance to the cell, by looking at all, over the variance.

What was measured for a number of cells is kept in `build/bench/cells` and not measured again.

python benchmarks/cells.py [--cells 1024 16384 65536 262144] [--rows 600000] [--dim 32] [--iterations 2]
                           [--kind clusters] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import spread, write_result

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers.cells import CellSearch, hold_cells, measure_cells
from gsl_dist.quantizers.kmeans import MANY, add_stats, seed_centroids, update_centroids
from gsl_dist.storage import Folder

PLACE = Path("build/bench/cells")
SEARCHES = {"two_levels": CellSearch(two_level=True), "all": CellSearch(two_level=False)}
HELD_ROWS = 10_000
# Distances that an iteration by looking at all may take: half a minute on the machine of the figures.
MOST_DISTANCES = 1 << 34


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1 << 10, 1 << 14, 1 << 16, 1 << 18])
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--kind", choices=["clusters", "uniform"], default="clusters")
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    setting = {name: value for name, value in vars(wanted).items() if name != "cells"}
    figures = {}
    for cells in wanted.cells:
        figures[str(cells)] = measure_once(cells, setting)
        print(cells, json.dumps(figures[str(cells)], indent=1), flush=True)
    write_result("cells", setting | {"held_rows": HELD_ROWS, "by_cells": figures})


def measure_once(cells: int, setting: dict[str, Any]) -> dict[str, Any]:
    folder, name = Folder(str(PLACE)), "-".join(str(part) for part in (cells, *setting.values())) + ".json"
    if not folder.exists(name):
        folder.write_json(name, {search: run_alone(cells, search, setting) for search in SEARCHES})
    kept: dict[str, Any] = folder.read_json(name)
    return kept


def run_alone(cells: int, search: str, setting: dict[str, Any]) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(measure_search, (cells, search, setting))


def measure_search(cells: int, search: str, setting: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(setting["threads"])
    every_ND = make_rows(setting, setting["rows"], 0)
    whole = len(every_ND)
    rows_ND = every_ND[: MOST_DISTANCES // cells] if search == "all" else every_ND
    seconds, before, start = [], read_memory("VmRSS"), time.perf_counter()
    codebook = seed_cells(every_ND, cells)
    seeding = time.perf_counter() - start
    for _ in range(setting["iterations"] if len(rows_ND) == whole else 1):
        codebook, assigning, updating = run_iteration(rows_ND, codebook, SEARCHES[search])
        seconds.append(assigning * whole / len(rows_ND) + updating)
    figures = {"iteration_s": spread(seconds), "seed_s": seeding, "measured_rows": len(rows_ND)}
    figures["peak_mb_above_rows"] = read_memory("VmHWM") - before
    if len(rows_ND) < whole:
        return figures
    return figures | measure_quality(codebook, rows_ND, make_rows(setting, HELD_ROWS, 1))


def seed_cells(rows_ND: torch.Tensor, cells: int) -> Codebook:
    seeds = min(len(rows_ND), cells * (32 if cells <= MANY else 2))
    sample = rows_ND[np.linspace(0, len(rows_ND) - 1, seeds).astype(np.int64)].numpy()
    return hold(seed_centroids(sample[None], cells, np.random.default_rng(0))[0])


def run_iteration(rows_ND: torch.Tensor, codebook: Codebook, search: CellSearch) -> tuple[Codebook, float, float]:
    start = time.perf_counter()
    part = measure_cells(rows_ND, codebook, search)
    assigned = time.perf_counter()
    codebook = hold(update_centroids(codebook.coarse[None], add_stats([part]))[0])
    return codebook, assigned - start, time.perf_counter() - assigned


def measure_quality(codebook: Codebook, rows_ND: torch.Tensor, held_ND: torch.Tensor) -> dict[str, Any]:
    cells = hold_cells(codebook, held_ND)
    nearest_N, least_N = cells.find(held_ND, SEARCHES["all"])
    found_N, distances_N = cells.find(held_ND, SEARCHES["two_levels"])
    variance = float((rows_ND - rows_ND.mean(0)).square().sum(1).mean())
    return {
        "held_error": float(least_N.mean()) / variance,
        "recall": float((found_N == nearest_N).float().mean()),
        "error_ratio": float(distances_N.sum() / least_N.sum()),
        "super_cells": len(cells.partition.members),
        "width": cells.width,
        "automatic": "all" if cells.pick_width() is None else "two_levels",
    }


def hold(coarse_CD: np.ndarray) -> Codebook:
    return Codebook(coarse=coarse_CD, books=np.zeros((1, 2, coarse_CD.shape[1])), residual=True)


def make_rows(setting: dict[str, Any], rows: int, seed: int) -> torch.Tensor:
    rng, dim = np.random.default_rng(seed), setting["dim"]
    if setting["kind"] == "uniform":
        return torch.from_numpy(rng.random((rows, dim), dtype=np.float32))
    # Clusters about centres that form clusters themselves, one centre for every hundred rows.
    groups = np.random.default_rng(98).standard_normal((100, dim), dtype=np.float32)
    draw = np.random.default_rng(99)
    centres = draw.integers(100, size=max(1, setting["rows"] // 100))
    places = groups[centres] + draw.standard_normal((len(centres), dim), dtype=np.float32) / 2
    chosen = places[rng.integers(len(places), size=rows)]
    return torch.from_numpy(chosen + rng.standard_normal((rows, dim), dtype=np.float32) / 4)


def read_memory(field: str) -> float:
    # Not getrusage: what it calls the peak of a process includes that of the parent it was forked from.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    main()
