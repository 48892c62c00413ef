"""Building a shard from codes against `index.add` of the vectors, on the same core.

The codes are those that `add` itself would write, so both ways end in the same lists. `fill` is the sort and the copy
into the lists; `stage` is all that the build stage does for a shard: checksums, ids, streaming Parquet, writing.

python benchmarks/building.py [--rows 1000000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from record import spread, write_result

from gsl_dist.artefact import load_codebook, open_card
from gsl_dist.cluster.build import BuildConfig, build_shard
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, read_codes, run_encode
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.index.portions import cut_by_id
from gsl_dist.index.repeats import find_repeats
from gsl_dist.index.shards import create_shard, fill_shard, read_lists
from gsl_dist.index.stream import Piece, survey_codes
from gsl_dist.storage import Folder

PLACE = Path("build/bench/building")
REAL = Path("../shared/data/sift100k_photos.npz")
THREADS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    torch.set_num_threads(THREADS)
    vectors, source = read_vectors(wanted.rows)
    codebook = make_codes(vectors)
    faiss.omp_set_num_threads(THREADS)
    table = read_codes(Folder(PLACE / "codes"), "shard-00000", codebook)
    spent: dict[str, list[float]] = {"add": [], "fill": [], "stage": []}
    for turn in range(wanted.rounds):
        shard, added = create_shard(codebook), create_shard(codebook)
        spent["add"].append(clock(functools.partial(added.add, vectors)))
        spent["fill"].append(clock(functools.partial(fill_shard, shard, table.ids, table.cells, table.codes)))
        spent["stage"].append(clock(time_task))
        print(turn, {name: f"{taken[-1]:.2f} s" for name, taken in spent.items()}, flush=True)
    agree = measure_agreement(shard, added)
    times = {f"{name}_s": spread(taken) for name, taken in spent.items()}
    ratios = {f"add_over_{name}": spread(list(np.divide(spent["add"], spent[name]))) for name in ("fill", "stage")}
    setting = {"rows": len(vectors), "dim": vectors.shape[1], "threads": THREADS, "vectors": source}
    write_result("building", times | ratios | setting | {"codes_equal_to_add": agree})


def measure_agreement(ours: faiss.IndexIVFPQ, added: faiss.IndexIVFPQ) -> float:
    """Give the share of rows that lie in the same list with the same code; ties may fall either way."""
    rows = []
    for index in (ours, added):
        ids, cells, codes = read_lists(index)
        order = np.argsort(ids)
        rows.append(np.column_stack([cells[order], codes[order]]))
    return float((rows[0] == rows[1]).all(axis=1).mean())


def read_vectors(rows: int) -> tuple[NDArray[np.float32], str]:
    rng = np.random.default_rng(0)
    if REAL.exists():
        base = np.load(REAL)["base"].astype(np.float32)
        # Real descriptors, repeated with a little noise to the wanted number.
        return base[rng.integers(len(base), size=rows)] + rng.normal(size=(rows, 128)).astype(np.float32) * 4, "sift"
    centres = rng.normal(size=(1000, 128)).astype(np.float32) * 2
    return centres[rng.integers(1000, size=rows)] + rng.normal(size=(rows, 128)).astype(np.float32), "seeded clusters"


def make_codes(vectors: NDArray[np.float32]) -> Codebook:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    np.save(PLACE / "vectors.npy", vectors)
    corpus = {"path": str(PLACE / "vectors.npy")}
    shape = {"kind": "pq", "sub_vectors": 16, "bits": 8, "cells": 1024}
    lloyd = {"iterations": 5, "sample_rows": 50_000}
    fitted = {
        "source": "fitted",
        "corpus": corpus,
        "quantizer": shape,
        "lloyd": lloyd,
        "output": str(PLACE / "codebook"),
    }
    run_codebook(check_config(CodebookConfig, fitted))
    encode = {"corpus": corpus, "codebook": str(PLACE / "codebook"), "output": str(PLACE / "codes")}
    run_encode(check_config(EncodeConfig, encode))
    return load_codebook(str(PLACE / "codebook"))


def time_task() -> None:
    settings = {"codes": str(PLACE / "codes"), "codebook": str(PLACE / "codebook"), "index": str(PLACE / "index")}
    config = check_config(BuildConfig, settings)
    entry = open_card(Folder(config.codes), "codes", verify=False).entry("shard-00000.parquet")
    survey = survey_codes(config.codes, entry, load_codebook(config.codebook).fingerprint)
    pieces = [Piece(survey.name, 0, survey.rows)]
    find_repeats(config.codes, pieces, config.duplicates, config.room_bytes)
    [portion] = cut_by_id(config.codes, pieces, None)
    build_shard(config, Folder(PLACE / "index" / "versions" / "v"), portion, "benchmark")


def clock(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
