"""Writes over a version: seen at once, gone for good, and there again after any crash."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_codebook, make_index, make_queries, make_vectors

from gsl_dist.client import Client
from gsl_dist.errors import GslError, Overloaded, QueryError
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import MANIFEST, open_version, publish_version, version_folder
from gsl_dist.index.overlay import read_overlay
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder

ROWS, DIM = 400, 16
LABELS = np.arange(ROWS) % 7


def build(folder, metric="l2", version="v1", **how):
    payload = pa.table({"label": LABELS, "title": pa.array([f"title {row}" for row in range(ROWS)])})
    make_index(folder, version=version, codebook=make_codebook(metric=metric), payload=payload, **how)


@pytest.fixture
def world(tmp_path):
    build(tmp_path)
    world = World(tmp_path)
    yield world
    world.stop()


@pytest.fixture
def client(world):
    with Client(world.url) as client:
        yield client


def test_a_new_item_is_found_by_the_next_query(client):
    queries = make_queries(3)
    assert client.upsert([1000, 1001, 1002], queries, [{"label": 50}, {"label": 51}, {}]) == 1
    hits = client.search(queries, 3, 8, payload=["label", "title"])
    assert hits.ids[:, 0].tolist() == [1000, 1001, 1002]
    np.testing.assert_allclose(hits.distances[:, 0], 0, atol=1e-5)
    assert hits.rows()[1][0] == {"id": 1001, "distance": pytest.approx(0, abs=1e-5), "label": 51, "title": None}
    assert hits.shards_answered == hits.shards_total == 3


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_new_items_are_ranked_among_the_old_by_exact_distances(tmp_path, metric):
    build(tmp_path, metric)
    world, queries, vectors = World(tmp_path), make_queries(5), make_vectors(50, DIM, seed=9)
    ids = np.arange(1000, 1050)
    with Client(world.url) as client:
        client.upsert(ids, vectors)
        found = client.search(queries, 450, 8)
    old = world.local.search(queries, 400, probes=8)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    turned = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    far = {"l2": ((queries[:, None] - vectors) ** 2).sum(2), "ip": queries @ vectors.T, "cosine": turned @ unit.T}[
        metric
    ]
    every = np.concatenate([old.distances, far], axis=1)
    names = np.concatenate([old.ids, np.broadcast_to(ids, far.shape)], axis=1)
    order = np.argsort(every if metric == "l2" else -every, axis=1, kind="stable")
    np.testing.assert_allclose(found.distances, np.take_along_axis(every, order, 1), rtol=1e-3, atol=1e-4)
    assert (found.ids == np.take_along_axis(names, order, 1)).mean() > 0.99
    world.stop()


def test_a_deleted_item_is_found_no_more_by_any_query(world, client):
    queries = make_queries(4)
    before = client.search(queries, 20, 8)
    gone = sorted(set(before.ids[:, :5].ravel().tolist()))
    client.delete(gone)
    after = client.search(queries, 15, 8)
    for row in range(4):
        assert after.ids[row].tolist() == [item for item in before.ids[row].tolist() if item not in gone][:15] + list(
            after.ids[row][len([item for item in before.ids[row] if item not in gone]) :]
        )
    assert not set(after.ids.ravel()) & set(gone)
    assert not set(client.search(queries, 100, 8, where={"label": {"$gte": 0}}).ids.ravel()) & set(gone)
    assert client.fetch(gone[:2]) == [None, None]
    with pytest.raises(QueryError, match="no such item"):
        client.search(ids=[gone[0]])


def test_an_item_written_again_is_found_where_it_now_lies_and_only_there(client):
    queries = make_queries(2)
    client.upsert([7], queries[:1], {"label": 99})
    client.upsert([7], queries[1:], {"label": 98})
    hits = client.search(queries, 400, 8, payload=["label"])
    assert hits.ids[1, 0] == 7 and hits.distances[1, 0] == pytest.approx(0, abs=1e-5)
    assert hits.distances[0][hits.ids[0] == 7] == pytest.approx(((queries[0] - queries[1]) ** 2).sum(), rel=1e-4)
    assert [(row == 7).sum() for row in hits.ids] == [1, 1]
    assert client.search(queries, 3, 8, where={"label": 98}).ids[:, 0].tolist() == [7, 7]
    assert (client.search(queries, 3, 8, where={"label": 99}).ids == -1).all()


def test_changed_columns_are_what_filters_and_answers_see(client):
    client.update([3, 4], [{"label": 70}, {"label": 71, "title": "new"}])
    client.upsert([1000], make_queries(1), {"label": 1, "title": "fresh"})
    client.update([1000], {"label": 70})
    found = client.search(make_queries(2), 10, 8, where={"label": {"$gte": 70}}, payload=["label", "title"])
    assert {tuple(sorted(row)) for row in found.ids.tolist()} == {(-1, -1, -1, -1, -1, -1, -1, 3, 4, 1000)}
    assert {row["id"]: (row["label"], row["title"]) for row in found.rows()[0]} == {
        3: (70, "title 3"),
        4: (71, "new"),
        1000: (70, "fresh"),
    }
    assert 3 not in client.search(make_queries(1), 100, 8, where={"label": 3}).ids


def test_all_that_was_acknowledged_is_there_after_a_restart(world, client):
    queries = make_queries(3)
    client.upsert([1000, 1001], queries[:2], {"label": 60})
    client.delete([1001, 5])
    client.update([9], {"label": 61})
    expected = client.search(queries, 30, 8, payload=["label"])
    second = World(world.folder)
    with Client(second.url) as other:
        found = other.search(queries, 30, 8, payload=["label"])
        assert np.array_equal(found.ids, expected.ids) and found.payload.equals(expected.payload)
        assert other.upsert([1002], queries[2:]) == 4
    second.stop()


def test_a_replica_that_comes_back_is_told_what_it_missed(world, client):
    queries = make_queries(3)
    dead = "replica-0"
    world.kill(dead)
    gone = [item for item in range(ROWS) if item % 3 == 0]
    client.delete(gone)
    client.update([1], {"label": 77})
    world.begin(dead)
    world.await_shards(3)
    hits = client.search(queries, 200, 8, require_all=True)
    assert not set(hits.ids.ravel()) & set(gone)
    assert client.search(queries, 5, 8, where={"label": 77}).ids[:, 0].tolist() == [1, 1, 1]


def test_a_version_that_takes_over_has_the_same_writes_over_it(tmp_path):
    build(tmp_path, version="v2", seed=4, shards=2)
    build(tmp_path, version="v1")
    world, queries = World(tmp_path), make_queries(2)
    over, acknowledged = threading.Event(), []

    def write():
        with Client(world.url) as client:
            while not over.is_set():
                item = 1000 + len(acknowledged)
                client.upsert([item], make_vectors(1, DIM, seed=item))
                acknowledged.append(item)

    thread = threading.Thread(target=write)
    thread.start()
    with Client(world.url, timeout_s=30) as client:
        client.upsert([900], queries[:1])
        client.delete([0])
        for version in ("v2", "v1", "v2"):
            time.sleep(0.1)
            client.promote(version)
        over.set()
        thread.join()
        hits = client.search(queries, 3, 8)
        assert hits.version == "v2" and hits.ids[0, 0] == 900
        assert all(client.fetch(acknowledged[start : start + 4000]) for start in range(0, len(acknowledged), 4000))
        assert None not in client.fetch(acknowledged) and client.fetch([0]) == [None]
    world.stop()


def test_writes_of_many_callers_share_commits_and_none_is_lost(world):
    def write(caller):
        with Client(world.url) as client:
            for turn in range(20):
                client.upsert([1000 + 100 * caller + turn], make_vectors(1, DIM, seed=turn))

    threads = [threading.Thread(target=write, args=(caller,)) for caller in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = WriteLog(Folder(world.folder))
    rows = [write.id for _, writes in log.read(0, world.router.manifest.space) for write in writes]
    assert sorted(rows) == [1000 + 100 * caller + turn for caller in range(5) for turn in range(20)]
    assert log.last < 100 and world.router.overlay.rows == 100


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/v1/items", {"items": [{"id": -1, "vector": [0.0] * 16}]}, "items[0].id"),
        ("/v1/items", {"items": [{"id": 2**63, "vector": [0.0] * 16}]}, "items[0].id"),
        ("/v1/items", {"items": [{"id": "7", "vector": [0.0] * 16}]}, "items[0].id"),
        ("/v1/items", {"items": [{"id": True, "vector": [0.0] * 16}]}, "items[0].id"),
        ("/v1/items", {"items": [{"id": 7, "vector": [0.0] * 15}]}, "items[0].vector"),
        ("/v1/items", {"items": [{"id": 7, "vector": [None] * 16}]}, "items[0].vector"),
        ("/v1/items", {"items": [{"id": 7, "vector": [3e38] * 16}]}, "items[0].vector"),
        ("/v1/items", {"items": [{"id": 7}]}, "items[0].vector"),
        ("/v1/items", {"items": [{"id": 7, "vector": [0.0] * 16, "colour": 1}]}, "items[0].colour"),
        ("/v1/items", {"items": [{"id": 7, "vector": [0.0] * 16, "payload": {"colour": 1}}]}, "items[0].payload"),
        (
            "/v1/items",
            {"items": [{"id": 7, "vector": [0.0] * 16, "payload": {"label": "x"}}]},
            "items[0].payload.label",
        ),
        ("/v1/items", {"items": [{"id": 7, "vector": [0.0] * 16, "payload": {"id": 8}}]}, "items[0].payload"),
        ("/v1/items", {"items": []}, "items"),
        ("/v1/items", {"ids": [1]}, "ids"),
        ("/v1/items/payload", {"items": [{"id": 7, "payload": {}}]}, "items[0].payload"),
        ("/v1/items/payload", {"items": [{"id": 7, "vector": [0.0] * 16}]}, "items[0].vector"),
        ("/v1/items/delete", {"ids": [1.5]}, "items[0].id"),
        ("/v1/items/delete", {"ids": []}, "ids"),
        ("/v1/items/delete", {"ids": 7}, "ids"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name_and_nothing_is(world, path, body, field):
    answer = world.post(body, path)
    assert (answer.status_code, answer.json()["field"]) in {(400, field), (413, field)}
    assert WriteLog(Folder(world.folder)).last == 0


def test_a_refused_write_takes_no_other_with_it(world):
    good = [Write("upsert", 1000 + place, make_vectors(1, DIM, seed=place)[0]) for place in range(20)]

    async def write_all():
        import asyncio

        work = [world.router.write([one]) for one in good] + [world.router.write([Write("upsert", -5)])]
        return await asyncio.gather(*work, return_exceptions=True)

    outcomes = world.call(write_all())
    assert isinstance(outcomes[-1], QueryError) and all(isinstance(one, int) for one in outcomes[:-1])
    assert world.router.overlay.rows == 20


def test_too_much_over_a_version_is_put_off(tmp_path):
    build(tmp_path)
    world = World(tmp_path, max_new_rows=10)
    with Client(world.url, timeout_s=1) as client:
        client.upsert(range(1000, 1010), make_vectors(10, DIM))
        with pytest.raises(Overloaded):
            client.upsert([2000], make_vectors(1, DIM))
        client.delete([1000])
        client.upsert([2000], make_vectors(1, DIM))
    world.stop()


def test_a_log_that_cannot_be_written_acknowledges_nothing(world, client, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.router._log, "append", fail)
    with pytest.raises(GslError, match="No space left"):
        client.upsert([1000], make_queries(1))
    monkeypatch.undo()
    assert client.fetch([1000]) == [None]
    client.upsert([1001], make_queries(1))
    assert client.search(make_queries(1), 1, 8).ids[0, 0] == 1001


def test_vectors_of_another_space_never_lie_over_a_version(tmp_path):
    build(tmp_path)
    WriteLog(Folder(str(tmp_path))).append([Write("upsert", 5, np.ones(3, np.float32))], "given-3-l2")
    manifest = open_version(Folder(str(tmp_path)))
    with pytest.raises(GslError, match="of the space"):
        read_overlay(Folder(str(tmp_path)), manifest)


@pytest.mark.parametrize(
    "harm", [lambda raw: raw[:-9], lambda raw: raw[:40] + b"\xff" * 40 + raw[80:], lambda raw: b""]
)
def test_a_damaged_commit_is_named(tmp_path, harm):
    build(tmp_path)
    index = Folder(str(tmp_path))
    manifest = open_version(index)
    WriteLog(index).append([Write("delete", 5), Write("upsert", 6, np.ones(16, np.float32))], manifest.space)
    [path] = (tmp_path / "log").glob("*.arrow")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(GslError, match=path.name):
        read_overlay(index, manifest)


def test_a_commit_that_is_gone_is_missed(tmp_path):
    build(tmp_path)
    index = Folder(str(tmp_path))
    manifest, log = open_version(index), WriteLog(index)
    for item in (5, 6, 7):
        log.append([Write("delete", item)], manifest.space)
    next((tmp_path / "log").glob(f"{2:016}-*.arrow")).unlink()
    with pytest.raises(GslError, match="commit 2 should lie before it and is missing"):
        read_overlay(index, manifest)


def test_writes_go_on_behind_commits_that_were_forgotten(tmp_path):
    build(tmp_path)
    index = Folder(str(tmp_path))
    manifest = open_version(index).model_copy(update={"log_seq": 3})
    version_folder(index, "v1").delete(MANIFEST)
    publish_version(index, manifest)
    for row in range(2):
        # Each time as after a restart, with a log in which commits 1 to 3 are no longer.
        world = World(tmp_path)
        with Client(world.url) as client:
            client.upsert([1000 + row], make_vectors(1, DIM, seed=row))
        world.stop()
    overlay = read_overlay(index, manifest)
    assert overlay.seq == 5 and overlay.dump()[0].tolist() == [1000, 1001]


WRITER = """
    import sys
    import numpy as np
    from gsl_dist.index.log import Write, WriteLog
    from gsl_dist.storage import Folder
    log = WriteLog(Folder(sys.argv[1]))
    item = 0
    while True:
        seq = log.append([Write("upsert", item, np.full(16, item, "float32"), {"label": item})], sys.argv[2])
        print(seq, item, flush=True)
        item += 1
"""


def test_every_acknowledged_write_survives_kill_9(tmp_path):
    build(tmp_path)
    index = Folder(str(tmp_path))
    space, told = open_version(index).space, {}
    for turn in range(8):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), space]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
        ) as writer:
            for line in writer.stdout:
                seq, item = map(int, line.split())
                told[seq] = item
                if item == 3 + turn:
                    writer.send_signal(signal.SIGKILL)
                    break
    found = {seq: [write.id for write in writes] for seq, writes in WriteLog(index).read(0, space)}
    assert all(found[seq] == [item] for seq, item in told.items()) and len(told) >= 50
    assert read_overlay(index, open_version(index)).rows >= 1


def test_a_folder_searched_without_a_service_shows_what_was_written(world, client):
    client.upsert([1000], make_queries(1))
    client.delete([0])
    from gsl_dist.index.overlay import open_written

    searcher = open_written(world.folder)
    hits, expected = searcher.search(make_queries(2), 400, probes=8), client.search(make_queries(2), 400, 8)
    assert np.array_equal(hits.ids, expected.ids) and hits.ids[0, 0] == 1000 and 0 not in hits.ids
    assert open_searcher(world.folder).search(make_queries(1), 1, probes=8).ids[0, 0] != 1000
