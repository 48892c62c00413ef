"""From manifests to answers: what the RayService and a RayJob start, on a cluster that `ray start` started."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

pytest.importorskip("ray")
from clusters import find_ports, start_cluster
from corpora import write_vectors

from gsl_dist.client import Client
from gsl_dist.index.search import open_searcher
from gsl_dist.service.access import add_token, make_token

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
KUBERAY = Path(__file__).resolve().parents[2] / "deploy" / "kuberay"
CONFIGS = {
    "codebook": "source: fitted\nquantizer: {kind: pq, sub_vectors: 4, bits: 4, cells: 4}\n"
    "corpus: {path: corpus.parquet, id_column: id, vector_column: vector}\noutput: codebook\n",
    "encode": "corpus: {path: corpus.parquet, id_column: id, vector_column: vector}\n"
    "codebook: codebook\noutput: codes\nshards: 2\n",
    "build": "codes: codes\ncodebook: codebook\nindex: index\n",
}


def read(name):
    return yaml.safe_load((KUBERAY / name).read_text())["spec"]


def settle_ports(told, folder, token_file):
    """The service of the manifest, at free ports of this machine."""
    told["http_options"], [application] = {"host": "127.0.0.1"}, told["applications"]
    ports = dict(zip(("port", "serve_port", "grpc_port"), find_ports(3), strict=True))
    told["http_options"]["port"] = ports["serve_port"]
    small = {"resources": {"workers": 1, "cpus": 0.25}}
    application["args"] |= {**ports, "tokens": str(token_file), "host": "127.0.0.1", **small}
    (folder / "service.yaml").write_text(yaml.safe_dump(told))
    return ports


def test_a_job_of_the_manifests_makes_an_index_and_the_service_of_the_manifests_answers_from_it(tmp_path):
    write_vectors(tmp_path / "corpus.parquet")
    configs = tmp_path / "configs"
    configs.mkdir()
    for stage, text in CONFIGS.items():
        (configs / f"{stage}.yaml").write_text(text)
    text, known = make_token("searcher", "read")
    add_token(str(tmp_path / "tokens.json"), known)
    env = {"RAY_AUTH_MODE": "disabled", "GSL_ROOT": str(tmp_path)}
    with start_cluster(4, **env) as cluster:
        run = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.address, "--"]
        # The map of configs is mounted elsewhere, and the interpreter of the image is another.
        words = read("jobs/pipeline.yaml")["entrypoint"].split()
        words = [sys.executable, *words[1:3], str(configs)]
        subprocess.run([*run, *words], check=True, env=os.environ | env, timeout=200)
        ports = settle_ports(
            yaml.safe_load(read("60-service.yaml")["serveConfigV2"]), tmp_path, tmp_path / "tokens.json"
        )
        serve = [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", cluster.address]
        subprocess.run([*serve, str(tmp_path / "service.yaml")], check=True, env=os.environ | env)
        wanted = open_searcher(str(tmp_path / "index")).search(queries := draw_queries(), 5, probes=4)
        for port in (ports["serve_port"], ports["port"]):
            client = await_service(f"http://127.0.0.1:{port}", text)
            found = client.search(queries, k=5, probes=4)
            assert np.array_equal(found.ids, wanted.ids) and found.shards_answered == found.shards_total == 2


def draw_queries():
    return np.random.default_rng(3).normal(size=(8, 16)).astype(np.float32)


def await_service(url, token):
    """A client of a service that has started: every copy of every shard answers."""
    for _ in range(240):
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return Client(url, token=token)
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")
