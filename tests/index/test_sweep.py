"""Search in the order of lists gives what search query by query gives."""

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

faiss = pytest.importorskip("faiss")
from reference import search_in_loops  # noqa: E402
from worlds import make_codebook, make_index, make_queries, make_rows, make_vectors  # noqa: E402

from gsl_dist.codebook import Codebook  # noqa: E402
from gsl_dist.index import sweep  # noqa: E402
from gsl_dist.index.coarse import CoarseStep  # noqa: E402
from gsl_dist.index.lists import make_lists  # noqa: E402
from gsl_dist.index.refine import keep_vectors  # noqa: E402
from gsl_dist.index.search import open_searcher  # noqa: E402
from gsl_dist.index.sweep import group_queries, rank_kept, suits_sweep, sweep_lists  # noqa: E402

KINDS = [("pq", False), ("pq", True), ("rq", False), ("lsq", False), ("rq", True), ("cq", False)]
PARTITIONS = [(1, False), (8, True), (8, False)]
WORLDS = [
    (kind, rotated, *partition, metric)
    for (kind, rotated), partition, metric in itertools.product(KINDS, PARTITIONS, ("l2", "ip", "cosine"))
    if kind != "cq" or (not partition[1] and metric != "ip")  # there are no other composite codes
]


def open_both(folder, **settings):
    make_index(folder, **settings)
    plain = open_searcher(str(folder))
    return plain, replace(plain, lists=sweep_lists(plain.lists))


def assert_same(one, other):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, rotated, cells, residual, metric", WORLDS)
def test_every_kind_answers_as_it_does_query_by_query(tmp_path, kind, rotated, cells, residual, metric):
    codebook = make_codebook(kind, rotated=rotated, cells=cells, residual=residual, metric=metric)
    plain, swept = open_both(tmp_path, shards=2, codebook=codebook)
    for probes in {1, min(3, cells), cells}:
        assert_same(swept.search(make_queries(), 10, probes=probes), plain.search(make_queries(), 10, probes=probes))


