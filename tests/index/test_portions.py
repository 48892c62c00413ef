"""Versions cut by id, by cell, and not at all: each shard holds what it should, and all answer alike."""

import numpy as np
import pytest

pytest.importorskip("faiss")
from reference import deal_cells_in_loops
from worlds import join_pieces, make_codebook, make_queries, make_rows, make_vectors, write_codes

from gsl_dist.hits import merge_topk
from gsl_dist.index import vlq
from gsl_dist.index.bounded import hold_ids, write_lists, write_vectors
from gsl_dist.index.lists import name_file, open_lists
from gsl_dist.index.manifest import (
    CODEBOOK,
    Manifest,
    ShardEntry,
    describe_codebook,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.portions import cut_by_cell, cut_by_id, deal_cells
from gsl_dist.index.search import open_searcher
from gsl_dist.index.stream import Piece, count_lists
from gsl_dist.storage import Folder

ROOM = 4_000


def cut(place, codebook, pieces, sharding, shards):
    if sharding == "id":
        return cut_by_id(str(place / "codes"), pieces, shards)
    sizes = count_lists(join_pieces(place, pieces), codebook)
    return cut_by_cell(str(place / "codes"), pieces, shards, sizes, codebook)


def make_version(place, codebook, portions, name):
    index = Folder(place / name)
    folder, entries = version_folder(index, "v1"), []
    codebook.save(folder, CODEBOOK)
    for portion in portions:
        file, vectors = name_file(portion.name, codebook), portion.name.replace("shard", "vectors")
        with folder.whole(file) as path:
            write_lists(portion, codebook, path, ROOM)
        with folder.whole(vectors) as path:
            write_vectors(portion, hold_ids(portion), codebook.dim, path, ROOM, "float16")
        pins = {"index": folder.pin(file), "vectors": folder.pin(vectors)}
        entries.append(ShardEntry(name=portion.name, rows=portion.rows, **pins))
    told = {"version": "v1", "created": "", "rows": sum(entry.rows for entry in entries), "vectors": "float16"}
    publish_version(
        index, Manifest(**told, **describe_codebook(codebook), shards=entries, codebook=folder.pin(CODEBOOK))
    )
    promote_version(index, "v1")
    return str(place / name)


@pytest.mark.parametrize("kind", ["pq", "rq", "lsq", "cq", "vlq", "vlq plainly"])
def test_shards_by_id_by_cell_and_a_single_one_answer_the_same(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(vlq, "COMPILED", vlq.COMPILED and "plainly" not in kind)
    # So few rows that shards have empty lists where the whole has none.
    codebook = make_codebook(kind.split()[0], residual=kind != "cq", bits=8, cells=12)
    pieces = write_codes(tmp_path, codebook, make_rows(codebook, 400), files=3, vectors=make_vectors(400))
    answers = {}
    for name, sharding, shards in [("whole", "id", 1), ("ids", "id", None), ("runs", "id", 5), ("cells", "cell", 4)]:
        portions = cut(tmp_path, codebook, pieces, sharding, shards)
        place, queries = make_version(tmp_path, codebook, portions, name), make_queries(30)
        joined = open_searcher(place)
        alone = [open_searcher(place, names=[part.name]) for part in portions]
        for probes in (1, 3, codebook.lists):
            merged = merge_topk([one.search(queries, 10, probes=probes, refine=1) for one in alone], 10)
            found = joined.search(queries, 10, probes=probes, refine=1), merged
            refined = joined.search(queries, 10, probes=probes, refine=4)
            answers.setdefault(probes, []).append((name, *found, refined))
    for (_, whole, _, exact), *others in answers.values():
        for name, joined, merged, refined in others:
            for found, wanted in ((joined, whole), (merged, whole), (refined, exact)):
                np.testing.assert_array_equal(found.ids, wanted.ids, err_msg=name)
                np.testing.assert_allclose(found.distances, wanted.distances, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["pq", "vlq"])
def test_by_cell_every_row_of_a_cell_lies_in_one_shard(tmp_path, kind):
    codebook = make_codebook(kind, cells=20)
    rows = make_rows(codebook, 500)
    portions = cut(tmp_path, codebook, write_codes(tmp_path, codebook, rows, files=3), "cell", 3)
    held = []
    for portion in portions:
        write_lists(portion, codebook, tmp_path / portion.name, ROOM)
        ids, lists, _ = open_lists(tmp_path / portion.name, codebook).read()
        held.append((set(ids.tolist()), set((lists // codebook.edge_count).tolist()), portion.rows))
    assert set.union(*(ids for ids, _, _ in held)) == set(rows[0].tolist())
    assert sum(len(cells) for _, cells, _ in held) == 20 == len(set.union(*(cells for _, cells, _ in held)))
    lengths = [len(ids) for ids, _, _ in held]
    assert lengths == [rows for _, _, rows in held] and max(lengths) - min(lengths) < 20


@pytest.mark.parametrize("shards", [1, 2, 7, 60])
def test_cells_are_dealt_to_the_shard_that_holds_least(shards):
    sizes = np.random.default_rng(shards).geometric(0.02, size=60)
    dealt = deal_cells(sizes, shards)
    assert dealt.tolist() == deal_cells_in_loops(sizes.tolist(), shards)
    lengths = np.bincount(dealt, weights=sizes, minlength=shards)
    assert lengths.max() - lengths.min() <= sizes.max()


def test_empty_cells_are_dealt_out_as_well():
    assert sorted(deal_cells(np.zeros(9, np.int64), 3).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_runs_hold_every_row_once_and_differ_by_one_at_most():
    pieces = [Piece("a", 0, 10), Piece("b", 0, 1, np.array([0])), Piece("c", 0, 12, np.array([1, 11]))]
    assert [portion.pieces for portion in cut_by_id("codes", pieces, None)] == [(piece,) for piece in pieces]
    for shards in (1, 2, 5, 23, 40):
        portions = cut_by_id("codes", pieces, shards)
        rows = [
            (piece.name, row)
            for portion in portions
            for piece in portion.pieces
            for row in range(piece.start, piece.stop)
            if row not in piece.dropped
        ]
        wanted = [(piece.name, row) for piece in pieces for row in range(piece.stop) if row not in piece.dropped]
        assert rows == wanted and sum(portion.rows for portion in portions) == 20
        lengths = [sum(piece.stop - piece.start for piece in portion.pieces) for portion in portions]
        assert len(portions) == min(shards, 23) and max(lengths) - min(lengths) <= 1
