"""An index to serve, and what serving it costs beside an echo and beside one process: shared by other benchmarks."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from gsl_dist.client import Client
from gsl_dist.cluster.serve import Service
from gsl_dist.index.manifest import CODEBOOK, Manifest, ShardEntry, promote_version, publish_version, version_folder
from gsl_dist.index.portions import Sharding
from gsl_dist.index.search import LocalSearcher
from gsl_dist.index.shards import create_shard, extract_codebook, fill_shard, read_lists
from gsl_dist.measure import measure_latency, measure_throughput
from gsl_dist.storage import Folder

HERE = Path(__file__).resolve().parent
VECTORS = HERE.parents[1] / "shared" / "data" / "sift100k_photos.npz"
SUB_VECTORS, SHARDS = 16, 4
CELLS_BY_ROWS = {100_000: 256, 1_000_000: 1024}
K, PROBES, BATCH = 10, 16, 1024


def load_vectors(rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
    """Give a base, queries and the name of both: real SIFT if it is there, else seeded clusters.

    More rows than there are become more by repeating them with a little noise.
    """
    base, queries, name = load_hundred_thousand()
    if rows > len(base):
        rng = np.random.default_rng(1)
        base = base[rng.integers(len(base), size=rows)] + rng.normal(size=(rows, base.shape[1])).astype(np.float32) * 4
    return base, queries, name


def load_hundred_thousand() -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
    """Give 100,000 vectors and queries."""
    if VECTORS.exists():
        arrays = np.load(VECTORS)
        base, queries = (np.ascontiguousarray(arrays[name], np.float32) for name in ("base", "query"))
        return base, np.resize(queries, (8 * BATCH, queries.shape[1])), "sift100k_photos"
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, 128)).astype(np.float32)
    base, queries = (
        centres[rng.integers(1000, size=size)] + 0.3 * rng.normal(size=(size, 128)).astype(np.float32)
        for size in (100_000, 8 * BATCH)
    )
    return base.astype(np.float32), queries.astype(np.float32), "clustered_100k"


def build_index(folder: str, base: NDArray[np.float32], sharding: Sharding = "id") -> None:
    """Train IVF-PQ with faiss and publish its codes as shards."""
    cells_wanted = CELLS_BY_ROWS[len(base)]
    whole = faiss.IndexIVFPQ(faiss.IndexFlatL2(base.shape[1]), base.shape[1], cells_wanted, SUB_VECTORS, 8)
    whole.cp.niter = 10
    whole.train(base[:50_000])
    whole.add(base)
    codebook, (ids, cells, codes) = extract_codebook(whole), read_lists(whole)
    index = Folder(folder)
    place = version_folder(index, "bench")
    codebook.save(place, CODEBOOK)
    entries = []
    for rank in range(SHARDS):
        dealt = ids if sharding == "id" else cells
        mine, shard, name = dealt % SHARDS == rank, create_shard(codebook), f"shard-{rank:05d}"
        fill_shard(shard, ids[mine], cells[mine], codes[mine])
        with place.whole(f"{name}.faiss") as path:
            faiss.write_index(shard, str(path))
        entries.append(ShardEntry(name=name, rows=int(mine.sum()), index=place.pin(f"{name}.faiss")))
    shape = {"dim": codebook.dim, "cells": cells_wanted, "sub_vectors": SUB_VECTORS, "bits": 8, "residual": True}
    manifest = Manifest(
        version="bench",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        fingerprint=codebook.fingerprint,
        bytes_per_item=codebook.code_bytes,
        rows=len(base),
        sharding=sharding,
        shards=entries,
        codebook=place.pin(CODEBOOK),
        **shape,
    )
    publish_version(index, manifest)
    promote_version(index, "bench")


def compare_latency(url: str, queries: NDArray[np.float32], rounds: int, searches: int) -> dict[str, Any]:
    """Time single queries over both bodies, several rounds each."""
    found: dict[str, Any] = {}
    for body in ("json", "binary"):
        runs = [
            measure_latency(url, queries[:500], K, PROBES, searches, binary=body == "binary") for _ in range(rounds)
        ]
        ratios = [run["served_p50_ms"] / run["echo_p50_ms"] for run in runs]
        found[body] = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        found[body] |= summarize("ratio", ratios)
    return found


def compare_throughput(
    service: Service, local: LocalSearcher, queries: NDArray[np.float32], rounds: int
) -> dict[str, Any]:
    """Search the same batches through the service and in this process, turn by turn."""
    rates: dict[str, list[float]] = {"served": [], "local": []}
    with Client(service.url) as client:
        hits, expected = client.search(queries[:BATCH], K, PROBES), local.search(queries[:BATCH], K, probes=PROBES)
        assert np.allclose(hits.distances, expected.distances, rtol=1e-4), "the service and the process disagree"
        searches = {
            "served": lambda part: client.search(part, K, PROBES),
            "local": lambda part: local.search(part, K, probes=PROBES),
        }
        for _ in range(rounds):
            for name, search in searches.items():
                rates[name].append(measure_throughput(search, queries, BATCH, 1))
                time.sleep(0.2)  # idle OpenMP threads spin for a while and would take the other side's cores
    ratios = [served / alone for served, alone in zip(rates["served"], rates["local"], strict=True)]
    middle = {f"{name}_qps": round(statistics.median(found)) for name, found in rates.items()}
    return middle | summarize("ratio", ratios)


def summarize(name: str, values: list[float]) -> dict[str, Any]:
    """Give the median of repeated figures and how far apart they lie."""
    return {
        name: round(statistics.median(values), 3),
        f"{name}_min": round(min(values), 3),
        f"{name}_max": round(max(values), 3),
        "rounds": len(values),
    }
