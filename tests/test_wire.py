import numpy as np
import pytest

from gsl_dist.errors import QueryError
from gsl_dist.hits import Effort, Hits
from gsl_dist.wire import QUERY_HEAD_BYTES, pack_hits, pack_query, unpack_hits, unpack_query

QUERIES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
HITS = Hits(np.arange(6).reshape(3, 2), np.arange(6, dtype=np.float32).reshape(3, 2), 2, 3, "v1.é")


@pytest.mark.parametrize(
    "effort",
    [
        Effort(),
        Effort(10, 7),
        Effort(3, None, 5),
        Effort(1, 2, 3),
        Effort(5, recall=0.95),
        Effort(5, 2, where={"$or": [{"é": {"$in": [1, 2.5, True]}}, {"$not": {"a": "b"}}]}),
    ],
)
def test_a_query_comes_back_as_it_was(effort):
    queries, asked, probed = unpack_query(pack_query(QUERIES, effort))
    assert np.array_equal(queries, QUERIES) and queries.dtype == np.float32
    assert asked == effort and probed is None


def test_named_lists_come_back_as_they_were():
    lists = np.array([[3, 1], [0, -1], [2, 7]]), np.arange(6, dtype=np.float32).reshape(3, 2)
    body = pack_query(QUERIES, Effort(3, 2, where={"a": 1}), lists)
    queries, effort, back = unpack_query(body)
    assert np.array_equal(queries, QUERIES) and effort == Effort(3, 2, where={"a": 1})
    assert np.array_equal(back[0], lists[0]) and np.array_equal(back[1], lists[1]) and back[0].dtype == np.int64
    for cut in range(len(body)):
        with pytest.raises(QueryError):
            unpack_query(body[:cut])


def test_hits_come_back_as_they_were():
    back = unpack_hits(pack_hits(HITS))
    assert np.array_equal(back.ids, HITS.ids) and np.array_equal(back.distances, HITS.distances)
    assert (back.ids.dtype, back.distances.dtype) == (np.int64, np.float32)
    assert (back.shards_answered, back.shards_total, back.version) == (2, 3, "v1.é")


def test_arrays_are_views_of_the_body_and_aligned():
    body = pack_hits(HITS)
    back = unpack_hits(body)
    assert not back.ids.flags.owndata and back.ids.flags.aligned and back.distances.flags.aligned
    assert unpack_query(pack_query(QUERIES, Effort(1, 1)))[0].flags.aligned


def test_arrays_that_are_not_contiguous_are_packed_by_value():
    turned = np.asfortranarray(QUERIES)
    assert pack_query(turned[::2], Effort(1, 1)) == pack_query(np.ascontiguousarray(QUERIES[::2]), Effort(1, 1))


@pytest.mark.parametrize(
    "pack, unpack", [(lambda: pack_query(QUERIES, Effort(2, 2)), unpack_query), (lambda: pack_hits(HITS), unpack_hits)]
)
def test_every_other_length_is_refused(pack, unpack):
    body = pack()
    for cut in range(len(body)):
        with pytest.raises(QueryError):
            unpack(body[:cut])
    with pytest.raises(QueryError, match="accounts for"):
        unpack(body + b"x")


@pytest.mark.parametrize("place, value", [(0, b"X"), (4, b"\x01"), (8, b"\xff\xff\xff\xff"), (12, b"\xff\xff\xff\xff")])
def test_counts_and_magic_are_never_trusted(place, value):
    for body, unpack in ((pack_query(QUERIES, Effort(2, 2)), unpack_query), (pack_hits(HITS), unpack_hits)):
        with pytest.raises(QueryError):
            unpack(body[:place] + value + body[place + len(value) :])


def test_a_name_that_is_not_text_is_refused():
    body = pack_hits(Hits(HITS.ids, HITS.distances, 1, 1, "ab"))
    with pytest.raises(QueryError, match="UTF-8"):
        unpack_hits(body[:-2] + b"\xff\xff")


@pytest.mark.parametrize(
    "field, value",
    [("k", 0), ("k", -1), ("k", 1.5), ("k", True), ("k", 2**40), ("probes", 0), ("probes", "4"), ("refine", 0)]
    + [("recall", value) for value in (0, 1.5, "0.9", True, float("nan"))]
    + [("where", {"a": object()})],
)
def test_numbers_that_are_none_are_named(field, value):
    with pytest.raises(QueryError) as caught:
        pack_query(QUERIES, Effort(**{field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize("where", [b"{", b"\xff\xff", b"[" * 5000])
def test_a_filter_that_is_not_json_is_refused(where):
    body = bytearray(pack_query(QUERIES, Effort(where={"a": 1})))
    body[32:36] = len(where).to_bytes(4, "little")
    with pytest.raises(QueryError, match="where: "):
        unpack_query(bytes(body[: QUERY_HEAD_BYTES + QUERIES.nbytes]) + where)
