"""Router, replicas and both bodies of the HTTP door in one process, without Ray."""

import asyncio
import http.client
import re
import threading
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
from fleets import World, same
from worlds import make_codebook, make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import ConfigError, Denied, QueryError, ShardUnavailable
from gsl_dist.hits import Effort
from gsl_dist.index.manifest import ShardEntry, publish_version
from gsl_dist.index.search import open_searcher
from gsl_dist.service.app import Desk, create_app
from gsl_dist.service.door import bind_port
from gsl_dist.service.frames import Ask, Asker, Status, greet
from gsl_dist.service.links import spread_shards
from gsl_dist.service.reading import ARROW_TYPE, Limits
from gsl_dist.storage import FileEntry, Folder
from gsl_dist.wire import QUERY_TYPE, pack_query, unpack_hits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, payload=pa.table({"label": np.arange(400) % 7}))
    world = World(folder, limits=Limits(batch=64, body_bytes=80_000))
    yield world
    world.stop()


def test_refining_gives_the_same_at_every_door_and_is_exact_over_all_candidates(tmp_path):
    make_index(tmp_path, vectors="float16")
    world = World(tmp_path)
    queries, k = make_queries(5), 7
    # Replicas rank candidates of their own: only where these are all rows is the answer that of one process.
    expected = world.local.search(queries, k, probes=8, refine=60)
    with Client(world.url) as client:
        assert same(client.search(queries, k, 8, refine=60), expected)
        usual = client.search(queries, k, 8)
        assert same(client.search(queries, k, 8, refine=4), usual)
    body = {"vectors": queries.tolist(), "k": k, "probes": 8, "refine": 60}
    assert world.post(body).json()["ids"] == expected.ids.tolist()
    world.stop()


@pytest.mark.parametrize("kind", ["pq", "rq", "cq", "vlq"])
@pytest.mark.parametrize("coarse", ["router", "replicas"])
def test_whoever_finds_the_lists_the_answer_is_the_same(tmp_path, kind, coarse):
    make_index(tmp_path, codebook=make_codebook(kind, residual=kind != "cq"))
    world, queries = World(tmp_path, coarse=coarse), make_queries(30)
    with Client(world.url) as client:
        for probes in (1, 3, 8):
            expected = world.local.search(queries, 7, probes=probes)
            batch = client.search(queries, 7, probes)
            np.testing.assert_allclose(batch.distances, expected.distances, rtol=1e-4, atol=1e-4)
            single = client.search(queries[0], 7, probes)
            np.testing.assert_allclose(single.distances, expected.distances[:1], rtol=1e-4, atol=1e-4)
    world.stop()


def test_lists_named_by_anyone_but_a_router_are_refused(world):
    named = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32)
    answer = world.post(pack_query(make_queries(1), Effort(3, 2), named), kind=QUERY_TYPE)
    assert (answer.status_code, answer.json()["field"]) == (400, "body")
    holding = world.holding("replica-0")
    for wrong in (8, -2, 2**31 - 1):
        named = np.full((1, 2), wrong), np.zeros((1, 2), np.float32)
        status, body = holding.answer(Ask.SEARCH, pack_query(make_queries(1), Effort(3, 2), named))
        assert status == Status.REFUSED and b"lists: got" in body


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_every_metric_gives_the_same_at_every_door(tmp_path, metric):
    make_index(tmp_path, codebook=make_codebook(metric=metric))
    world, queries = World(tmp_path), make_queries(5)
    expected = world.local.search(queries, 6, probes=8)
    assert (np.diff(expected.distances) <= 0).all(), "the largest first"
    with Client(world.url) as client:
        assert same(client.search(queries, 6, 8), expected)
        assert client.versions()["metric"] == metric
    answer = world.post({"vectors": queries.tolist(), "k": 6, "probes": 8}).json()
    np.testing.assert_allclose(answer["distances"], expected.distances, rtol=1e-6)
    world.stop()


