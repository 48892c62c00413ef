import subprocess
import sys
import threading

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")
from reference import search_in_loops  # noqa: E402
from worlds import make_codebook, make_index, make_queries, make_vectors  # noqa: E402

from gsl_dist.errors import ArtefactError, BadInput, QueryError  # noqa: E402
from gsl_dist.hits import FAR, Hits, merge_topk  # noqa: E402
from gsl_dist.index.search import MAX_K, open_searcher  # noqa: E402
from gsl_dist.index.shards import read_shard  # noqa: E402
from gsl_dist.storage import Folder  # noqa: E402

KINDS = [("pq", False), ("pq", True), ("rq", False), ("lsq", False), ("rq", True)]
PARTITIONS = [(1, False), (8, True), (8, False)]
kinds = pytest.mark.parametrize("kind, rotated", KINDS)
partitions = pytest.mark.parametrize("cells, residual", PARTITIONS)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    make_index(folder)
    return open_searcher(str(folder))


def open_world(folder, **settings):
    make_index(folder, **settings)
    return open_searcher(str(folder))


def decode_all(searcher):
    """Every item of a searcher: its id and the vector that its code stands for."""
    ids, cells, codes = searcher.lists.read()
    return ids, searcher.codebook.decode(cells, searcher.codebook.unpack(codes))


def assert_same_but_for_ties(one, other):
    """Equal distances, and equal ids wherever no other distance ties with the hit's."""
    assert np.allclose(one.distances, other.distances, rtol=1e-4, atol=1e-4)
    for left, right, distances in zip(one.ids, other.ids, one.distances.astype(np.float64), strict=True):
        for at in np.flatnonzero(left != right):
            # At the last place the tie may be with an item that was cut off.
            assert at == len(left) - 1 or (np.abs(np.delete(distances, at) - distances[at]) < 1e-3).any()


@pytest.mark.parametrize("probes", [1, 3, 8])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_one_index_equals_its_shards(tmp_path, shards, probes):
    one, many = open_world(tmp_path / "one", shards=1), open_world(tmp_path / "many", shards=shards)
    answer = many.search(make_queries(), 10, probes=probes)
    assert_same_but_for_ties(one.search(make_queries(), 10, probes=probes), answer)
    assert (answer.shards_answered, answer.shards_total, answer.version) == (shards, shards, "v1")
    assert one.rows == many.rows == 400


@kinds
@partitions
def test_joined_shards_answer_as_plain_faiss_does_over_one_file(tmp_path, kind, rotated, cells, residual):
    codebook, queries = make_codebook(kind, rotated=rotated, cells=cells, residual=residual), make_queries()
    make_index(tmp_path / "one", shards=1, codebook=codebook)
    plain = faiss.read_index(str(tmp_path / "one" / "versions" / "v1" / "shard-00000.faiss"))
    searcher = open_world(tmp_path / "many", shards=3, codebook=codebook)
    for probes in {1, min(3, cells), cells}:
        distances, ids = plain.search(queries, 10, params=faiss.SearchParametersIVF(nprobe=probes))
        assert_same_but_for_ties(searcher.search(queries, 10, probes=probes), Hits(ids, distances, 3, 3))


@kinds
@partitions
def test_every_kind_finds_what_is_nearest_among_decoded_vectors(tmp_path, kind, rotated, cells, residual):
    codebook = make_codebook(kind, rotated=rotated, cells=cells, residual=residual)
    searcher, queries = open_world(tmp_path, rows=150, shards=2, codebook=codebook), make_queries(6)
    wanted = search_in_loops(queries, *decode_all(searcher), 15)
    hits = searcher.search(queries, 15, probes=cells)
    assert np.allclose(hits.distances, [[distance for distance, _ in row] for row in wanted], rtol=1e-4)
    assert np.array_equal(hits.ids, [[item for _, item in row] for row in wanted])


def test_a_process_that_makes_no_index_opens_one_rotated_file_after_another(tmp_path):
    # Handing over what SWIG owns breaks faiss after some files, unless objects made in the process hide it.
    make_index(tmp_path, shards=9, codebook=make_codebook(rotated=True))
    script = "import sys; from gsl_dist.index.search import open_searcher; print(open_searcher(sys.argv[1]).rows)"
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.strip() == "400" and "leak" not in run.stderr, run.stderr


