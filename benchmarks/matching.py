"""Many queries at once: lists read once for all of them against query by query, and a corpus joined with itself.

Rows are real SIFT descriptors, more of them than there are with a little noise; queries are such rows too. Codebooks
and codes are made by the stages. Of every kind of code the same batch is searched by faiss, query by query, and in the
order of lists, in turns; the ratio of a round is the first time over the second, both of the processor, which a single
thread keeps busy. Then all kept vectors are compared with a batch, by our sweep and by faiss's `knn` of the same
vectors. Last the match stage finds the near duplicates of the corpus, as `gsl match` runs it, with one worker; what it
holds is sampled, and the time is that of the wall.

    python benchmarks/matching.py search [--rows 100000] [--kinds pq opq ...]
    python benchmarks/matching.py join [--rows 1000000]
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from memory import watch_stage
from numpy.typing import NDArray
from record import spread, write_result

from gsl_dist.artefact import load_codebook, open_card
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, read_codes, run_encode
from gsl_dist.cluster.match import MatchConfig, Matcher, open_queries, settle_task
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.evaluate import rank_exact
from gsl_dist.index.lists import Lists, join_lists, make_lists
from gsl_dist.index.manifest import open_version
from gsl_dist.index.refine import keep_vectors
from gsl_dist.index.shards import CodeLayout
from gsl_dist.index.sweep import rank_kept, sweep_lists
from gsl_dist.storage import Folder

PLACE = Path("build/bench/matching")
REAL = Path("../shared/data/sift100k_photos.npz")
ROWS_PER_CELL, PROBES, K, NOISE = 400, 16, 10, 4


class Kind(NamedTuple):
    """What is searched: the quantizer, how lists hold its codes, and the largest batch that faiss is asked for."""

    quantizer: dict[str, Any]
    layout: CodeLayout = "plain"
    most: int = 65_536


KINDS = {
    "pq": Kind({"kind": "pq", "sub_vectors": 16, "bits": 8}),
    "pq, whole vectors": Kind({"kind": "pq", "sub_vectors": 16, "bits": 8, "residual": False}),
    "pq, 8 bytes": Kind({"kind": "pq", "sub_vectors": 8, "bits": 8}),
    "pq, 4 bits": Kind({"kind": "pq", "sub_vectors": 32, "bits": 4}, most=16_384),
    "pq, 4 bits in blocks": Kind({"kind": "pq", "sub_vectors": 32, "bits": 4}, "fastscan"),
    "opq, 4 bits in blocks, whole vectors": Kind(
        {"kind": "opq", "sub_vectors": 64, "bits": 4, "residual": False}, "fastscan"
    ),
    "rq": Kind({"kind": "rq", "books": 8, "bits": 8}, most=1024),
    "cq": Kind({"kind": "rq", "books": 8, "bits": 8, "residual": False}),
}
BATCHES = (256, 1024, 4096, 16_384, 65_536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "join"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", choices=[*KINDS], default=[*KINDS])
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if wanted.what == "join":
        measure_join(wanted.rows or 1_000_000, wanted.rounds)
        return
    rows = wanted.rows or 100_000
    vectors, _ = read_vectors(rows)
    queries = read_vectors(max(BATCHES), seed=1)[0]
    kinds = {name: measure_kind(name, vectors, queries, wanted.rounds) for name in wanted.kinds}
    exact = measure_exact(vectors[:100_000], queries[:4096], wanted.rounds)
    setting = {"rows": rows, "dim": 128, "cells": rows // ROWS_PER_CELL, "probes": PROBES, "k": K, "threads": 1}
    write_result(f"matching-{rows}", {"setting": setting, "kinds": kinds, "exact": exact})


def read_vectors(rows: int, *, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Give real descriptors, each drawn at random with a little noise, and which of them each row is."""
    rng, base = np.random.default_rng(seed), np.load(REAL)["base"].astype(np.float32)
    drawn = rng.integers(len(base), size=rows)
    return base[drawn] + rng.normal(size=(rows, base.shape[1])).astype(np.float32) * NOISE, drawn


def measure_kind(
    name: str, vectors: NDArray[np.float32], queries: NDArray[np.float32], rounds: int
) -> list[dict[str, Any]]:
    kind, measured = KINDS[name], []
    plain = make_index(name, vectors)
    swept = sweep_lists(plain)
    for batch in (batch for batch in BATCHES if batch <= kind.most):
        spent: dict[str, list[float]] = {"by_query": [], "by_list": []}
        for _ in range(rounds):
            for way, lists in (("by_query", plain), ("by_list", swept)):
                taken, found = clock(functools.partial(lists.search, queries[:batch], K, PROBES))
                spent[way].append(taken)
                if way == "by_query":
                    wanted = found
        figures: dict[str, Any] = {"batch": batch, "per_list": batch * PROBES / plain.codebook.lists}
        figures |= {f"{way}_s": spread(taken) for way, taken in spent.items()}
        # Of rows with equal codes any may be found: distances are what must agree.
        figures["same_distances"] = float(np.isclose(found[0], wanted[0], rtol=1e-3, atol=1).mean())
        figures["ratio"] = spread(list(np.divide(spent["by_query"], spent["by_list"])))
        measured.append(figures)
        print(
            name, batch, f"{np.median(figures['ratio']['values']):.2f}", f"{figures['same_distances']:.4f}", flush=True
        )
    return measured