def test_lists_cut_into_blocks_answer_as_whole_ones(tmp_path, monkeypatch):
    plain, swept = open_both(tmp_path)
    monkeypatch.setattr(sweep, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(sweep, "_BLOCK_FLOATS", 15)
    assert_same(swept.search(make_queries(), 10, probes=4), plain.search(make_queries(), 10, probes=4))


def test_threads_share_the_queries(tmp_path):
    plain, swept = open_both(tmp_path)
    wanted, before = plain.search(make_queries(), 10, probes=4), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        assert_same(swept.search(make_queries(), 10, probes=4), wanted)
        assert_same(swept.search(make_queries(2), 10, probes=4), plain.search(make_queries(2), 10, probes=4))
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("where", [{"label": {"$gte": 2}}, {"label": 3}, {"label": 9}, {"id": {"$lt": 5}}])
@pytest.mark.parametrize("kind", ["pq", "rq"])
def test_filters_let_through_the_same_rows(tmp_path, monkeypatch, kind, where):
    monkeypatch.setattr("gsl_dist.index.search.FEW_ROWS", 0)
    payload = pa.table({"label": np.arange(400) % 5})
    plain, swept = open_both(tmp_path, payload=payload, codebook=make_codebook(kind))
    for probes in (2, 8):
        found = [searcher.search(make_queries(), 6, probes=probes, where=where) for searcher in (plain, swept)]
        assert_same(*found)
    assert (found[1].ids[:, 0] < 0).all() == (where == {"label": 9})


def test_candidates_are_ranked_by_kept_vectors_as_before(tmp_path):
    plain, swept = open_both(tmp_path, vectors="float16")
    assert_same(swept.search(make_queries(), 5, refine=8), plain.search(make_queries(), 5, refine=8))


def test_more_neighbours_than_rows_no_rows_and_no_queries(tmp_path):
    plain, swept = open_both(tmp_path / "few", rows=5, shards=2)
    assert_same(swept.search(make_queries(3), 9, probes=8), plain.search(make_queries(3), 9, probes=8))
    _, empty = open_both(tmp_path / "none", rows=0, shards=2)
    assert (empty.search(make_queries(2), 4).ids == -1).all()
    assert swept.search(np.empty((0, 16), np.float32), 4).ids.shape == (0, 4)


@pytest.mark.parametrize("coarse_search, code_layout", [("hnsw", "plain"), ("flat", "fastscan")])
def test_graphs_of_cells_and_codes_in_blocks_are_swept(coarse_search, code_layout):
    codebook = make_codebook(cells=32)
    rows = make_rows(codebook, 500)
    plain = make_lists(codebook, *rows, coarse_search, "plain")
    swept = sweep_lists(make_lists(codebook, *rows, coarse_search, code_layout))
    for one, other in zip(plain.search(make_queries(), 5, 8), swept.search(make_queries(), 5, 8), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_lists_that_were_found_before_are_looked_into():
    codebook = make_codebook()
    plain = make_lists(codebook, *make_rows(codebook))
    swept, queries = sweep_lists(plain), make_queries()
    farther = CoarseStep(codebook, "flat").probe(queries, 8)
    farther = farther._replace(lists=farther.lists[:, 5:].copy(), distances=farther.distances[:, 5:].copy())
    farther.lists[3, 1] = -1
    found = swept.search(queries, 5, 3, probed=farther)
    for one, other in zip(plain.search(queries, 5, 3, probed=farther), found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_small_distances_are_not_lost_in_the_rounding_of_large_numbers():
    rng = np.random.default_rng(0)
    books = rng.normal(size=(8, 16, 2)) * 0.01
    codebook = Codebook(rng.normal(size=(4, 16)) + 1000, books, residual=True)
    ids, cells, codes = make_rows(codebook, 200)
    decoded = codebook.decode(cells, codebook.unpack(codes))
    distances, found = sweep_lists(make_lists(codebook, ids, cells, codes)).search(decoded, 1, 4)
    assert np.array_equal(found[:, 0], ids)
    # Two numbers near 1,000 are told apart by 6e-5; a distance of products of such numbers would be off by 1.
    assert distances.max() < 16 * 6e-5**2


def test_each_list_comes_once_with_all_of_its_queries():
    cells = np.array([[2, 0], [-1, 2], [0, 5]])
    assert [(cell, queries.tolist()) for cell, queries in group_queries(cells)] == [(0, [0, 2]), (2, [0, 1]), (5, [2])]
    assert list(group_queries(np.empty((0, 3), np.int64))) == []


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_kept_vectors_are_ranked_as_in_a_loop_over_all(monkeypatch, metric, precision):
    monkeypatch.setattr(sweep, "_BLOCK_ROWS", 33)
    monkeypatch.setattr(sweep, "_BLOCK_FLOATS", 100)
    ids, vectors, queries = np.random.default_rng(0).permutation(900)[:400], make_vectors(), make_queries(9)
    stores = [keep_vectors(ids[some], vectors[some], precision) for some in (slice(0, 150), slice(150, 400))]
    kept_ids = np.concatenate([store.ids_N for store in stores])
    kept = np.concatenate([store.read(np.arange(len(store.ids_N))) for store in stores])
    for chosen in (None, ids[::3], np.empty(0, np.int64)):
        inside = np.ones(400, bool) if chosen is None else np.isin(kept_ids, chosen)
        distances, found = rank_kept(queries, stores, 12, metric, chosen)
        if metric == "l2" and inside.any():
            wanted = search_in_loops(queries, kept_ids[inside], kept[inside], 12)
            assert found.tolist() == [[item for _, item in row] for row in wanted]
            np.testing.assert_allclose(distances, [[far for far, _ in row] for row in wanted], rtol=1e-5)
        elif inside.any():
            order = np.argsort(-(queries @ kept[inside].T), axis=1)[:, :12]
            np.testing.assert_array_equal(found, kept_ids[inside][order])
        else:
            assert (found == -1).all()


def test_a_twin_is_at_no_distance_however_far_from_nothing_it_lies():
    vectors = make_vectors() + 300
    store = keep_vectors(np.arange(400), vectors, "float16")
    distances, found = rank_kept(store.read(np.arange(400)), [store], 1)
    assert not distances.any() and np.array_equal(found[:, 0], np.arange(400))


@pytest.mark.parametrize(
    "kind, changes, layout, per_list, suits",
    [
        ("pq", {"bits": 8}, "plain", 1000, True),
        ("pq", {"bits": 8}, "plain", 20, False),
        ("pq", {"bits": 8, "dim": 256}, "plain", 1000, False),
        ("pq", {}, "plain", 20, True),
        ("pq", {}, "plain", 4, False),
        ("pq", {}, "fastscan", 1000, False),
        ("cq", {"bits": 8, "residual": False}, "plain", 1000, True),
        ("rq", {"dim": 256}, "plain", 20, True),
        ("rq", {}, "plain", 4, False),
        ("vlq", {}, "plain", 1000, False),
        ("rabitq", {}, "plain", 1000, False),
    ],
)
def test_lists_are_swept_where_that_was_measured_to_be_faster(tmp_path, kind, changes, layout, per_list, suits):
    version = make_index(tmp_path, codebook=make_codebook(kind, **changes), rows=0)
    assert suits_sweep(version.model_copy(update={"code_layout": layout}), per_list) == suits