@kinds
def test_an_empty_version_of_every_kind_finds_nothing(tmp_path, kind, rotated):
    hits = open_world(tmp_path, rows=0, shards=2, codebook=make_codebook(kind, rotated=rotated)).search(make_queries(2))
    assert (hits.ids == -1).all() and (hits.distances == FAR).all() and hits.shards_answered == 2


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_answers_of_single_shards_merge_to_that_of_all(tmp_path, shards):
    many = open_world(tmp_path, shards=shards)
    alone = [open_searcher(str(tmp_path), names=[name]) for name in many.shards]
    answers = [searcher.search(make_queries(), 10, probes=3) for searcher in alone]
    assert [answer.shards_answered for answer in answers] == [1] * shards
    merged = merge_topk(answers, 10)
    assert_same_but_for_ties(many.search(make_queries(), 10, probes=3), merged)
    assert (merged.shards_answered, merged.is_partial) == (shards, False)


def test_searching_all_cells_equals_comparing_with_every_decoded_vector(searcher):
    queries = make_queries(6)
    hits = searcher.search(queries, 15, probes=8)
    wanted = search_in_loops(queries, *decode_all(searcher), 15)
    assert np.allclose(hits.distances, [[distance for distance, _ in row] for row in wanted], rtol=1e-4)
    assert np.array_equal(hits.ids, [[item for _, item in row] for row in wanted])


def test_searching_some_cells_equals_comparing_with_the_vectors_in_them(searcher):
    queries = make_queries(6)
    ids, cells, codes = searcher.lists.read()
    vectors = searcher.codebook.decode(cells, searcher.codebook.unpack(codes))
    hits = searcher.search(queries, 5, probes=2)
    for query, found in zip(queries, hits.ids, strict=True):
        near = np.argsort(np.square(searcher.codebook.coarse - query).sum(axis=1))[:2]
        inside = np.isin(cells, near)
        wanted = search_in_loops([query], ids[inside], vectors[inside], 5)[0]
        assert found.tolist() == [item for _, item in wanted]


def test_more_neighbours_than_items_are_filled_up(tmp_path):
    hits = open_world(tmp_path, rows=5, shards=2).search(make_queries(2), 9, probes=8)
    assert (np.sort(hits.ids[:, :5]) == np.arange(5)).all()
    assert (hits.ids[:, 5:] == -1).all() and (hits.distances[:, 5:] == FAR).all()


def test_a_version_with_more_shards_than_rows_is_searched(tmp_path):
    hits = open_world(tmp_path, rows=3, shards=7).search(make_queries(2), 3, probes=8)
    assert (np.sort(hits.ids) == np.arange(3)).all() and hits.shards_answered == 7


def test_a_single_query_is_a_batch_of_one(searcher):
    query = make_queries(1)
    for given in (query[0], query[0].tolist(), query.tolist(), query.astype(np.float64)):
        assert np.array_equal(searcher.search(given).ids, searcher.search(query).ids)


def test_no_queries_have_no_answers(searcher):
    assert searcher.search(np.empty((0, 16), np.float32), 4).ids.shape == (0, 4)


def test_a_query_alone_finds_what_it_finds_in_a_batch(searcher):
    queries = make_queries()
    batch = searcher.search(queries, 7)
    for at, query in enumerate(queries):
        assert np.array_equal(searcher.search(query, 7).ids[0], batch.ids[at])


def test_searching_leaves_the_queries_alone(searcher):
    queries = make_queries()
    queries.flags.writeable = False
    before = queries.tobytes()
    searcher.search(queries[:, ::-1])
    searcher.search(queries)
    assert queries.tobytes() == before


def test_probes_are_of_the_call_and_not_of_the_index(searcher):
    queries, answers = make_queries(), {}
    wanted = {probes: searcher.search(queries, 10, probes=probes).ids for probes in (1, 8)}

    def work(probes):
        answers[probes] = [searcher.search(queries, 10, probes=probes).ids for _ in range(20)]

    threads = [threading.Thread(target=work, args=(probes,)) for probes in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(ids, wanted[probes]) for probes, found in answers.items() for ids in found)


