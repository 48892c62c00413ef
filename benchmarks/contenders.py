"""What `peers.py` sets side by side, of faiss and of this project: how each is built, kept and searched.

An index is built once into a folder of its own and opened from there for every measurement. All codebooks of faiss and
of this project are trained on the same `TRAINED` rows of the base, those of other systems on what these take.

A name is a family and its numbers: `faiss ivf-pq 16b 4096` has codes of 16 bytes and 4,096 cells, `ours vlq 8b 2048x16`
8 bytes, and one for the level, and 2,048 cells of 16 lines each. Codes are of residuals, but where a name says `whole`:
tables are then made once a query and not once a cell. `ranked` codebooks learned to rank. `+ int8`, `+ float16` and
`+ raw` keep the vectors as well, in so many bits, and rank the first candidates by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray
from vectors import Vectors

from gsl_dist.codebook import Codebook
from gsl_dist.storage import Folder

TRAINED = 262_144
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEWER = (4, 8, 16, 32, 64, 128)
SEED = 1234
MANY = 1 << 20

Keeps = Literal["codes", "int8", "float16", "raw"]
Effort = tuple[int, ...]
Array = NDArray[Any]


@dataclass(frozen=True)
class Opened:
    """An index that can be searched.

    Args:
        search: gives the ids (Q, k) of queries at an effort.
        scanned: gives the mean number of codes that a query looks at; None where that is not told.
    """

    search: Callable[[Array, int, Effort], Array]
    scanned: Callable[[Array, Effort], float] | None = None


@dataclass(frozen=True)
class Contender:
    """One index.

    Args:
        build: makes it in a folder, of vectors and a seed.
        open: opens it, given the folder and the vectors, which those that keep vectors read.
        efforts: what it is searched at: probes, or probes and candidates a hit.
        bytes_per_item: what it must hold for a vector, the id apart.
        keeps: what it holds of a vector besides a code.
        shares: the contender whose folder it is built in, if another's.
    """

    build: Callable[[Vectors, int, Path], None]
    open: Callable[[Path, Vectors], Opened]
    efforts: Sequence[Effort]
    bytes_per_item: float
    keeps: Keeps = "codes"
    shares: str | None = None


def draw_training(vectors: Vectors, seed: int) -> NDArray[np.float32]:
    """Give the rows that codebooks are trained on."""
    rows = np.random.default_rng(seed).permutation(len(vectors.base))[:TRAINED]
    return np.ascontiguousarray(vectors.base[np.sort(rows)])


# faiss


def make_faiss(factory: str, bytes_per_item: float, *, probes: Sequence[int] = PROBES, hnsw: bool = False) -> Contender:
    """Give an IVF index of faiss by the words of its factory."""

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        index = faiss.index_factory(vectors.dim, factory)
        settle_seeds(index, seed)
        index.train(draw_training(vectors, seed))
        index.add(vectors.base)
        faiss.write_index(index, str(folder / "index.faiss"))

    def open_index(folder: Path, _: Vectors) -> Opened:
        index = faiss.read_index(str(folder / "index.faiss"))
        return Opened(
            lambda queries, k, effort: index.search(queries, k, params=ask_faiss(effort[0], hnsw))[1],
            lambda queries, effort: count_scanned(index, queries, effort[0]),
        )

    return Contender(build, open_index, [(count,) for count in probes], bytes_per_item)


def refine_faiss(base: Contender, shares: str, keeps: Keeps, bytes_per_item: float) -> Contender:
    """Give an index of faiss with vectors beside its codes, kept as bytes or as they are."""

    def open_index(folder: Path, vectors: Vectors) -> Opened:
        first = faiss.read_index(str(folder / "index.faiss"))
        if keeps == "raw":
            store = faiss.IndexFlatL2(vectors.dim)
        else:
            store = faiss.IndexScalarQuantizer(vectors.dim, faiss.ScalarQuantizer.QT_8bit)
            store.train(draw_training(vectors, 0))
        store.add(vectors.base)
        index = faiss.IndexRefine(first, store)
        index.referenced_objects = [first, store]

        def search(queries: Array, k: int, effort: Effort) -> Array:
            wanted = faiss.IndexRefineSearchParameters(k_factor=effort[1], base_index_params=ask_faiss(effort[0]))
            return index.search(queries, k, params=wanted)[1]

        return Opened(search, lambda queries, effort: count_scanned(first, queries, effort[0]))

    efforts = [(count, factor) for count in FEWER for factor in (2, 4, 10, 20)]
    return Contender(base.build, open_index, efforts, bytes_per_item, keeps, shares)


def ask_faiss(probes: int, hnsw: bool = False) -> Any:
    params = faiss.SearchParametersIVF(nprobe=probes)
    if hnsw:
        params.quantizer_params = followed = faiss.SearchParametersHNSW(efSearch=2 * probes + 64)
        params.referenced_objects = [followed]
    return params


def settle_seeds(index: Any, seed: int) -> None:
    """Let every part train on all rows that it is given, from a seed."""
    lists = faiss.extract_index_ivf(index)
    lists.cp.seed, lists.cp.niter, lists.cp.max_points_per_centroid = SEED + seed, 15, MANY
    if isinstance(faiss.downcast_index(lists.quantizer), faiss.IndexHNSW):
        faiss.downcast_index(lists.quantizer).hnsw.efConstruction = 200
    if hasattr(lists, "pq"):
        lists.pq.cp.seed, lists.pq.cp.max_points_per_centroid = SEED + seed, MANY


def count_scanned(index: Any, queries: Array, probes: int) -> float:
    """Give the mean length of the lists that queries look into."""
    lists = faiss.extract_index_ivf(index)
    if isinstance(index, faiss.IndexPreTransform):
        queries = index.chain.at(0).apply(queries)
    probed = lists.quantizer.search(queries, min(probes, lists.nlist))[1]
    sizes = np.array([lists.invlists.list_size(cell) for cell in range(lists.nlist)])
    return float(sizes[probed].sum(1).mean())


# this project


def make_ours(
    shape: dict[str, Any], *, ranked: Literal["", "exact", "tables"] = "", coarse: Literal["flat", "hnsw"] = "flat"
) -> Contender:
    """Give an index of this project by the settings of its quantizer; its codewords may learn to rank first."""

    def build(vectors: Vectors, seed: int, folder: Path) -> None:
        import torch

        from gsl_dist.index.lists import make_lists
        from gsl_dist.quantizers import open_quantizer

        torch.set_num_threads(1)
        codebook = fit_ours(shape, ranked, torch.from_numpy(draw_training(vectors, seed)), seed, folder)
        coder = open_quantizer(codebook)
        parts = [coder.encode(torch.from_numpy(part), codebook) for part in split_rows(vectors.base)]
        lists_N, codes_NM = (np.concatenate([pair[i].numpy() for pair in parts]) for i in (0, 1))
        layout: Literal["plain", "fastscan"] = "fastscan" if codebook.bits == 4 else "plain"
        lists = make_lists(codebook, np.arange(len(vectors.base)), lists_N, codebook.pack(codes_NM), coarse, layout)
        codebook.save(Folder(folder), "codebook.safetensors")
        lists.write(folder / "lists")

    probes = [max(1, count * shape.get("edges", 4) // 4) for count in PROBES]
    # A row of lines has its level and its squared length beside its codewords.
    whole = shape.get("sub_vectors", shape.get("books")) * shape.get("bits", 8) // 8
    whole += 5 if shape["kind"] == "vlq" else 0
    return Contender(build, open_ours, [(count,) for count in probes], whole)


def fit_ours(shape: dict[str, Any], ranked: str, rows_ND: Any, seed: int, folder: Path) -> Codebook:
    """Fit a codebook, and let it learn if it is to be ranked.

    What was fitted is kept beside the folder for the contender that learns from it; `waited` in the folder says how
    many seconds fitting took when another did it.
    """
    from pydantic import TypeAdapter

    from gsl_dist.quantizers import LloydConfig, QuantizerConfig, make_quantizer, train_codebook
    from gsl_dist.ranked import RankedConfig, learn_ranked, mine_neighbours

    name = "fitted-" + "-".join(str(value) for value in shape.values()) + f"-{seed}.safetensors"
    kept = Folder(folder.parent)
    if kept.exists(name):
        codebook = Codebook.load(kept, name)
        (folder / "waited").write_text((folder.parent / f"{name}.s").read_text())
    else:
        config, started = TypeAdapter(QuantizerConfig).validate_python(shape), time.perf_counter()
        # Additive codewords cost far more to fit, a row.
        rows_fitted = rows_ND[:: max(1, len(rows_ND) // 32_768)] if shape["kind"] == "rq" else rows_ND
        quantizer = make_quantizer(config, rows_ND.shape[1])
        codebook = train_codebook(rows_fitted, quantizer, LloydConfig(iterations=15), seed=seed).codebook
        codebook.save(kept, name)
        (folder.parent / f"{name}.s").write_text(str(time.perf_counter() - started))
    if not ranked:
        return codebook
    wanted = RankedConfig(scores=ranked)
    rows_taught = rows_ND[:: max(1, len(rows_ND) // wanted.sample_rows)]
    return learn_ranked(mine_neighbours(rows_taught, wanted), codebook, wanted, seed=seed)


def open_ours(folder: Path, _: Vectors) -> Opened:
    """Open lists as a replica does."""
    from gsl_dist.index.lists import FaissLists, join_lists, open_lists

    codebook = Codebook.load(Folder(folder), "codebook.safetensors")
    lists = join_lists([open_lists(folder / "lists", codebook)])

    def scanned(queries: Array, effort: Effort) -> float:
        if isinstance(lists, FaissLists):
            return count_scanned(lists.index, _turn(queries, codebook), effort[0])
        counts = [(lists.search(query[None], lists.rows, effort[0])[1] >= 0).sum() for query in queries[:50]]
        return float(np.mean(counts))

    return Opened(lambda queries, k, effort: lists.search(queries, k, effort[0])[1], scanned)


def refine_ours(base: Contender, shares: str, keeps: Literal["int8", "float16"], dim: int) -> Contender:
    """Give an index of this project with vectors beside its codes."""

    def open_index(folder: Path, vectors: Vectors) -> Opened:
        from gsl_dist.index.refine import keep_vectors, measure_exactly

        first, store = base.open(folder, vectors), keep_vectors(np.arange(len(vectors.base)), vectors.base, keeps)

        def search(queries: Array, k: int, effort: Effort) -> Array:
            found = first.search(queries, k * effort[1], effort[:1])
            distances = measure_exactly(queries, found, [store])
            order = np.argsort(distances, axis=1)[:, :k]
            return np.take_along_axis(found, order, 1)

        return Opened(search, first.scanned)

    efforts = [(count, factor) for (count, *_) in base.efforts[2:-1] for factor in (2, 4, 10, 20)]
    extra = dim * (2 if keeps == "float16" else 1)
    return replace(
        base, open=open_index, efforts=efforts, keeps=keeps, shares=shares, bytes_per_item=base.bytes_per_item + extra
    )


def split_rows(rows: NDArray[np.float32], size: int = 65_536) -> list[NDArray[np.float32]]:
    """Give rows in parts of a size that a worker would encode."""
    return [np.ascontiguousarray(rows[start : start + size]) for start in range(0, len(rows), size)]


def _turn(queries: Array, codebook: Codebook) -> Array:
    from gsl_dist.index.shards import turn_queries

    return turn_queries(queries, codebook)