@pytest.mark.parametrize("where", [{"label": 3}, {"$not": {"label": {"$in": [1, 2]}}, "id": {"$gte": 100}}], ids=str)
def test_a_filter_gives_the_same_at_every_door(world, where):
    queries = make_queries(5)
    expected = world.local.search(queries, 6, probes=8, where=where)
    assert expected.ids.min() >= 0 and {item % 7 for item in expected.ids.ravel()} <= {0, 3, 4, 5, 6}
    with Client(world.url) as client:
        assert same(client.search(queries, 6, 8, where=where), expected)
    assert world.post(good(vectors=queries.tolist(), k=6, where=where)).json()["ids"] == expected.ids.tolist()


@pytest.mark.parametrize(
    "where, field",
    [({"colour": 3}, "where.colour"), ({"label": "three"}, "where.label.$eq"), ({"id": True}, "where.id.$eq")],
)
def test_a_filter_that_replicas_refuse_is_a_400_that_names_the_column(world, where, field):
    answer = world.post(good(where=where))
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    with Client(world.url) as client, pytest.raises(QueryError, match=re.escape(field)):
        client.search(make_queries(1), where=where)


def test_a_damaged_payload_leaves_its_replica_out_of_filtered_answers(tmp_path):
    make_index(tmp_path, payload=pa.table({"label": np.arange(400) % 7}), shards=2)
    path = tmp_path / "versions" / "v1" / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    world = World(tmp_path)
    assert world.post(good(where={"label": 3})).json()["shards_answered"] == 1
    assert world.post(good()).json()["shards_answered"] == 2
    world.stop()


@pytest.fixture
def fragile(tmp_path):
    """A world of its own for tests that kill replicas."""
    make_index(tmp_path)
    world = World(tmp_path)
    yield world
    world.stop()


def good(**changes):
    return {"vectors": make_queries(2).tolist(), "k": 3, "probes": 8} | changes


@pytest.mark.parametrize("k, probes", [(1, 1), (5, 8), (10, None), (300, 2)])
def test_client_equals_router_equals_local_searcher(world, k, probes):
    queries = make_queries()
    expected = world.local.search(queries, k, probes=probes)
    routed = world.call(world.router.search(queries, Effort(k, probes)))
    with Client(world.url) as client:
        served = client.search(queries, k, probes)
        single = client.search(queries[0], k, probes)
    assert same(routed, expected) and same(served, expected)
    assert np.array_equal(single.ids, expected.ids[:1])
    assert (served.shards_answered, served.shards_total, served.version) == (3, 3, "v1")


def test_json_equals_the_binary_body(world):
    body = good()
    expected = world.local.search(body["vectors"], 3, probes=8)
    answer = world.post(body).json()
    assert answer["ids"] == expected.ids.tolist()
    assert np.array_equal(np.array(answer["distances"], np.float32), expected.distances)
    assert (answer["shards_answered"], answer["shards_total"], answer["version"]) == (3, 3, "v1")


@pytest.mark.parametrize("shards, replicas", [(1, 1), (2, 1), (2, 2), (5, 2)])
def test_one_index_equals_any_number_of_shards(tmp_path, shards, replicas):
    make_index(tmp_path / "whole", shards=1)
    make_index(tmp_path / "cut", shards=shards)
    queries = make_queries()
    expected = open_searcher(str(tmp_path / "whole")).search(queries, 10, probes=8)
    world = World(tmp_path / "cut", replicas)
    with Client(world.url) as client:
        served = client.search(queries, 10, 8)
    world.stop()
    np.testing.assert_allclose(served.distances, expected.distances, rtol=1e-6)
    assert (served.ids == expected.ids).mean() > 0.99  # equal distances may trade places


def test_where_nothing_is_found_the_json_holds_minus_one_and_null(world):
    answer = world.post(good(k=400, probes=1)).json()
    assert answer["ids"][0][-1] == -1 and answer["distances"][0][-1] is None
    far = world.post(good(vectors=[[3e38] * 16])).json()
    assert far["ids"] == [[-1] * 3] and far["distances"] == [[None] * 3]


