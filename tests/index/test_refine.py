"""Vectors beside the codes: what is kept, and exact ranking of candidates."""

import mmap

import numpy as np
import pytest

pytest.importorskip("faiss")
from worlds import make_index, make_queries, make_vectors

from gsl_dist.errors import ArtefactError, QueryError
from gsl_dist.hits import FAR, Effort
from gsl_dist.index.refine import keep_vectors, measure_exactly, open_vectors
from gsl_dist.index.search import MAX_K, check_effort, open_searcher

every_precision = pytest.mark.parametrize("precision", ["float16", "int8"])
IDS = np.random.default_rng(3).permutation(4000)[:400].astype(np.int64)


def find_owner(array):
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


def measure(queries, vectors):
    return np.square(queries[:, None] - vectors).sum(2, dtype=np.float64)


@every_precision
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_vectors_come_back_as_exactly_as_they_were_kept(precision, scale):
    x = make_vectors() * scale + 3 * scale
    store = keep_vectors(IDS, x, precision)
    places = store.find(IDS)
    step = (x.max(0) - x.min(0)) / 255 if precision == "int8" else np.abs(x) * 2**-10
    assert (np.abs(store.read(places) - x) <= step * 0.51 + 1e-6 * scale).all()
    assert store.kept_ND.itemsize == {"float16": 2, "int8": 1}[precision]


def test_ids_that_are_not_there_have_no_place():
    store = keep_vectors(IDS, make_vectors(), "float16")
    others = np.setdiff1d(np.arange(-2, 4100), IDS)
    assert (store.find(others) == -1).all() and (store.ids_N[store.find(IDS)] == IDS).all()
    assert (keep_vectors(IDS[:0], make_vectors()[:0], "int8").find(IDS) == -1).all()


def test_a_dimension_without_spread_is_kept_exactly():
    x = make_vectors()
    x[:, 3] = 0.1
    store = keep_vectors(IDS, x, "int8")
    np.testing.assert_array_equal(store.read(np.arange(5))[:, 3], np.float32(0.1))


def test_ids_that_follow_on_one_another_have_their_places_too():
    store = keep_vectors(np.arange(50, 450), make_vectors(), "int8")
    assert store.gapless and not keep_vectors(IDS, make_vectors(), "int8").gapless
    asked = np.array([-1, 0, 49, 50, 51, 449, 450, 1 << 40])
    np.testing.assert_array_equal(store.find(asked), [-1, -1, -1, 0, 1, 399, -1, -1])


@every_precision
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_compiled_measure_finds_what_numpy_finds(precision, metric, monkeypatch):
    pytest.importorskip("gsl_dist.index.exact")
    x, queries = make_vectors() * 5 + 3, make_queries(9)
    stores = [keep_vectors(IDS[part::2], x[part::2], precision) for part in range(2)]
    ids = np.random.default_rng(2).choice(np.append(IDS, [-1, 4321]), (9, 40))
    found = measure_exactly(queries, ids, stores, metric)
    monkeypatch.setattr("gsl_dist.index.refine.COMPILED", False)
    plain = measure_exactly(queries, ids, stores, metric)
    assert (found[np.isin(ids, [-1, 4321])] == FAR).all() and (plain < FAR).any()
    np.testing.assert_allclose(found, plain, rtol=1e-4)


@pytest.mark.parametrize("chunk", [50, 1 << 22])
def test_exact_distances_equal_those_to_the_vectors_wherever_they_lie(chunk, monkeypatch):
    monkeypatch.setattr("gsl_dist.index.refine._CHUNK_FLOATS", chunk)
    x, queries = make_vectors().astype(np.float16).astype(np.float32), make_queries(7)
    stores = [keep_vectors(IDS[part::3], x[part::3], "float16") for part in range(3)]
    places = np.random.default_rng(1).integers(400, size=(7, 30))
    asked = IDS[places]
    asked[:, ::7] = -1
    asked[0, 1] = 5000  # of a shard held elsewhere
    found = measure_exactly(queries, asked, stores)
    wanted = np.take_along_axis(measure(queries, x), places, axis=1)
    wanted[:, ::7] = wanted[0, 1] = FAR
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@every_precision
def test_a_store_is_mapped_from_its_file(precision, tmp_path):
    store = keep_vectors(IDS, make_vectors(), precision)
    store.write(tmp_path / "store")
    opened = open_vectors(tmp_path / "store", 400, 16, precision)
    assert isinstance(find_owner(opened.kept_ND), mmap.mmap)
    np.testing.assert_array_equal(opened.read(np.arange(400)), store.read(np.arange(400)))


