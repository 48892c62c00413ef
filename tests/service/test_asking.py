"""Questions beyond one search: pages, groups, payload, items as queries, distances to stay within, Arrow."""

import io

import httpx
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import QueryError, ShardUnavailable
from gsl_dist.service.reading import ARROW_TYPE, Limits
from gsl_dist.wire import unpack_table

ROWS = 400
LABELS = np.arange(ROWS) % 7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    titles = pa.array([f"title {row}" if row % 5 else None for row in range(ROWS)])
    make_index(folder, payload=pa.table({"label": LABELS, "title": titles}), vectors="float16")
    world = World(folder, limits=Limits(batch=64))
    yield world
    world.stop()


@pytest.fixture
def client(world):
    with Client(world.url) as client:
        yield client


def test_pages_follow_on_one_another_without_gap_or_repetition(world, client):
    queries = make_queries(3)
    whole = client.search(queries, 50, 8, refine=1)
    pages = [client.search(queries, 10, 8, refine=1, offset=offset) for offset in range(0, 50, 10)]
    assert np.array_equal(np.concatenate([page.ids for page in pages], axis=1), whole.ids)
    assert np.array_equal(np.concatenate([page.distances for page in pages], axis=1), whole.distances)
    every = list(client.pages(queries, 150, probes=8, refine=1))
    assert [page.ids.shape[1] for page in every] == [150, 150, 150] and (every[-1].ids[:, 100:] == -1).all()


def test_payload_comes_with_each_hit_in_its_order(world, client):
    hits = client.search(make_queries(3), 5, 8, payload=["title", "label"])
    assert hits.payload["label"].to_pylist() == LABELS[hits.ids.ravel()].tolist()
    assert hits.payload["title"].to_pylist() == [f"title {row}" if row % 5 else None for row in hits.ids.ravel()]
    rows = hits.rows()
    assert rows[1][2]["id"] == hits.ids[1, 2] and rows[1][2]["label"] == LABELS[hits.ids[1, 2]]
    shown = world.post({"vectors": make_queries(3).tolist(), "k": 5, "probes": 8, "payload": ["label"]}).json()
    assert [[row["label"] for row in rows] for rows in shown["payload"]] == LABELS[hits.ids].tolist()


def test_payload_of_a_hit_that_is_none_is_null(client):
    hits = client.search(make_queries(1), 390, 1, refine=1, payload=["label"])
    labels = hits.payload["label"].to_pylist()
    assert hits.ids[0, -1] == -1 and labels[-1] is None and labels[0] == LABELS[hits.ids[0, 0]]


def test_items_like_another_are_those_near_its_vector_without_itself(world, client):
    ids = [3, 111]
    is_here, vectors = world.local.recall_vectors(np.array(ids))
    assert is_here.all()
    found = client.search(ids=ids, k=6, probes=8, refine=1)
    for row, item in enumerate(ids):
        near = world.local.search(vectors[row], 7, probes=8, refine=1).ids[0]
        assert item not in found.ids[row] and found.ids[row].tolist() == near[near != item][:6].tolist()
    with pytest.raises(QueryError, match="no such item"):
        client.search(ids=[10**9])


def test_within_leaves_out_what_is_farther(world, client):
    queries = make_queries(4)
    whole = client.search(queries, 20, 8, refine=1)
    limit = float(whole.distances[0, 9])
    near = client.search(queries, 20, 8, refine=1, within=limit)
    for row in range(4):
        assert near.ids[row][near.ids[row] >= 0].tolist() == whole.ids[row][whole.distances[row] <= limit].tolist()
    local = world.local.search(queries, 20, probes=8, refine=1, within=limit)
    assert np.array_equal(local.ids, near.ids) and np.array_equal(local.distances, near.distances)


def test_a_group_never_fills_an_answer(world, client):
    queries = make_queries(3)
    ranked = client.search(queries, ROWS, 8, refine=1).ids
    for most in (1, 2):
        found = client.search(queries, 7 * most, 8, refine=1, group_by="label", group_size=most).ids
        for row in range(3):
            taken, seen = [], dict.fromkeys(range(7), 0)
            for item in ranked[row]:
                seen[LABELS[item]] += 1
                if seen[LABELS[item]] <= most:
                    taken.append(item)
            assert found[row].tolist() == taken[: 7 * most]


def test_items_without_a_value_are_groups_of_their_own(client):
    found = client.search(make_queries(1), 100, 8, refine=1, group_by="title").ids
    assert (found >= 0).all()


