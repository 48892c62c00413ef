"""The service as Ray Serve runs it: real processes, both doors."""

import os
import signal
import socket
import time

import httpx
import numpy as np
import pytest

pytest.importorskip("ray")
from ray.serve import get_deployment_handle
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.config import check_config
from gsl_dist.errors import ArtefactError, BadInput, ConfigError, GslError
from gsl_dist.index.search import open_searcher

pytestmark = pytest.mark.ray


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_index(folder)
    return str(folder)


@pytest.fixture(scope="module")
def service(ray_session, folder):
    # Replicas of half a core each fit beside whatever else the shared session runs.
    yield serve(ServeConfig(index=folder, replicas=2, port=0, serve_port=free_port(), resources={"cpus": 0.5}))
    stop_service()


def replica_pid(name):
    return get_deployment_handle(name, "gsl").pid.remote().result(timeout_s=10)


def test_both_doors_and_the_local_searcher_give_the_same_answer(service, folder):
    queries = make_queries()
    expected = open_searcher(folder).search(queries, 10, probes=8)
    for url in (service.url, service.serve_url):
        with Client(url) as client:
            hits = client.search(queries, 10, 8, require_all=True)
        assert np.array_equal(hits.ids, expected.ids) and np.array_equal(hits.distances, expected.distances)
        assert (hits.shards_answered, hits.shards_total, hits.version) == (3, 3, "v1")
    assert sorted(name for group in service.replicas.values() for name in group) == sorted(open_searcher(folder).shards)


def test_both_doors_refuse_in_the_same_shape(service):
    bodies = [{"vectors": [[0.0]]}, {"vectors": [[0.0] * 16], "k": 0}, {"what": 1}]
    for body in bodies:
        answers = [httpx.post(f"{url}/v1/search", json=body) for url in (service.url, service.serve_url)]
        assert [answer.status_code for answer in answers] == [400, 400]
        assert answers[0].json() == answers[1].json()
    for url in (service.url, service.serve_url):
        assert httpx.get(f"{url}/nope").json()["code"] == "not_found"


def test_a_killed_replica_is_missing_then_restarted_and_the_answer_is_whole_again(service, folder):
    queries = make_queries()
    expected = open_searcher(folder).search(queries, 5, probes=8)
    with Client(service.url) as client:
        os.kill(replica_pid("replica-1"), signal.SIGKILL)
        partial, end = False, time.monotonic() + 60
        while time.monotonic() < end:
            hits = client.search(queries, 5, 8)
            partial = partial or hits.is_partial
            if partial and not hits.is_partial:
                break
            time.sleep(0.02)
        assert partial and not hits.is_partial
        assert np.array_equal(hits.ids, expected.ids)


def test_nothing_is_deployed_for_what_is_wrong_with_the_version(tmp_path):
    # No Ray is needed: all of it is refused before Serve is asked.
    make_index(tmp_path)
    with pytest.raises(BadInput, match="no such version"):
        serve(ServeConfig(index=str(tmp_path), version="v9"))
    with pytest.raises(ConfigError, match="3 shards"):
        serve(ServeConfig(index=str(tmp_path), replicas=4))
    with pytest.raises(ConfigError, match=r"resources\.workers"):
        serve(ServeConfig(index=str(tmp_path), resources={"workers": 2}))
    with pytest.raises(ConfigError, match="did you mean replicas"):
        check_config(ServeConfig, {"index": str(tmp_path), "replica": 2})


@pytest.mark.parametrize("harm", ["cut", "altered"])
def test_a_damaged_shard_is_refused_before_anything_is_deployed(tmp_path, harm):
    make_index(tmp_path)
    path = tmp_path / "versions" / "v1" / "shard-00001.faiss"
    content = path.read_bytes()
    path.write_bytes(content[:-7] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"shard-00001\.faiss"):
        serve(ServeConfig(index=str(tmp_path)))


def test_a_service_that_finds_no_room_says_so(service, folder):
    stop_service()
    greedy = ServeConfig(index=folder, port=0, serve_port=free_port(), resources={"cpus": 4000}, start_timeout_s=3)
    with pytest.raises(GslError, match="found no room"):
        serve(greedy)
