"""From one version to the next while queries run: none fails, none is answered from two."""

import re
import threading
import time

import httpx
import numpy as np
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_codebook, make_index, make_queries, make_vectors

from gsl_dist.client import Client
from gsl_dist.errors import ConfigError, GslError, QueryError
from gsl_dist.hits import Hits
from gsl_dist.index.manifest import current_version, promote_version
from gsl_dist.index.sample import Sample, keep_sample, read_sample
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder


@pytest.fixture
def folder(tmp_path):
    make_index(tmp_path, version="v2", codebook=make_codebook(seed=5), shards=2, seed=3)
    make_index(tmp_path, version="v1")
    return tmp_path


def test_promoting_and_rolling_back_under_load_loses_and_mixes_nothing(folder):
    world = World(folder)
    queries, names = make_queries(3), ("v1", "v2")
    expected = {name: open_searcher(str(folder), name).search(queries, 5, probes=4) for name in names}
    assert not np.array_equal(expected["v1"].ids, expected["v2"].ids)
    over, faults, seen = threading.Event(), [], []

    def ask():
        with Client(world.url) as client:
            while not over.is_set():
                try:
                    hits = client.search(queries, 5, 4, require_all=True)
                except GslError as error:
                    faults.append(error)
                    continue
                seen.append(hits.version)
                if not np.array_equal(hits.ids, expected[hits.version].ids):
                    faults.append(hits)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    with Client(world.url, timeout_s=20) as client:
        for turn in range(6):
            wanted = names[(turn + 1) % 2]
            assert client.promote(wanted)["served"] == wanted
            assert client.search(queries, 5, 4).version == wanted and current_version(Folder(str(folder))) == wanted
    over.set()
    for thread in threads:
        thread.join()
    assert not faults and set(seen) == {"v1", "v2"}
    end = time.monotonic() + 10
    while any(len(replica.held) > 1 for replica in world.replicas.values()):
        assert time.monotonic() < end, "the version before is let go"
        time.sleep(0.05)
    world.stop()


def test_a_router_follows_the_pointer_that_somebody_else_moves(folder):
    world = World(folder, follow_s=0.05)
    promote_version(Folder(str(folder)), "v2")
    end = time.monotonic() + 10
    with Client(world.url) as client:
        while client.versions()["served"] != "v2":
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.search(make_queries(1), 3, 4).shards_total == 2
    world.stop()


def test_a_version_that_does_not_exist_or_is_damaged_is_refused_and_nothing_changes(folder):
    world = World(folder)
    shard = next((folder / "versions" / "v2").glob("shard-00001.*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with Client(world.url, timeout_s=20) as client:
        with pytest.raises(QueryError, match="no such version"):
            client.promote("v9")
        with pytest.raises(GslError, match=r"shard-00001"):
            client.promote("v2")
        assert client.search(make_queries(1), 3, 4).version == "v1" and client.versions()["promoted"] == "v1"
    world.stop()


def test_a_version_for_which_a_replica_has_no_room_is_refused(folder, monkeypatch):
    world = World(folder)

    def refuse(version, shards):
        raise ConfigError("version", version, "its shards take 9 MB, and 1 MB are free here")

    monkeypatch.setattr(world.replicas["replica-1"], "_open_held", refuse)
    with Client(world.url, timeout_s=20) as client:
        with pytest.raises(QueryError, match="free here"):
            client.promote("v2")
        assert client.search(make_queries(1), 3, 4, require_all=True).version == "v1"
    world.stop()


def test_fewer_shards_than_replicas_leave_some_without_any(tmp_path):
    make_index(tmp_path, version="v2", shards=1)
    make_index(tmp_path, version="v1", shards=3)
    world = World(tmp_path, replicas=3)
    with Client(world.url, timeout_s=20) as client:
        client.promote("v2")
        hits = client.search(make_queries(), 5, 8, require_all=True)
        assert np.array_equal(hits.ids, open_searcher(str(tmp_path), "v2").search(make_queries(), 5, probes=8).ids)
    assert httpx.get(f"{world.url}/readyz").json()["replicas"] == 1
    world.stop()


def test_recall_is_measured_on_a_sample_that_was_left_and_counts_what_was_written(tmp_path):
    make_index(tmp_path, vectors="float16")
    vectors, queries = make_vectors(), make_queries(30)
    far = ((queries[:, None] - vectors) ** 2).sum(2)
    ids = np.argsort(far, axis=1)[:, :10]
    truth = Hits(ids.astype(np.int64), np.take_along_axis(far, ids, 1).astype(np.float32), 1, 1)
    keep_sample(Folder(str(tmp_path)), "v1", Sample(queries, truth))
    world = World(tmp_path, probe_s=0.02)

    def recall():
        end = time.monotonic() + 10
        while not (found := re.findall(r'gsl_recall\{k="10"\} (\S+)', httpx.get(f"{world.url}/metrics").text)):
            assert time.monotonic() < end
            time.sleep(0.05)
        return float(found[0])

    with Client(world.url) as client:
        hits = client.search(queries, 10)
        expected = np.mean([len(set(own) & set(got)) / 10 for own, got in zip(ids, hits.ids, strict=True)])
        time.sleep(1)
        assert recall() == pytest.approx(expected, abs=0.1)
        sample = read_sample(Folder(str(tmp_path)), "v1")
        client.delete(np.unique(ids[:, 0]).tolist())
        client.upsert(range(1000, 1030), queries)
        _, now = sample.lay_over(world.router.overlay, np.arange(30))
        assert (now[:, 0] == np.arange(1000, 1030)).all() and not np.isin(ids[:, 0], now).any()
    world.stop()
