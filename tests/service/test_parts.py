"""Which parts a query asks, with shards dealt out by id and by cell, alone and together with others."""

import asyncio

import httpx
import numpy as np
import pytest

pytest.importorskip("uvicorn")
from fleets import World, same
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import ShardUnavailable
from gsl_dist.hits import Effort
from gsl_dist.index.coarse import open_coarse
from gsl_dist.storage import Folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    make_index(folder)
    world = World(folder)
    yield world
    world.stop()


def watch_asked(world, monkeypatch):
    asked = []
    for name in world.replicas:
        held = world.holding(name)
        answer = held.search_together
        monkeypatch.setattr(
            held, "search_together", lambda bodies, name=name, answer=answer: (asked.append(name), answer(bodies))[1]
        )
    return asked


@pytest.fixture
def dealt(tmp_path):
    make_index(tmp_path, sharding="cell")
    world = World(tmp_path, replicas=3)
    yield world
    world.stop()


def test_by_cell_only_parts_that_hold_a_probed_cell_are_asked(dealt, monkeypatch):
    asked = watch_asked(dealt, monkeypatch)
    with Client(dealt.url) as client:
        for query in make_queries(20):
            for probes in (1, 2, 8):
                asked.clear()
                hits, expected = client.search(query, 5, probes), dealt.local.search(query, 5, probes=probes)
                assert same(hits, expected) and not hits.is_partial and len(asked) <= min(probes, 3)
        hits = client.search(make_queries(20), 5, 2)
        assert same(hits, dealt.local.search(make_queries(20), 5, probes=2)) and hits.shards_answered == 3


def test_by_cell_a_dead_part_is_missed_only_where_it_is_needed(dealt):
    queries = make_queries(30)
    coarse = open_coarse(Folder(dealt.folder), dealt.local.manifest)
    [dead] = [name for name, shards in dealt.groups.items() if shards == ["shard-00001"]]
    dealt.kill(dead)
    with Client(dealt.url) as client:
        needed = coarse.probe(queries, 1).lists[:, 0] % 3 == 1
        for query, is_needed in zip(queries[~needed], needed[~needed], strict=True):
            hits = client.search(query, 5, 1)
            assert same(hits, dealt.local.search(query, 5, probes=1)) and not hits.is_partial and not is_needed
        for query in queries[needed]:
            with pytest.raises(ShardUnavailable, match="shard-00001"):
                client.search(query, 5, 1, require_all=True)
    assert needed.any() and not needed.all()
    assert httpx.get(f"{dealt.url}/healthz").json()["status"] == "partial"


def test_queries_that_go_together_miss_what_each_would_miss_alone(dealt):
    queries = make_queries(30)
    coarse = open_coarse(Folder(dealt.folder), dealt.local.manifest)
    [dead] = [name for name, shards in dealt.groups.items() if shards == ["shard-00001"]]
    dealt.kill(dead)
    needed = coarse.probe(queries, 1).lists[:, 0] % 3 == 1

    async def ask_all(served, require_all):
        each = (served.search(query[None], Effort(5, 1), require_all=require_all) for query in queries)
        return await asyncio.gather(*each, return_exceptions=True)

    with dealt.router.hold() as served:
        for require_all in (False, True):
            answers = dealt.call(ask_all(served, require_all))
            for query, is_needed, hits in zip(queries, needed, answers, strict=True):
                if is_needed:
                    assert isinstance(hits, ShardUnavailable) and hits.missing == ["shard-00001"]
                else:
                    assert same(hits, dealt.local.search(query, 5, probes=1)) and not hits.is_partial


def test_many_that_come_at_once_are_few_questions_to_a_replica(world, monkeypatch):
    asked, queries = watch_asked(world, monkeypatch), make_queries(60)

    async def ask_all(served):
        return await asyncio.gather(*(served.search(query[None], Effort(5, 8)) for query in queries))

    with world.router.hold() as served:
        answers = world.call(ask_all(served))
    assert np.array_equal(np.concatenate([hits.ids for hits in answers]), world.local.search(queries, 5, probes=8).ids)
    assert len(asked) <= len(world.replicas) * 4


def test_by_id_every_part_is_asked(world, monkeypatch):
    asked = watch_asked(world, monkeypatch)
    with Client(world.url) as client:
        client.search(make_queries(1), 5, 1)
    assert sorted(asked) == sorted(world.replicas)
