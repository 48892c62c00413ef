import datetime
import operator
import threading

import numpy as np
import pyarrow as pa
import pytest

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_index, make_queries, make_rows, make_vectors  # noqa: E402

from gsl_dist.errors import ArtefactError, QueryError  # noqa: E402
from gsl_dist.hits import FAR  # noqa: E402
from gsl_dist.index import search  # noqa: E402
from gsl_dist.index.lists import make_lists  # noqa: E402
from gsl_dist.index.search import open_searcher  # noqa: E402
from gsl_dist.index.selection import Selection, find_sorted  # noqa: E402

ROWS = 400
DAYS = [datetime.date(2020, 1, 1) + datetime.timedelta(days=day) for day in range(10)]
COMPARE = {"$eq": operator.eq, "$ne": operator.ne, "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt}
COMPARE |= {"$lte": operator.le, "$in": lambda value, wanted: value in wanted}
COMPARE |= {"$nin": lambda value, wanted: value not in wanted}


def make_payload():
    rng = np.random.default_rng(5)
    drawn = rng.integers(10, size=ROWS)
    gaps = [None if row % 7 == 0 else int(value) for row, value in enumerate(drawn)]
    return pa.table(
        {
            "label": pa.array(drawn, pa.int8()),
            "gap": pa.array(gaps, pa.uint16()),
            "score": pa.array(rng.normal(size=ROWS), pa.float32()),
            "name": pa.array([f"n{value}" for value in drawn]).dictionary_encode(),
            "is_old": pa.array(drawn > 5),
            "day": pa.array([DAYS[value] for value in drawn]),
            "tags": pa.array([[1]] * ROWS),
        }
    )


PAYLOAD = make_payload()
LINES = {"id": range(ROWS)} | {name: PAYLOAD[name].to_pylist() for name in PAYLOAD.column_names}


def let_through(where, row):
    """Whether a filter lets a row through, None where that is unknown: by hand."""
    answers = [judge(key, value, row) for key, value in where.items()]
    return False if False in answers else None if None in answers else True


def judge(key, value, row):
    if key == "$not":
        inner = let_through(value, row)
        return None if inner is None else not inner
    if key in ("$and", "$or"):
        answers, settles = [let_through(part, row) for part in value], key == "$or"
        return settles if settles in answers else None if None in answers else not settles
    found, value = LINES[key][row], value if isinstance(value, dict) else {"$eq": value}
    answers = []
    for name, wanted in value.items():
        if name == "$exists":
            answers.append((found is not None) == wanted)
            continue
        known = found.isoformat() if isinstance(found, datetime.date) else found
        answers.append(None if found is None else COMPARE[name](known, wanted))
    return False if False in answers else None if None in answers else True


WHERES = [
    {"label": 3},
    {"label": {"$ne": 3}},
    {"label": {"$gt": 2, "$lte": 6.5}},
    {"label": {"$in": [1, 2, 300]}},
    {"label": {"$nin": [1, 2]}},
    {"gap": {"$gte": 4}},
    {"$not": {"gap": {"$gte": 4}}},
    {"gap": {"$nin": [1]}},
    {"$not": {"gap": {"$in": [1]}}},
    {"gap": {"$exists": False}},
    {"$or": [{"gap": {"$exists": False}}, {"gap": 2, "score": {"$lt": 0}}]},
    {"score": {"$gt": 0}},
    {"score": {"$gt": 0}, "name": {"$in": ["n1", "n7", "nobody"]}},
    {"name": {"$gte": "n5"}},
    {"is_old": True},
    {"day": {"$lt": "2020-01-04"}},
    {"tags": {"$exists": True}},
    {"id": {"$lt": 50}, "label": {"$ne": 0}},
    {"$and": [{"$or": [{"label": 1}, {"label": 2}]}, {"$not": {"is_old": True}}, {"id": {"$nin": [5, 6]}}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, payload=PAYLOAD)
    return str(folder)


@pytest.mark.parametrize("where", WHERES, ids=str)
def test_a_filter_lets_through_what_reading_it_row_by_row_does(folder, where):
    wanted = [row for row in range(ROWS) if let_through(where, row) is True]
    assert open_searcher(folder).payload.select(where).ids_n.tolist() == wanted and wanted


def open_world(folder, kind, *, vectors=None, metric="l2"):
    codebook = make_codebook(
        kind, residual=kind != "cq", rotated=kind == "rabitq", bits=4 if kind != "rabitq" else 1, metric=metric
    )
    make_index(folder, codebook=codebook, payload=PAYLOAD, vectors=vectors)
    return open_searcher(str(folder))


def rank_by_hand(searcher, queries, where, k):
    """The nearest of the rows that a filter lets through, every one of them measured."""
    ids, lists, codes = searcher.lists.read()
    standing = searcher.codebook.stand_for(lists, searcher.codebook.unpack(codes))
    far = searcher.codebook.measure(queries, standing)
    far[:, [let_through(where, row) is not True for row in ids]] = np.inf
    order = np.lexsort((np.broadcast_to(ids, far.shape), far), axis=1)[:, :k]
    distances = np.take_along_axis(far, order, axis=1)
    return np.where(np.isfinite(distances), ids[order], -1), np.where(np.isfinite(distances), distances, FAR)


@pytest.mark.parametrize("few", [0, 4096], ids=["by lists", "one by one"])
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq", "cq", "vlq"])
@pytest.mark.parametrize("where", [WHERES[2], WHERES[5], WHERES[11]], ids=str)
def test_filtered_search_finds_the_nearest_of_what_is_let_through(tmp_path, monkeypatch, kind, few, where):
    monkeypatch.setattr(search, "FEW_ROWS", few)
    searcher, queries = open_world(tmp_path, kind), make_queries(7)
    ids, distances = rank_by_hand(searcher, queries, where, 10)
    hits = searcher.search(queries, 10, probes=searcher.manifest.lists, where=where)
    np.testing.assert_allclose(hits.distances, distances, rtol=1e-3, atol=1e-3)
    assert np.mean(hits.ids == ids) > 0.95, "but for ties"


@pytest.mark.parametrize("kind, code_layout", [("pq", "fastscan"), ("rabitq", "plain"), ("rabitq", "fastscan")])
def test_lists_of_every_layout_find_only_what_was_chosen(kind, code_layout):
    codebook = make_codebook(kind, rotated=kind == "rabitq", cells=10, bits=4 if kind == "pq" else 1)
    ids, cells, codes = make_rows(codebook, 1000)
    lists, queries = make_lists(codebook, ids, cells, codes, "flat", code_layout), make_queries(9)
    places, chosen = lists.places, np.sort(ids[::3])
    selection = Selection(chosen, places.places_N[find_sorted(places.ids_N, chosen)], len(ids))
    everywhere, found = lists.search(queries, 1000, 10), lists.search(queries, 12, 10, selection)
    for row in range(9):
        wanted = everywhere[0][row][np.isin(everywhere[1][row], chosen)][:12]
        np.testing.assert_allclose(found[0][row], wanted, rtol=1e-3, atol=1e-2)
    own = np.argsort(ids)[[5, 3, 990]]
    taken = lists.take(places.places_N[[5, 3, 990]])
    assert np.array_equal(taken[0], cells[own]) and np.array_equal(taken[1], codes[own])


@pytest.mark.parametrize("few", [0, 4096], ids=["by lists", "one by one"])
@pytest.mark.parametrize("kind", ["pq", "vlq", "rabitq"])
def test_as_many_hits_come_back_as_are_let_through(tmp_path, monkeypatch, kind, few):
    monkeypatch.setattr(search, "FEW_ROWS", few)
    searcher = open_world(tmp_path, kind)
    where = {"label": 4, "is_old": False, "score": {"$gt": 0.5}}
    there = sum(let_through(where, row) is True for row in range(ROWS))
    assert 5 < there < 40
    for k in (1, there, there + 3):
        hits = searcher.search(make_queries(5), k, probes=1, where=where)
        assert ((hits.ids >= 0).sum(axis=1) == min(k, there)).all()
        assert (hits.distances[hits.ids < 0] == FAR).all()
    nobody = searcher.search(make_queries(2), 3, where={"label": 99})
    assert (nobody.ids == -1).all()


def test_a_filter_and_kept_vectors_together_rank_exactly(tmp_path):
    searcher, queries = open_world(tmp_path, "pq", vectors="float16"), make_queries(5)
    chosen = [row for row in range(ROWS) if let_through(WHERES[0], row)]
    hits = searcher.search(queries, 5, refine=40, probes=8, where=WHERES[0])
    far = np.square(queries[:, None] - make_vectors()[chosen].astype(np.float16).astype(np.float32)).sum(2)
    assert hits.ids.tolist() == np.array(chosen)[np.argsort(far, axis=1)[:, :5]].tolist()


def test_a_version_without_payload_is_filtered_by_ids(tmp_path):
    make_index(tmp_path)
    searcher = open_searcher(str(tmp_path))
    hits = searcher.search(make_queries(4), 3, where={"id": {"$in": [7, 11, 300, 4000]}})
    assert sorted(set(hits.ids.ravel().tolist())) == [7, 11, 300]
    with pytest.raises(QueryError, match=r"where\.label: got 'label', but the columns of this version are id"):
        searcher.search(make_queries(1), where={"label": 3})


@pytest.mark.parametrize(
    "where, match",
    [
        ({"colour": 1}, r"where\.colour: .*columns of this version are id, label, gap"),
        ({"label": "three"}, r"where\.label\.\$eq: got 'three', but the column holds values of type int8"),
        ({"label": True}, "values of type int8"),
        ({"name": 3}, "values of type string"),
        ({"is_old": 1}, "values of type bool"),
        ({"day": "yesterday"}, r"where\.day\.\$eq: got 'yesterday', but it must be a value of type date32"),
        ({"label": 2**70}, "it must be a value of type int8"),
        ({"tags": 1}, "values of type list"),
        ({"label": {"$in": [1, "two"]}}, r"where\.label\.\$in: got 'two'"),
    ],
)
def test_filters_that_the_payload_cannot_answer_are_refused(folder, where, match):
    with pytest.raises(QueryError, match=match):
        open_searcher(folder).search(make_queries(1), where=where)


def test_a_damaged_payload_is_found_before_it_is_read(tmp_path):
    make_index(tmp_path, payload=PAYLOAD)
    path = tmp_path / "versions" / "v1" / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    searcher = open_searcher(str(tmp_path))
    assert (searcher.search(make_queries(1), 3).ids >= 0).all()
    with pytest.raises(ArtefactError, match=r"shard-00001\.parquet"):
        searcher.search(make_queries(1), where={"label": 1})


def test_threads_that_filter_at_once_get_each_its_own(folder):
    searcher, queries = open_searcher(folder), make_queries(3)
    wanted = [searcher.search(queries, 5, probes=8, where=where).ids.tolist() for where in WHERES]
    fresh, found = open_searcher(folder), {}

    def work(number):
        for _ in range(5):
            found[number] = fresh.search(queries, 5, probes=8, where=WHERES[number]).ids.tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(WHERES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(WHERES))] == wanted


@pytest.mark.parametrize("spread", [1, 10**12])
def test_a_selector_holds_the_ids_however_far_apart(spread):
    ids = np.array([0, 3, 8, 9, 63, 64]) * spread
    selector = Selection(ids, np.arange(6), 10).selector
    assert [item for item in range(70) if selector.is_member(item * spread)] == [0, 3, 8, 9, 63, 64]
    assert isinstance(selector, faiss.IDSelectorBitmap if spread == 1 else faiss.IDSelectorBatch)


def test_ids_are_found_in_order_and_missed_as_minus_one():
    assert find_sorted(np.array([2, 5, 9]), np.array([9, 1, 2, 6, 10])).tolist() == [2, -1, 0, -1, -1]
    assert find_sorted(np.empty(0, np.int64), np.array([1])).tolist() == [-1]
