"""The rivals of `peers.py` that come with packages of their own: hnswlib, usearch, ScaNN and LanceDB.

They are told to use one thread; where that cannot be said, the process is held to one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from contenders import Array, Contender, Effort, Keeps, Opened
from vectors import Vectors

WIDTHS = (10, 16, 24, 40, 64, 100, 160, 250, 400)
TRAINED = 262_144


def make_hnswlib(links: int, dim: int) -> Contender:
    """Give a graph of hnswlib over raw vectors."""

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        import hnswlib

        index = hnswlib.Index("l2", vectors.dim)
        index.init_index(len(vectors.base), M=links, ef_construction=200, random_seed=seed + 100)
        index.set_num_threads(1)
        index.add_items(vectors.base)
        index.save_index(str(folder / "index.bin"))

    def open_index(folder: Path, vectors: Vectors) -> Opened:
        import hnswlib

        index = hnswlib.Index("l2", vectors.dim)
        index.load_index(str(folder / "index.bin"))
        index.set_num_threads(1)

        def search(queries: Array, k: int, effort: Effort) -> Array:
            index.set_ef(max(k, effort[0]))
            return index.knn_query(queries, k)[0].astype(np.int64)

        return Opened(search)

    # Two links a level for each, on the lowest; 4 bytes each.
    return Contender(build, open_index, [(width,) for width in WIDTHS], 4 * dim + 8 * links, "raw")


def make_usearch(links: int, dim: int, kept: str) -> Contender:
    """Give a graph of usearch over vectors kept as float32, float16 or bytes."""
    keeps: Keeps = {"f32": "raw", "f16": "float16", "i8": "int8"}[kept]

    def start(vectors: Vectors) -> Any:
        from usearch.index import Index

        return Index(ndim=vectors.dim, metric="l2sq", dtype=kept, connectivity=links, expansion_add=200)

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        index = start(vectors)
        index.add(np.arange(len(vectors.base)), vectors.base, threads=1)
        index.save(str(folder / "index.usearch"))

    def open_index(folder: Path, vectors: Vectors) -> Opened:
        index = start(vectors)
        index.load(str(folder / "index.usearch"))

        def search(queries: Array, k: int, effort: Effort) -> Array:
            index.expansion_search = max(k, effort[0])
            return np.atleast_2d(index.search(queries, k, threads=1).keys).astype(np.int64)

        return Opened(search)

    size = {"f32": 4, "f16": 2, "i8": 1}[kept]
    return Contender(build, open_index, [(width,) for width in WIDTHS], size * dim + 8 * links, keeps)


def make_scann(leaves: int, dim: int, *, raw: bool) -> Contender:
    """Give a tree of ScaNN with 4 bit codes of 2 dims each, and the vectors if they are kept."""

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        import scann

        plan = scann.scann_ops_pybind.builder(vectors.base, 100, "squared_l2").set_n_training_threads(1)
        plan = plan.tree(num_leaves=leaves, num_leaves_to_search=100, training_sample_size=TRAINED)
        plan = plan.score_ah(2, anisotropic_quantization_threshold=0.2)
        index = (plan.reorder(100) if raw else plan).build()
        index.serialize(str(folder))

    def open_index(folder: Path, _: Vectors) -> Opened:
        import scann

        index = scann.scann_ops_pybind.load_searcher(str(folder))

        def search(queries: Array, k: int, effort: Effort) -> Array:
            wanted = {"final_num_neighbors": k, "leaves_to_search": effort[0]}
            if raw:
                wanted["pre_reorder_num_neighbors"] = k * effort[1]
            if len(queries) == 1:
                ids = index.search(queries[0], **wanted)[0][None]
            else:
                ids = index.search_batched(queries, **wanted)[0]
            return np.pad(ids.astype(np.int64), ((0, 0), (0, k - ids.shape[1])), constant_values=-1)

        return Opened(search)

    probes = (2, 4, 8, 16, 32, 64, 128)
    efforts = [(count, factor) for count in probes for factor in (2, 4, 10, 20)] if raw else [(c,) for c in probes]
    kept = 4 * dim if raw else 0
    return Contender(build, open_index, efforts, kept + dim / 4, "raw" if raw else "codes")


def make_lance(cells: int, size: int, dim: int, *, raw: bool, shares: str | None = None) -> Contender:
    """Give a table of LanceDB with an IVF-PQ index; it answers one query at a time."""

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        import lancedb
        import pyarrow as pa

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.base.ravel()), vectors.dim)
        rows = pa.table({"id": np.arange(len(vectors.base)), "vector": column})
        table = lancedb.connect(str(folder)).create_table("vectors", rows)
        table.create_index(metric="l2", num_partitions=cells, num_sub_vectors=size, index_type="IVF_PQ")

    def open_index(folder: Path, _: Vectors) -> Opened:
        import lancedb

        table = lancedb.connect(str(folder)).open_table("vectors")

        def search(queries: Array, k: int, effort: Effort) -> Array:
            found = np.full((len(queries), k), -1, np.int64)
            for place, query in enumerate(queries):
                asked = table.search(query).metric("l2").nprobes(effort[0]).limit(k)
                ids = (
                    (asked.refine_factor(effort[1]) if raw else asked)
                    .select(["id", "_distance"])
                    .to_arrow()["id"]
                    .to_numpy()
                )
                found[place, : len(ids)] = ids
            return found

        return Opened(search)

    probes = (4, 16, 64)
    efforts = [(count, 10) for count in probes] if raw else [(count,) for count in probes]
    kept = 4 * dim if raw else 0
    return Contender(build, open_index, efforts, kept + size, "raw" if raw else "codes", shares)