@pytest.mark.parametrize(
    "queries, match",
    [
        (np.ones((2, 15)), "vectors of 16 numbers"),
        (np.ones((2, 17)), "vectors of 16 numbers"),
        (np.ones(15), "vectors of 16 numbers"),
        (np.ones((1, 1, 16)), "vectors of 16 numbers"),
        (np.ones((2, 0)), "vectors of 16 numbers"),
        ([], "vectors of 16 numbers"),
        (3.0, "vectors of 16 numbers"),
        (np.r_[np.ones((1, 16)), np.full((1, 16), np.nan)], "row 1"),
        (np.full((1, 16), np.inf), "finite"),
        (np.full((1, 16), 1e300), "finite"),
        ([["a"] * 16], "rows of 16 numbers"),
        ([["1"] * 16], "rows of 16 numbers"),
        ("word", "rows of 16 numbers"),
        ([[1.0] * 16, [1.0] * 15], "rows of 16 numbers"),
        ([[None] * 16], "rows of 16 numbers"),
        (None, "rows of 16 numbers"),
        ({"a": 1}, "rows of 16 numbers"),
        ([[1j] * 16], "rows of 16 numbers"),
        ([[True] * 16], "rows of 16 numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_vector_of_the_index_is_refused(searcher, queries, match):
    with pytest.raises(QueryError, match=match) as caught:
        searcher.search(queries)
    assert caught.value.field == "vectors" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "k, probes, field",
    [
        (0, None, "k"),
        (-1, None, "k"),
        (MAX_K + 1, None, "k"),
        (2.5, None, "k"),
        ("3", None, "k"),
        (None, None, "k"),
        (True, None, "k"),
        (3, 0, "probes"),
        (3, -1, "probes"),
        (3, 9, "probes"),
        (3, 1.5, "probes"),
        (3, "2", "probes"),
        (3, True, "probes"),
    ],
)
def test_counts_out_of_range_are_refused(searcher, k, probes, field):
    with pytest.raises(QueryError) as caught:
        searcher.search(make_queries(1), k, probes=probes)
    assert caught.value.field == field


def test_the_largest_counts_are_answered(searcher):
    hits = searcher.search(make_queries(1), np.int64(MAX_K), probes=np.int32(8))
    assert (hits.ids[0, :400] >= 0).all() and (hits.ids[0, 400:] == -1).all()


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "absent"])
def test_a_damaged_shard_is_refused_before_faiss_reads_it(tmp_path, monkeypatch, damage):
    make_index(tmp_path)
    path = tmp_path / "versions" / "v1" / "shard-00000.faiss"
    content = path.read_bytes()
    altered = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
    path.write_bytes({"truncated": content[:-1], "altered": altered, "empty": b""}.get(damage, b""))
    if damage == "absent":
        path.unlink()
    monkeypatch.setattr(faiss, "read_index", lambda *args: pytest.fail("faiss read a damaged file"))
    with pytest.raises(ArtefactError) as caught:
        open_searcher(str(tmp_path))
    assert caught.value.path == str(path)


def test_a_shard_built_with_another_codebook_is_refused(tmp_path):
    manifest = make_index(tmp_path)
    make_index(tmp_path, seed=5, version="v2")
    from gsl_dist.index.manifest import publish_version

    # Checksums that fit and a codebook that does not: the shards of v2 under the codebook of v1.
    folder = Folder(tmp_path)
    folder.write_bytes("versions/v3/codebook.safetensors", folder.read_bytes("versions/v1/codebook.safetensors"))
    shards = []
    for shard in manifest.shards:
        name = f"versions/v3/{shard.index.name}"
        folder.write_bytes(name, folder.read_bytes(f"versions/v2/{shard.index.name}"))
        pinned = folder.pin(name).model_copy(update={"name": shard.index.name})
        shards.append(shard.model_copy(update={"index": pinned}))
    publish_version(folder, manifest.model_copy(update={"version": "v3", "shards": shards}))
    with pytest.raises(ArtefactError, match="another codebook"):
        open_searcher(str(tmp_path), "v3")


def test_some_shards_give_a_partial_answer(tmp_path):
    make_index(tmp_path)
    part = open_searcher(str(tmp_path), names=["shard-00001"])
    hits = part.search(make_queries(), 3, probes=8)
    assert hits.is_partial and (hits.shards_answered, hits.shards_total) == (1, 3)
    assert set(hits.ids.ravel()) <= set(range(134, 267)) and part.rows == 133


