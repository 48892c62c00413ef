"""Product codes of 4 bits in blocks: the same codes, searched by fast-scan to the precision of its tables.

RaBitQ codes in blocks are looked at in `test_rabitq_shards`.
"""

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_queries, make_rows  # noqa: E402

from gsl_dist.errors import ArtefactError  # noqa: E402
from gsl_dist.hits import FAR  # noqa: E402
from gsl_dist.index.blocks import append_rows, open_blocks, read_rows  # noqa: E402
from gsl_dist.index.lists import join_lists, make_lists, open_lists  # noqa: E402
from gsl_dist.index.shards import create_shard, extract_codebook, suits_fastscan  # noqa: E402

WORLDS = [
    {"residual": False, "choices": 8},
    {"residual": True, "choices": 8, "rotated": True},
    {"residual": True, "choices": 3, "dim": 24},
    {"residual": False, "choices": 1, "rotated": True},
    {"residual": False, "choices": 16, "cells": 1},
]
worlds = pytest.mark.parametrize("world", WORLDS, ids=str)


def make_fast(codebook, rows, coarse_search="flat"):
    return make_lists(codebook, *rows, coarse_search, "fastscan")


def tie_precision(codebook, queries):
    """Give how far off a distance may be for each query: half a step of a byte for every table, and for their sum."""
    turned = codebook.rotate(queries)[:, None]
    rest = (turned - codebook.coarse if codebook.residual else turned).reshape(
        len(queries), -1, codebook.sub_vectors, 1, codebook.dim // codebook.sub_vectors
    )
    tables = np.square(rest - codebook.books).sum(-1)
    spans = tables.max(-1) - tables.min(-1)
    sums = (tables.max(-1).sum(-1)).max(-1) - (tables.min(-1).sum(-1)).min(-1)
    steps = np.maximum(spans.max((1, 2)) / 255, sums / 65535)
    return (codebook.sub_vectors + 2) / 2 * steps[:, None] + 1e-3


def measure_decoded(codebook, rows, queries):
    """Give the distance of each query to each decoded row."""
    decoded = codebook.decode(rows[1], codebook.unpack(rows[2]))
    return np.square(queries[:, None].astype(np.float64) - decoded).sum(2)


@worlds
@pytest.mark.parametrize("k", [10, 60])
def test_plain_faiss_finds_in_blocks_what_is_nearest_to_the_precision_of_a_byte(tmp_path, world, k):
    codebook = make_codebook(**world)
    rows, queries = make_rows(codebook, 700), make_queries(9, dim=codebook.dim)
    make_fast(codebook, rows).write(tmp_path / "shard")
    index = faiss.read_index(str(tmp_path / "shard"))
    lists = index if codebook.rotation is None else faiss.downcast_index(index.index)
    assert isinstance(lists, faiss.IndexIVFPQFastScan) and index.ntotal == 700
    far, slack = measure_decoded(codebook, rows, queries), tie_precision(codebook, queries)
    opened = open_lists(tmp_path / "shard", codebook)
    place = {int(item): at for at, item in enumerate(rows[0])}
    for distances, ids in (
        index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=codebook.cells)),
        opened.search(queries, k, codebook.cells),
    ):
        own = np.stack([row[[place[int(item)] for item in hits]] for row, hits in zip(far, ids, strict=True)])
        assert (np.abs(own - distances) <= slack).all(), "distances are those to decoded vectors"
        assert (own <= np.sort(far)[:, k - 1 : k] + 2 * slack).all(), "nothing much nearer was left out"
        assert all(len(set(hits)) == k for hits in ids)


def test_blocks_find_nearly_what_a_plain_scan_finds():
    codebook = make_codebook(dim=32, choices=16)
    rows, queries = make_rows(codebook, 5000), make_queries(100, dim=32)
    fast, plain = (make_lists(codebook, *rows, "flat", layout) for layout in ("fastscan", "plain"))
    found, wanted = fast.search(queries, 10, 3)[1], plain.search(queries, 10, 3)[1]
    shared = [len(set(one) & set(other)) for one, other in zip(found, wanted, strict=True)]
    assert np.mean(shared) > 9


@worlds
def test_what_was_put_in_blocks_is_read_back_in_list_order(tmp_path, world):
    codebook = make_codebook(**world)
    rows = make_rows(codebook, 700)
    make_fast(codebook, rows).write(tmp_path / "shard")
    order = np.lexsort((rows[0], rows[1]))
    for part, wanted in zip(open_lists(tmp_path / "shard", codebook).read(), rows, strict=True):
        np.testing.assert_array_equal(part, wanted[order])