@pytest.mark.parametrize(("rows", "dim", "precision"), [(399, 16, "float16"), (400, 15, "float16"), (400, 16, "int8")])
def test_a_store_of_another_shape_is_refused(rows, dim, precision, tmp_path):
    keep_vectors(IDS, make_vectors(), "float16").write(tmp_path / "store")
    with pytest.raises(ArtefactError, match=r"it (does not hold|is not a store)"):
        open_vectors(tmp_path / "store", rows, dim, precision)


@pytest.mark.parametrize("content", [b"", b"no store", b"\xff" * 100])
def test_what_is_no_store_is_refused(content, tmp_path):
    (tmp_path / "store").write_bytes(content)
    with pytest.raises(ArtefactError, match="not a store of vectors"):
        open_vectors(tmp_path / "store", 400, 16, "int8")


@pytest.mark.parametrize("shards", [1, 3])
def test_refining_all_candidates_gives_the_true_neighbours(tmp_path, shards):
    make_index(tmp_path, shards=shards, vectors="float16")
    queries, x = make_queries(9), make_vectors().astype(np.float16).astype(np.float32)
    hits = open_searcher(str(tmp_path)).search(queries, 10, probes=8, refine=40)
    exact = measure(queries, x)
    np.testing.assert_array_equal(hits.ids, np.argsort(exact, axis=1)[:, :10])
    np.testing.assert_allclose(hits.distances, np.sort(exact, axis=1)[:, :10], rtol=1e-5)


def test_refining_ranks_the_candidates_that_codes_give_and_no_others(tmp_path):
    make_index(tmp_path, vectors="float16")
    searcher, queries = open_searcher(str(tmp_path)), make_queries(9)
    candidates = searcher.search(queries, 20, probes=8, refine=1).ids
    hits = searcher.search(queries, 5, probes=8, refine=4)
    exact = measure(queries, make_vectors().astype(np.float16).astype(np.float32))
    for row, ids in enumerate(candidates):
        assert hits.ids[row].tolist() == ids[np.argsort(exact[row][ids])[:5]].tolist()


def test_fewer_candidates_than_wanted_are_filled_up(tmp_path):
    make_index(tmp_path, rows=6, vectors="int8")
    hits = open_searcher(str(tmp_path)).search(make_queries(3), 10, probes=8)
    assert (hits.ids[:, 6:] == -1).all() and (hits.distances[:, 6:] == FAR).all() and (hits.ids[:, :6] >= 0).all()


def test_what_is_usual_depends_on_whether_vectors_are_kept(tmp_path):
    kept, bare = make_index(tmp_path / "kept", vectors="int8"), make_index(tmp_path / "bare")
    assert check_effort(Effort(10), kept).refine == 4 and check_effort(Effort(10), bare).refine == 1
    assert check_effort(Effort(10, None, 7), kept).refine == 7 and check_effort(Effort(MAX_K), kept).refine == 1
    for effort, manifest, said in [
        (Effort(10, None, 2), bare, "keeps no vectors"),
        (Effort(10, None, 0), kept, "from 1 to 1638 where k is 10"),
        (Effort(10, None, 1639), kept, "from 1 to 1638 where k is 10"),
        (Effort(10, None, True), kept, "from 1 to 1638"),
    ]:
        with pytest.raises(QueryError, match=said):
            check_effort(effort, manifest)


def test_a_damaged_store_is_refused_before_it_is_used(tmp_path):
    make_index(tmp_path, vectors="int8")
    path = tmp_path / "versions" / "v1" / "shard-00001.vectors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"shard-00001\.vectors"):
        open_searcher(str(tmp_path))
