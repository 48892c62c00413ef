"""Small worlds for tests: indexes of random codes, made in an instant."""

import numpy as np

from gsl_dist.codebook import Codebook
from gsl_dist.index.ivfpq import create_shard, fill_shard
from gsl_dist.index.manifest import CODEBOOK, Manifest, ShardEntry, promote_version, publish_version, version_folder
from gsl_dist.storage import Folder


def make_index(folder, *, rows=400, dim=16, cells=8, shards=3, seed=0, version="v1"):
    """Publish and promote a version of random codes in `folder`, and give its manifest.

    The codes depend on the seed alone: the same rows, dealt out to however many shards.
    """
    import faiss

    rng = np.random.default_rng(seed)
    books = rng.normal(size=(dim // 2, 16, 2)).astype(np.float32)
    codebook = Codebook(coarse=rng.normal(size=(cells, dim)), books=books, residual=True)
    cells_N = rng.integers(cells, size=rows)
    codes = codebook.pack(rng.integers(16, size=(rows, dim // 2)))
    index = Folder(folder)
    place = version_folder(index, version)
    codebook.save(place, CODEBOOK)
    entries = []
    for rank, ids_N in enumerate(np.array_split(np.arange(rows, dtype=np.int64), shards)):
        shard, name = create_shard(codebook), f"shard-{rank:05d}"
        fill_shard(shard, ids_N, cells_N[ids_N], codes[ids_N])
        with place.whole(f"{name}.faiss") as path:
            faiss.write_index(shard, str(path))
        entries.append(ShardEntry(name=name, rows=len(ids_N), index=place.pin(f"{name}.faiss")))
    manifest = Manifest(
        version=version,
        created="2026-01-01T00:00:00+00:00",
        fingerprint=codebook.fingerprint,
        dim=dim,
        cells=cells,
        sub_vectors=codebook.sub_vectors,
        bits=codebook.bits,
        residual=True,
        bytes_per_item=codebook.code_bytes,
        rows=rows,
        shards=entries,
        codebook=place.pin(CODEBOOK),
    )
    publish_version(index, manifest)
    return promote_version(index, version)


def make_queries(count=20, *, dim=16, seed=1):
    """Give random queries."""
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