@worlds
def test_the_codebook_of_a_file_of_blocks_is_the_one_given_and_no_other_opens_it(tmp_path, world):
    codebook = make_codebook(**world)
    make_fast(codebook, make_rows(codebook)).write(tmp_path / "shard")
    assert extract_codebook(faiss.read_index(str(tmp_path / "shard"))).fingerprint == codebook.fingerprint
    with pytest.raises(ArtefactError, match="another codebook"):
        open_lists(tmp_path / "shard", make_codebook(**world | {"seed": 5}))


def test_blocks_of_another_size_are_refused(tmp_path):
    codebook = make_codebook()
    plain = make_lists(codebook, *make_rows(codebook))
    faiss.write_index(faiss.IndexIVFPQFastScan(plain.index, 64), str(tmp_path / "shard"))
    with pytest.raises(ArtefactError, match="blocks of 64 rows are none of ours"):
        open_lists(tmp_path / "shard", codebook)


@pytest.mark.parametrize("residual", [False, True])
def test_what_plain_faiss_adds_to_blocks_is_what_it_adds_to_plain_lists(tmp_path, residual):
    codebook = make_codebook(residual=residual, choices=5, dim=20)
    x_ND, ids, read = make_queries(400, dim=20, seed=3) * 3, np.arange(400), []
    for layout in ("plain", "fastscan"):
        make_lists(codebook, *(part[:0] for part in make_rows(codebook)), "flat", layout).write(tmp_path / layout)
        index = faiss.read_index(str(tmp_path / layout))
        index.add_with_ids(x_ND, ids)
        faiss.write_index(index, str(tmp_path / layout))
        read.append(open_lists(tmp_path / layout, codebook).read())
    for one, other in zip(*read, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("counts", [(1, 1, 1), (32, 32, 5), (31, 2, 64), (128, 128, 1), (256, 40, 0), (0, 7, 300)])
def test_rows_appended_piece_by_piece_are_those_put_in_at_once(counts):
    # 128 rows are as many as a block of 8 choices has bytes, where faiss's own way of adding writes past the end.
    codebook = make_codebook()
    ids, _, codes = make_rows(codebook, sum(counts))
    indexes = [create_shard(codebook, "flat", "fastscan") for _ in range(2)]
    pieces, whole = (open_blocks(index) for index in indexes)
    for start, count in zip(np.cumsum((0, *counts)), counts, strict=False):
        append_rows(pieces, 3, ids[start : start + count], codes[start : start + count])
    append_rows(whole, 3, ids, codes)
    for lists in (pieces, whole):
        np.testing.assert_array_equal(read_rows(lists, 3), codes)
        np.testing.assert_array_equal(faiss.rev_swig_ptr(lists.get_ids(3), len(ids)), ids)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("coarse_search", ["flat", "hnsw"])
def test_joined_blocks_answer_as_one(coarse_search, residual):
    codebook = make_codebook(cells=2, residual=residual)
    ids, _, codes = make_rows(codebook, 256 * 3)
    cells = np.arange(len(ids)) // 3 % 2  # 128 rows of each cell in each shard
    shards = [make_fast(codebook, (ids[at::3], cells[at::3], codes[at::3]), coarse_search) for at in range(3)]
    joined, whole = join_lists(shards), make_fast(codebook, (ids, cells, codes), coarse_search)
    assert joined.rows == whole.rows == len(ids) and isinstance(joined.centroids, faiss.IndexHNSW) == (
        coarse_search == "hnsw"
    )
    assert sorted(joined.read()[0]) == sorted(ids)
    queries = make_queries()
    found, wanted = (lists.search(queries, 9, 2)[0] for lists in (joined, whole))
    np.testing.assert_allclose(found, wanted, atol=float(tie_precision(codebook, queries).max()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("k", [3, 30])
def test_where_nothing_is_found_stand_no_id_and_the_largest_distance(tmp_path, k, residual):
    codebook = make_codebook(residual=residual)
    make_fast(codebook, tuple(part[:0] for part in make_rows(codebook))).write(tmp_path / "none")
    opened = open_lists(tmp_path / "none", codebook)
    distances, ids = opened.search(make_queries(), k, 3)
    assert (ids == -1).all() and (distances == FAR).all() and opened.rows == len(opened.read()[0]) == 0


def test_opening_residual_blocks_makes_no_tables_and_joining_makes_them(tmp_path):
    codebook = make_codebook()
    make_fast(codebook, make_rows(codebook)).write(tmp_path / "shard")
    opened = open_lists(tmp_path / "shard", codebook)
    assert opened.index.precomputed_table.nbytes() == 0
    assert join_lists([opened]).index.precomputed_table.nbytes() > 0


@pytest.mark.parametrize(
    ("kind", "bits", "suits"),
    [("pq", 4, True), ("rabitq", 1, True), ("pq", 8, False), ("rq", 4, False), ("vlq", 4, False)],
)
def test_product_codes_of_four_bits_and_rabitq_codes_suit_blocks(kind, bits, suits):
    assert suits_fastscan(make_codebook(kind, bits=bits)) == suits
