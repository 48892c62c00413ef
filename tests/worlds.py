"""Small worlds for tests: indexes of random codes, made in an instant."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gsl_dist.artefact import Card, publish_card
from gsl_dist.codebook import Codebook, space_evenly
from gsl_dist.index.lists import make_lists, name_file
from gsl_dist.index.manifest import (
    CODEBOOK,
    Manifest,
    ShardEntry,
    describe_codebook,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.refine import keep_vectors
from gsl_dist.index.stream import FINGERPRINT_KEY, Piece, Portion
from gsl_dist.storage import Folder


def make_codebook(kind="pq", *, bits=4, cells=8, residual=True, rotated=False, dim=16, choices=8, seed=0, metric="l2"):
    """Give a codebook of random numbers, with a random rotation if `rotated`."""
    rng = np.random.default_rng(seed)
    if kind == "rabitq":
        books = space_evenly(dim, bits)
    else:
        books = rng.normal(size=(choices, 1 << bits, dim // choices if kind in ("pq", "vlq") else dim))
    coarse = rng.normal(size=(cells, dim)) * 3
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0] if rotated else None
    bias = rng.normal(size=books.shape[:2]) if kind == "cq" else None
    lines = draw_lines(cells, rng) if kind == "vlq" else {}
    return Codebook(coarse, books, residual, kind, rotation=rotation, bias=bias, metric=metric, **lines)


def draw_lines(cells, rng, *, edges=4):
    """Give random lines between cells."""
    ends = np.stack([rng.permutation(np.delete(np.arange(cells), cell))[:edges] for cell in range(cells)])
    return {"edges": ends, "levels": np.linspace(0, 0.6, 256), "feet": rng.uniform(0, 0.5, ends.shape)}


def make_rows(codebook, rows=300, *, seed=1):
    """Give rows of random codes in random cells: ids in any order, cells, packed codes."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * rows)[:rows].astype(np.int64)
    codes = rng.integers(codebook.codewords, size=(rows, codebook.sub_vectors))
    if codebook.kind == "vlq":
        codes = np.hstack([codes, rng.integers(256, size=(rows, 1))])
    if codebook.kind == "rabitq":
        codes = np.hstack([codes, draw_factors(codes, codebook, rng).view(np.uint8)])
    return ids, rng.integers(codebook.lists, size=rows), codebook.pack(codes)


def draw_factors(codes, codebook, rng):
    """Give the factors of rows that are what RaBitQ codes stand for, at random scales: nothing is lost to coding."""
    scales, dim = rng.uniform(0.5, 2, size=len(codes)), codebook.dim
    rests = (codes + 0.5 - codebook.codewords / 2) * scales[:, None]
    squares, sums = np.square(rests).sum(1), np.abs(rests).sum(1)
    factors = [squares, squares * dim**0.5 / sums]
    if codebook.bits > 1:
        slant = np.maximum(squares * dim / sums**2 - 1, 0)
        factors += [3.8 * np.sqrt(squares * slant / (dim - 1)), squares, -2 * scales]
    return np.stack(factors, 1).astype(np.float32)