BAD_BODIES = {
    "not json": (b"{vectors", 400, "body"),
    "not utf-8": (b"\xff\xfe", 400, "body"),
    "empty": (b"", 400, "body"),
    "a list": (b"[]", 400, "body"),
    "no vectors": ({}, 400, "vectors"),
    "vectors not a list": (good(vectors="abc"), 400, "vectors"),
    "wrong dimension": (good(vectors=[[0.0] * 15]), 400, "vectors[0]"),
    "one row not a list": (good(vectors=[[0.0] * 16, 3]), 400, "vectors[1]"),
    "ragged": (good(vectors=[[0.0] * 16, [0.0] * 3]), 400, "vectors[1]"),
    "NaN": (b'{"vectors": [[NaN]]}', 400, "body"),
    "infinity": (b'{"vectors": [[1e999]]}', 400, "body"),
    "too large for float32": (good(vectors=[[1e39] * 16]), 400, "vectors"),
    "null inside": (good(vectors=[[None] * 16]), 400, "vectors[0]"),
    "strings": (good(vectors=[["1.5"] * 16]), 400, "vectors[0]"),
    "bools": (good(vectors=[[1.0] * 15 + [True]]), 400, "vectors[0]"),
    "nested too deep": (good(vectors=[[[0.0]] * 16]), 400, "vectors[0]"),
    "k zero": (good(k=0), 400, "k"),
    "k negative": (good(k=-3), 400, "k"),
    "k over the limit": (good(k=16385), 400, "k"),
    "k a float": (good(k=3.0), 400, "k"),
    "k a bool": (good(k=True), 400, "k"),
    "k a string": (good(k="3"), 400, "k"),
    "k beyond 64 bits": (good(k=10**30), 400, "k"),
    "probes zero": (good(probes=0), 400, "probes"),
    "probes over the cells": (good(probes=9), 400, "probes"),
    "probes a bool": (good(probes=False), 400, "probes"),
    "refine without vectors": (good(refine=2), 400, "refine"),
    "refine a fraction": (good(refine=1.5), 400, "refine"),
    "no filter": (good(where=[1]), 400, "where"),
    "a recall that nobody measured": (good(probes=None, recall=0.9), 400, "recall"),
    "a recall beside probes": (good(recall=0.9), 400, "recall"),
    "a recall above 1": (good(probes=None, recall=1.5), 400, "recall"),
    "a recall in words": (good(probes=None, recall="high"), 400, "recall"),
    "require_all a number": (good(require_all=1), 400, "require_all"),
    "extra key": (good(nprobe=4), 400, "nprobe"),
    "empty batch": (good(vectors=[]), 400, "vectors"),
    "batch over the limit": (good(vectors=[[0.0] * 16] * 65), 413, "vectors"),
    "answer over the limit": (good(vectors=[[0.0] * 16] * 2, k=16384), 413, "k"),
    "body over the limit": (b" " * 80_001, 413, "body"),
    "unknown version": (good(version="v9"), 404, "version"),
}