def test_a_stream_of_arrow_is_answered_by_one(world, client):
    queries = make_queries(4)
    expected = client.search(queries, 5, 8, payload=["label"])
    for kind in (pa.list_(pa.float32(), 16), pa.list_(pa.float64())):
        sink = io.BytesIO()
        table = pa.table({"vector": pa.array(queries.tolist(), kind)})
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        url = f"{world.url}/v1/search?k=5&probes=8&payload=label"
        answer = httpx.post(url, content=sink.getvalue(), headers={"content-type": ARROW_TYPE})
        found = unpack_table(answer.content)
        assert answer.headers["content-type"] == ARROW_TYPE
        assert found["ids"].to_pylist() == expected.ids.tolist()
        assert np.ravel(found["payload.label"].to_pylist()).tolist() == expected.payload["label"].to_pylist()
        assert found.schema.metadata[b"shards_answered"] == b"3"


def test_payload_of_a_partial_answer_is_that_of_the_hits_there_are(tmp_path):
    make_index(tmp_path, payload=pa.table({"label": LABELS}))
    world = World(tmp_path)
    world.kill("replica-1")
    with Client(world.url) as client:
        hits = client.search(make_queries(2), 5, 8, payload=["label"])
        assert hits.is_partial and hits.payload["label"].to_pylist() == LABELS[hits.ids.ravel()].tolist()
        assert client.search(make_queries(2), 5, 8, group_by="label").is_partial
        with pytest.raises(ShardUnavailable):
            client.search(make_queries(2), 5, 8, payload=["label"], require_all=True)
    world.stop()


def test_items_are_fetched_by_their_ids_and_unknown_ones_are_none(client):
    found = client.fetch([5, 10**12, 6], ["label"])
    assert found == [{"id": 5, "payload": {"label": 5}}, None, {"id": 6, "payload": {"label": 6}}]
    assert client.fetch([6])[0]["payload"] == {"label": 6, "title": "title 6"}


def good(**changes):
    return {"vectors": make_queries(2).tolist(), "k": 3, "probes": 8} | changes


@pytest.mark.parametrize(
    "body, status, field",
    [
        (good(offset=-1), 400, "offset"),
        (good(offset=16384), 400, "offset"),
        (good(offset="1"), 400, "offset"),
        (good(group_by="colour"), 400, "payload"),
        (good(group_by=3), 400, "group_by"),
        (good(group_by="label", group_size=0), 400, "group_size"),
        (good(payload=["colour"]), 400, "payload"),
        (good(payload=[1]), 400, "payload"),
        (good(payload={"label": 1}), 400, "payload"),
        (good(within="near"), 400, "within"),
        (good(within=True), 400, "within"),
        (good(timeout_s=0), 400, "timeout_s"),
        (good(timeout_s=-1), 400, "timeout_s"),
        (good(ids=[1]), 400, "vectors"),
        ({"ids": []}, 400, "ids"),
        ({"ids": [1] * 65}, 413, "ids"),
        ({"ids": [-1]}, 400, "ids"),
        ({"ids": [2**63]}, 400, "ids"),
        ({"ids": [1.5]}, 400, "ids"),
        ({"ids": [True]}, 400, "ids"),
        ({"ids": [10**9]}, 404, "ids"),
        ({"items": ["no base64!"]}, 400, "items[0]"),
        ({"items": [{"a": 1}]}, 400, "items[0].a"),
        ({"items": [[0.5] * 16]}, 400, "items"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(world, body, status, field):
    answer = world.post(body)
    assert (answer.status_code, answer.json()["field"]) == (status, field)


@pytest.mark.parametrize(
    "table, field",
    [
        (pa.table({"v": [[0.0] * 16]}), "body"),
        (pa.table({"vector": [1.0]}), "vector"),
        (pa.table({"vector": [[0.0] * 16, None]}), "vector"),
        (pa.table({"vector": [[0.0] * 16, [0.0] * 3]}), "vector"),
        (pa.table({"vector": [[0.0] * 3]}), "vectors"),
    ],
    ids=str,
)
def test_arrow_without_vectors_is_refused(world, table, field):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    answer = world.post(sink.getvalue(), kind=ARROW_TYPE)
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    cut = world.post(sink.getvalue()[:40], kind=ARROW_TYPE)
    assert (cut.status_code, cut.json()["field"]) == (400, "body")