def make_index(
    folder,
    *,
    rows=400,
    dim=16,
    cells=8,
    shards=3,
    seed=0,
    version="v1",
    codebook=None,
    vectors=None,
    payload=None,
    sharding="id",
    coarse_search="flat",
    code_layout="plain",
):
    """Publish and promote a version of random codes in `folder`, and give its manifest.

    The codes depend on the seed alone: the same rows, dealt out to however many shards. With `vectors`, a precision,
    the version keeps those of `make_vectors`; `payload` is a table with a row for each id in order.
    """
    codebook = codebook or make_codebook(dim=dim, cells=cells, seed=seed)
    _, cells_N, codes = make_rows(codebook, rows, seed=seed + 1)
    index = Folder(folder)
    place = version_folder(index, version)
    codebook.save(place, CODEBOOK)
    entries = []
    ids = np.arange(rows, dtype=np.int64)
    by_cell = [ids[cells_N % shards == rank] for rank in range(shards)]
    for rank, ids_N in enumerate(np.array_split(ids, shards) if sharding == "id" else by_cell):
        name = f"shard-{rank:05d}"
        file = name_file(name, codebook)
        with place.whole(file) as path:
            make_lists(codebook, ids_N, cells_N[ids_N], codes[ids_N], coarse_search, code_layout).write(path)
        kept = None
        if vectors:
            keep_vectors(ids_N, make_vectors(rows, dim)[ids_N], vectors).write(Path(place.path(f"{name}.vectors")))
            kept = place.pin(f"{name}.vectors")
        entry = ShardEntry(name=name, rows=len(ids_N), index=place.pin(file), vectors=kept)
        if payload is not None:
            columns = payload.take(ids_N).add_column(0, "id", [ids_N])
            pq.write_table(columns, place.path(f"{name}.parquet"))
            entry = entry.model_copy(update={"payload": place.pin(f"{name}.parquet")})
        entries.append(entry)
    manifest = Manifest(
        version=version,
        created="2026-01-01T00:00:00+00:00",
        rows=rows,
        shards=entries,
        codebook=place.pin(CODEBOOK),
        vectors=vectors,
        sharding=sharding,
        coarse_search=coarse_search,
        code_layout=code_layout,
        **describe_codebook(codebook),
    )
    publish_version(index, manifest)
    return promote_version(index, version)


def make_vectors(rows=400, dim=16, *, seed=2):
    """Give random vectors, of ids 0, 1, 2 and so on."""
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def make_queries(count=20, *, dim=16, seed=1):
    """Give random queries."""
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def write_codes(place, codebook, rows, *, files=1, group=64, vectors=None, payload=None):
    """Write a folder of codes and one of their codebook in `place`, as the stages do, and give the files as pieces.

    Rows are dealt out in runs. `payload` is a table of as many rows; vectors are kept as float16.
    """
    ids, lists, codes = rows
    table = pa.table({"id": ids, "cell": lists.astype(np.int32)})
    table = table.append_column("code", pa.array(list(map(bytes, codes)), pa.binary(codebook.code_bytes)))
    for name in [] if payload is None else payload.column_names:
        table = table.append_column(name, payload[name])
    if vectors is not None:
        halves = pa.array(vectors.astype(np.float16).ravel())
        table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(halves, codebook.dim))
    table = table.replace_schema_metadata({FINGERPRINT_KEY: codebook.fingerprint.encode()})
    folder, home, edges = Folder(place / "codes"), Folder(place / "codebook"), np.linspace(0, len(ids), files + 1)
    pieces = []
    for number, (start, stop) in enumerate(zip(edges[:-1].astype(int), edges[1:].astype(int), strict=True)):
        with folder.whole(f"shard-{number:05d}.parquet") as path:
            pq.write_table(table.slice(start, stop - start), path, row_group_size=group)
        pieces.append(Piece(f"shard-{number:05d}.parquet", 0, int(stop - start)))
    facts = {"codebook_fingerprint": codebook.fingerprint, "rows": len(ids), "rejects": 0}
    facts["shards"] = [{"name": piece.name.split(".")[0], "rows": piece.rows} for piece in pieces]
    facts["payload_columns"] = [] if payload is None else payload.column_names
    pins = [folder.pin(piece.name) for piece in pieces]
    made = {"made_by": f"{len(ids)} rows", "config": {"keep_vectors": vectors is not None}}
    publish_card(folder, Card(kind="codes", files=pins, facts=facts, **made))
    codebook.save(home, CODEBOOK)
    publish_card(home, Card(kind="codebook", files=[home.pin(CODEBOOK)], facts={}, **made))
    return pieces


def join_pieces(place, pieces, name="shard-00000"):
    """Give all rows of some files of codes as one portion."""
    return Portion(name, str(place / "codes"), tuple(pieces), sum(piece.rows for piece in pieces))