def measure_exact(vectors: NDArray[np.float32], queries: NDArray[np.float32], rounds: int) -> dict[str, Any]:
    store = keep_vectors(np.arange(len(vectors)), vectors, "float16")
    kept, spent = store.read(np.arange(len(vectors))), {"knn": list[float](), "sweep": list[float]()}
    rank_kept(queries[:2], [store], K)  # compiles what is compiled
    for _ in range(rounds):
        taken, wanted = clock(functools.partial(rank_exact, queries, kept, K))
        spent["knn"].append(taken)
        taken, found = clock(functools.partial(rank_kept, queries, [store], K))
        spent["sweep"].append(taken)
    print("exact", {way: f"{np.median(taken):.2f} s" for way, taken in spent.items()}, flush=True)
    figures: dict[str, Any] = {f"{way}_s": spread(taken) for way, taken in spent.items()}
    figures["ratio"] = spread(list(np.divide(spent["knn"], spent["sweep"])))
    return figures | {"rows": len(vectors), "batch": len(queries), "same_ids": float((found[1] == wanted.ids).mean())}


def make_index(name: str, vectors: NDArray[np.float32]) -> Lists:
    kind = KINDS[name]
    codebook = make_codes(kind.quantizer, vectors)
    table = read_codes(Folder(PLACE / "codes"), "shard-00000", codebook)
    if name == "cq":
        # Without what learning would change, which costs a search nothing.
        biases = -np.square(codebook.books).sum(2) / 2
        codebook = Codebook(codebook.coarse, codebook.books, False, "cq", bias=biases)
    return join_lists([make_lists(codebook, table.ids, table.cells, table.codes, "flat", kind.layout)])


def make_codes(quantizer: dict[str, Any], vectors: NDArray[np.float32], *, shards: int = 1) -> Codebook:
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    np.save(PLACE / "vectors.npy", vectors)
    shape = quantizer | {"cells": len(vectors) // ROWS_PER_CELL}
    corpus, places = {"path": str(PLACE / "vectors.npy")}, {name: str(PLACE / name) for name in ("codebook", "codes")}
    lloyd = {"iterations": 5, "sample_rows": 50_000}
    fitted = {"source": "fitted", "corpus": corpus, "quantizer": shape, "lloyd": lloyd, "output": places["codebook"]}
    run_codebook(check_config(CodebookConfig, fitted))
    encode = {"corpus": corpus, "codebook": places["codebook"], "output": places["codes"], "shards": shards}
    run_encode(check_config(EncodeConfig, encode | {"keep_vectors": shards > 1}))
    return load_codebook(places["codebook"])


def measure_join(rows: int, rounds: int) -> None:
    vectors, drawn = read_vectors(rows)
    make_codes(KINDS["pq"].quantizer, vectors, shards=8)
    places = {name: str(PLACE / name) for name in ("codes", "codebook", "index")}
    run_build(check_config(BuildConfig, places | {"vectors": "int8"}))
    # Two rows of one descriptor are 2 x 128 x 16 apart on average, and hardly ever 1.5 times as far.
    join = {"index": places["index"], "queries": None, "output": str(PLACE / "match"), "groups": True, "shards": 8}
    join |= {"within": 1.5 * 2 * 128 * NOISE**2, "k": 20, "probes": 8, "refine": 2}
    join |= {"batch_rows": 65_536, "memory_mb": 768}
    (PLACE / "match.yaml").write_text(yaml.safe_dump(join))
    watched = watch_stage("match", PLACE)
    facts = open_card(Folder(PLACE / "match"), "match").facts
    counted = {name: facts[name] for name in ("rows", "hits", "full", "groups", "grouped", "is_swept", "refine")}
    figures = watched | counted | compare_groups(pq.read_table(PLACE / "match" / "groups.parquet"), drawn)
    figures["million_queries_a_minute"] = measure_orders(join, rounds)
    print({name: figure for name, figure in figures.items() if name != "at_peak"}, flush=True)
    setting = {name: join[name] for name in ("within", "k", "probes", "refine", "batch_rows", "memory_mb", "shards")}
    write_result("matching-join", {"setting": setting | {"rows": rows, "workers": 1}, **figures})


def measure_orders(join: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Give how many queries a processor answers, of the first shard, in each order; the orders take turns."""
    orders, spent = ("lists", "queries"), {"lists": list[float](), "queries": list[float]()}
    configs = [check_config(MatchConfig, join | {"order": order, "output": str(PLACE / order)}) for order in orders]
    manifest = open_version(Folder(join["index"]))
    matchers = [Matcher(settle_task(config, manifest, open_queries(config, manifest))) for config in configs]
    rows = manifest.rows // join["shards"]
    for turn in range(rounds + 1):
        for order, matcher in zip(orders, matchers, strict=True):
            # The first time opens the version.
            taken, _ = clock(functools.partial(matcher.match_shard, 0, 0, rows if turn else 1))
            spent[order] += [taken] if turn else []
    return {order: spread([rows * 60 / 1e6 / one for one in taken]) for order, taken in spent.items()}


def compare_groups(groups: pa.Table, drawn: NDArray[np.int64]) -> dict[str, float]:
    """Give the share of rows with company that were grouped, and of rows grouped the share that is with its like."""
    ids, firsts = groups["id"].to_numpy(), groups["group"].to_numpy()
    company = np.bincount(drawn)[drawn] > 1
    return {"found": float(company[ids].sum() / company.sum()), "right": float((drawn[ids] == drawn[firsts]).mean())}


def clock(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    made = action()
    return time.process_time() - start, made


if __name__ == "__main__":
    main()
