"""Copies of the same shards stand in for one another: dead ones at once, slow ones after a measured while."""

import asyncio
import threading
import time

import httpx
import pytest

pytest.importorskip("uvicorn")
from fleets import World, same
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.service.links import Latencies, name_copies


@pytest.fixture
def world(tmp_path):
    make_index(tmp_path)
    world = World(tmp_path, copies=2)
    yield world
    world.stop()


def test_two_copies_answer_as_one_process_does(world):
    assert sorted(world.replicas) == [f"replica-{part}-{copy}" for part in (0, 1) for copy in (0, 1)]
    with Client(world.url) as client:
        assert same(client.search(make_queries(), 5, 8), world.local.search(make_queries(), 5, probes=8))


def test_while_one_copy_of_each_part_lives_every_answer_is_whole(world):
    queries = make_queries(4)
    expected = world.local.search(queries, 5, probes=8)
    over, wrong, asked = threading.Event(), [], []

    def ask():
        with Client(world.url) as client:
            while not over.is_set():
                asked.append(1)
                if not same(client.search(queries, 5, 8, require_all=True), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        name = f"replica-{turn % 2}-{turn // 2 % 2}"
        world.kill(name)
        time.sleep(0.1)
        world.begin(name)
        end = time.monotonic() + 20
        while httpx.get(f"{world.url}/readyz").json()["connected"] < 4:
            assert time.monotonic() < end, "the new copy was never connected"
            time.sleep(0.02)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(asked) > 20


def test_a_slow_copy_costs_a_measured_while_and_not_the_time_to_wait(world, monkeypatch):
    queries = make_queries(1)
    with Client(world.url) as client:
        for _ in range(60):  # so that it is known how long answers take
            client.search(queries, 5, 8)
        held, let_go = world.holding("replica-0-0"), threading.Event()
        answer = held.search_together
        monkeypatch.setattr(held, "search_together", lambda bodies: (let_go.wait(4), answer(bodies))[1])
        start = time.monotonic()
        for _ in range(10):
            assert same(client.search(queries, 5, 8, require_all=True), world.local.search(queries, 5, probes=8))
        assert time.monotonic() - start < 3
        let_go.set()
        text = httpx.get(f"{world.url}/metrics").text
        assert "gsl_hedged_questions 0.0" not in text


def test_how_long_to_wait_is_measured_for_each_size():
    latencies = Latencies()
    unknown = latencies.give_up_after(100)
    for place in range(100):
        latencies.note(100, 0.010 + place * 1e-4)
        latencies.note(100_000, 0.5)
    assert latencies.give_up_after(100) == pytest.approx(0.0195, abs=0.001) and unknown > 0.1
    assert latencies.give_up_after(100_000) == pytest.approx(0.5)


def test_a_part_that_is_alone_bears_its_own_name():
    assert name_copies("replica-3", 1) == ["replica-3"]
    assert name_copies("replica-3", 2) == ["replica-3-0", "replica-3-1"]


def test_the_answer_names_the_shards_that_are_missing(tmp_path):
    make_index(tmp_path)
    world = World(tmp_path)
    world.kill("replica-1")
    with Client(world.url) as client:
        hits = client.search(make_queries(), 5, 8)
        assert sorted(hits.missing) == sorted(world.groups["replica-1"]) and hits.is_partial
    answer = world.post({"vectors": make_queries(1).tolist(), "k": 2}).json()
    assert sorted(answer["missing"]) == sorted(world.groups["replica-1"])
    world.stop()


def test_a_caller_who_waits_less_gets_the_shards_that_were_in_time(tmp_path, monkeypatch):
    make_index(tmp_path)
    world = World(tmp_path, threads=2)
    held, let_go = world.holding("replica-1"), threading.Event()
    answer = held.search_together
    monkeypatch.setattr(held, "search_together", lambda bodies: (let_go.wait(5), answer(bodies))[1])
    with Client(world.url) as client:
        start = time.monotonic()
        hits = client.search(make_queries(), 5, 8, timeout_s=0.2)
        assert hits.is_partial and time.monotonic() - start < 2
        let_go.set()
    world.stop()


def test_what_waited_longer_than_its_asker_is_not_searched(tmp_path, monkeypatch):
    make_index(tmp_path)
    world = World(tmp_path, replicas=1, threads=2)
    held, let_go, searched = world.holding("replica-0"), threading.Event(), []
    answer = held.search_together

    def search(bodies):
        let_go.wait(5)
        searched.extend(bodies)
        return answer(bodies)

    monkeypatch.setattr(held, "search_together", search)
    # Each asks for something else, so that none is searched together with another.
    bodies = [{"vectors": make_queries(1).tolist(), "k": k, "timeout_s": 0.1} for k in range(1, 31)]

    async def ask_all():
        async with httpx.AsyncClient(timeout=20) as http:
            return await asyncio.gather(*(http.post(f"{world.url}/v1/search", json=body) for body in bodies))

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {503}
    let_go.set()
    time.sleep(0.3)
    assert 1 <= len(searched) < 30, "only what a thread had taken up in time was searched"
    world.stop()