@pytest.mark.parametrize("path", ["/v1/search", "/v1/echo"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_input_is_a_4xx_that_names_the_field(world, case, path):
    body, status, field = BAD_BODIES[case]
    answer = world.post(body, path)
    assert (answer.status_code, answer.json()["field"]) == (status, field)
    assert answer.json()["code"] and field in answer.json()["message"]


@pytest.mark.parametrize(
    "body, query, status, field",
    [
        (b"GSLQ", "", 400, "body"),
        (pack_query(make_queries(2), Effort(3, 8))[:-1], "", 400, "body"),
        (pack_query(make_queries(2, dim=15), Effort(3, 8)), "", 400, "vectors"),
        (pack_query(np.full((1, 16), np.nan, np.float32), Effort(3, 8)), "", 400, "vectors"),
        (pack_query(make_queries(0), Effort(3, 8)), "", 400, "vectors"),
        (pack_query(make_queries(65), Effort(3, 8)), "", 413, "vectors"),
        (pack_query(make_queries(2), Effort(99999, 8)), "", 400, "k"),
        (pack_query(make_queries(2), Effort(3, 9)), "", 400, "probes"),
        (pack_query(make_queries(2), Effort(3, 8)), "?require_all=maybe", 400, "require_all"),
        (pack_query(make_queries(2), Effort(3, 8)), "?k=4", 400, "k"),
        (pack_query(make_queries(2), Effort(3, 8)), "?version=v9", 404, "version"),
    ],
)
def test_bad_binary_bodies_are_refused_in_the_same_shape(world, body, query, status, field):
    answer = world.post(body, "/v1/search" + query, QUERY_TYPE)
    assert (answer.status_code, answer.json()["field"]) == (status, field)


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/nope", 404), ("POST", "/", 405), ("GET", "/v1/search", 405), ("DELETE", "/healthz", 405)],
)
def test_unknown_routes_and_methods_answer_in_the_same_shape(world, method, path, status):
    answer = httpx.request(method, world.url + path)
    assert answer.status_code == status
    assert set(answer.json()) == {"code", "message", "field"}


def test_a_body_that_announces_no_length_is_cut_off_at_the_limit(world):
    answer = httpx.post(f"{world.url}/v1/search", content=(b" " * 1000 for _ in range(100)))
    assert answer.status_code == 413 and answer.json()["field"] == "body"


def test_an_announced_length_over_the_limit_is_refused_before_the_body_is_sent(world):
    connection = http.client.HTTPConnection(urlsplit(world.url).netloc, timeout=5)
    connection.putrequest("POST", "/v1/search")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_versions_tells_what_is_there_promoted_and_served(world):
    answer = httpx.get(f"{world.url}/v1/versions").json()
    assert (answer["versions"], answer["served"], answer["promoted"]) == (["v1"], "v1", "v1")
    assert (answer["dim"], answer["cells"], answer["rows"], answer["metric"], answer["shards"]) == (16, 8, 400, "l2", 3)


def test_a_version_published_later_is_listed_and_not_served(fragile):
    later = fragile.local.manifest.model_copy(update={"version": "v2"})
    publish_version(Folder(fragile.folder), later)
    with Client(fragile.url) as client:
        assert client.versions()["versions"] == ["v1", "v2"] and client.versions()["served"] == "v1"


def test_the_api_page_describes_every_body(world):
    page = httpx.get(f"{world.url}/openapi.json").json()
    content = page["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", QUERY_TYPE, ARROW_TYPE}


def test_a_partial_answer_says_so_and_becomes_whole_when_the_replica_is_back(fragile):
    queries, dead = make_queries(), "replica-0"
    fragile.kill(dead)
    held = [name for name in fragile.local.shards if name not in fragile.groups[dead]]
    expected = open_searcher(fragile.folder, names=held).search(queries, 5, probes=8)
    with Client(fragile.url) as client:
        hits = client.search(queries, 5, 8)
        assert hits.is_partial and (hits.shards_answered, hits.shards_total) == (len(held), 3)
        assert same(hits, expected)
        assert client.health()["status"] == "partial"
        with pytest.raises(ShardUnavailable) as caught:
            client.search(queries, 5, 8, require_all=True)
        assert caught.value.missing == fragile.groups[dead] and caught.value.total == 3
        assert fragile.post(good(require_all=True)).status_code == 503
        fragile.begin(dead)  # at another port
        fragile.await_shards(3)
        assert same(client.search(queries, 5, 8, require_all=True), fragile.local.search(queries, 5, probes=8))


def test_no_replica_left_is_503_and_names_every_shard(fragile):
    for name in list(fragile.replicas):
        fragile.kill(name)
    answer = fragile.post(good())
    assert answer.status_code == 503 and sorted(answer.json()["missing"]) == sorted(fragile.local.shards)
    with Client(fragile.url) as client, pytest.raises(ShardUnavailable):
        client.health()


def test_a_replica_opens_the_shards_that_the_router_names(fragile):
    fragile.kill("replica-0")
    fragile.addresses["replica-0"] = fragile.addresses["replica-1"]
    fragile.await_shards(3)
    with Client(fragile.url) as client:
        assert same(client.search(make_queries(), 5, 8), fragile.local.search(make_queries(), 5, probes=8))


def test_a_replica_answers_nobody_who_does_not_know_the_secret(fragile):
    host, port = fragile.addresses["replica-0"].split(":")

    async def ask(secret):
        loop = asyncio.get_running_loop()
        _, asker = await loop.create_connection(lambda: Asker(1 << 20, lambda _: None), host, int(port))
        try:
            return await asyncio.wait_for(asker.ask(Ask.HOLD, greet(secret, "v1", fragile.groups["replica-0"])), 5)
        finally:
            asker.close()

    assert asyncio.run(ask("secret")) == b"\xff", "rows lie in all eight cells"
    with pytest.raises(Denied):
        asyncio.run(ask("other"))


def test_a_late_replica_is_left_out(tmp_path, monkeypatch):
    make_index(tmp_path)
    world = World(tmp_path, timeout_s=0.3)
    slow = world.holding("replica-1")
    answer, let_go = slow.search_together, threading.Event()
    monkeypatch.setattr(slow, "search_together", lambda bodies: (let_go.wait(10), answer(bodies))[1])
    with Client(world.url) as client:
        hits = client.search(make_queries(), 5)
        assert hits.shards_answered == len(world.groups["replica-0"])
        let_go.set()
        assert not client.search(make_queries(), 5).is_partial  # its late answer is not taken for the next
    world.stop()


def test_many_queries_at_once_each_get_their_own_answer(world):
    queries = make_queries(40)
    expected = world.local.search(queries, 5, probes=8)

    async def ask_all():
        async with httpx.AsyncClient(timeout=20) as http:
            posts = [
                http.post(
                    f"{world.url}/v1/search",
                    content=pack_query(query[None], Effort(5, 8)),
                    headers={"content-type": QUERY_TYPE},
                )
                for query in queries
            ]
            return [unpack_hits(answer.content) for answer in await asyncio.gather(*posts)]

    answers = asyncio.run(ask_all())
    assert np.array_equal(np.concatenate([hits.ids for hits in answers]), expected.ids)


def test_another_loop_searches_through_the_same_router(world):
    app = create_app(Desk(world.router, hop=world.door.hop))

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://serve") as http:
            return await http.post("/v1/search", json=good())

    assert asyncio.run(ask()).json() == world.post(good()).json()


def test_a_replica_refuses_what_a_router_should_not_send(world):
    holding = world.holding("replica-0")
    for body in (
        b"nonsense",
        pack_query(make_queries(1, dim=3), Effort(1, 1)),
        pack_query(make_queries(1), Effort(1, 99)),
    ):
        status, message = holding.answer(Ask.SEARCH, body)
        assert status.name == "REFUSED" and b"Traceback" not in message


def test_a_replica_hangs_up_on_frames_that_are_too_long(world):
    host, port = next(iter(world.addresses.values())).split(":")

    async def shout():
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\xff" * 12)
        return await asyncio.wait_for(reader.read(), 5)

    assert asyncio.run(shout()) == b""


def test_the_router_checks_what_it_is_given(world):
    with pytest.raises(QueryError):
        world.call(world.router.search([[1.0]], Effort()))


def test_a_port_in_use_is_named(world):
    with pytest.raises(ConfigError, match=str(world.door.port)):
        bind_port("127.0.0.1", world.door.port)


@pytest.mark.parametrize(
    "rows, replicas, largest", [([10, 10, 10, 10], 2, 20), ([50, 10, 20, 30, 5], 2, 60), ([0, 0, 0], 3, 0)]
)
def test_shards_are_spread_by_rows_and_no_replica_is_empty(rows, replicas, largest):
    file = FileEntry(name="f", bytes=0, sha256="")
    shards = [ShardEntry(name=f"s{rank}", rows=count, index=file) for rank, count in enumerate(rows)]
    groups = spread_shards(shards, replicas)
    size = dict(zip((shard.name for shard in shards), rows, strict=True))
    assert all(groups.values()) and sorted(name for group in groups.values() for name in group) == sorted(size)
    assert max(sum(size[name] for name in group) for group in groups.values()) == largest