@pytest.mark.parametrize("names", [["shard-00009"], ["shard-00000", "shard-00009"], []])
def test_a_shard_that_does_not_exist_is_refused(tmp_path, names):
    make_index(tmp_path)
    with pytest.raises(BadInput, match="version v1 has shard-00000, shard-00001, shard-00002"):
        open_searcher(str(tmp_path), names=names)


def rank_products(queries, ids, vectors, k):
    products = queries @ vectors.T
    order = np.lexsort((np.broadcast_to(ids, products.shape), -products), axis=1)[:, :k]
    return ids[order], np.take_along_axis(products, order, axis=1)


@kinds
@partitions
def test_inner_products_of_every_kind_are_those_with_decoded_vectors(tmp_path, kind, rotated, cells, residual):
    codebook = make_codebook(kind, rotated=rotated, cells=cells, residual=residual, metric="ip")
    searcher, queries = open_world(tmp_path, rows=150, shards=2, codebook=codebook), make_queries(6)
    ids, products = rank_products(queries, *decode_all(searcher), 15)
    hits = searcher.search(queries, 15, probes=cells)
    np.testing.assert_allclose(hits.distances, products, rtol=1e-4, atol=1e-4)
    assert np.array_equal(hits.ids, ids) and searcher.manifest.metric == "ip"
    path = tmp_path / "versions" / "v1" / "shard-00000.faiss"
    plain, _ = faiss.read_index(str(path)).search(queries, 1, params=faiss.SearchParametersIVF(nprobe=cells))
    here = open_searcher(str(tmp_path), names=["shard-00000"]).search(queries, 1, probes=cells)
    np.testing.assert_allclose(plain, here.distances, rtol=1e-4)


def test_where_inner_products_find_nothing_the_worst_stands(tmp_path):
    hits = open_world(tmp_path, rows=3, codebook=make_codebook(metric="ip")).search(make_queries(2), 5, probes=8)
    assert (hits.ids[:, 3:] == -1).all() and (hits.distances[:, 3:] == -FAR).all()


@pytest.mark.parametrize("kind", ["pq", "rq", "cq", "vlq"])
def test_cosines_are_distances_of_vectors_of_length_1(tmp_path, kind):
    flat = make_codebook(kind, residual=kind != "cq")
    plain = open_world(tmp_path / "l2", codebook=flat)
    round_ = open_world(tmp_path / "cosine", codebook=make_codebook(kind, residual=kind != "cq", metric="cosine"))
    queries = make_queries(6)
    wanted = plain.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), 10, probes=8)
    hits = round_.search(queries * 3, 10, probes=8)
    np.testing.assert_allclose(hits.distances, 1 - wanted.distances / 2, rtol=1e-4, atol=1e-4)
    assert np.array_equal(hits.ids, wanted.ids) and round_.manifest.fingerprint != plain.manifest.fingerprint
    with pytest.raises(QueryError, match="only zeros in row 1"):
        round_.search([queries[0], np.zeros(16)])


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_kept_vectors_are_ranked_by_the_metric(tmp_path, metric):
    codebook, queries = make_codebook(metric=metric), make_queries(5)
    searcher = open_world(tmp_path, codebook=codebook, vectors="float16")
    hits, kept = searcher.search(queries, 5, probes=8, refine=80), make_vectors().astype(np.float16).astype(np.float32)
    if metric == "ip":
        ids, shown = rank_products(queries, np.arange(400), kept, 5)
    else:
        unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        far = np.square(unit[:, None] - kept).sum(2)
        ids = np.argsort(far, axis=1)[:, :5]
        shown = 1 - np.take_along_axis(far, ids, axis=1) / 2
    assert np.array_equal(hits.ids, ids)
    np.testing.assert_allclose(hits.distances, shown, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cq", "vlq", "rabitq"])
def test_kinds_that_know_no_inner_products_have_none(kind):
    with pytest.raises(AssertionError):
        make_codebook(kind, residual=kind != "cq", metric="ip")


def test_a_file_of_another_metric_is_refused(tmp_path):
    make_index(tmp_path, codebook=make_codebook(metric="ip"))
    path = tmp_path / "versions" / "v1" / "shard-00000.faiss"
    for metric in ("l2", "cosine"):
        with pytest.raises(ArtefactError, match="another codebook"):
            read_shard(path, make_codebook(metric=metric))
