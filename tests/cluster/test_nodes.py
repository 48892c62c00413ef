"""Stages over several machines, which come and go while they run: each is a Ray node in a network namespace of its own.

Where namespaces are not allowed the nodes are further raylets on the loopback address, and what needs a network that
can be cut is skipped.
"""

import hashlib
import json
import shutil
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")
from clusters import find_ports
from corpora import make_clusters, write_vectors
from nodes import start_machines
from safetensors.numpy import load_file

from gsl_dist.client import Client
from gsl_dist.index.search import open_searcher
from gsl_dist.service.access import add_token, make_token

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROWS, SHARDS = 1200, 12
VECTORS = "id_column: id, vector_column: vector"
STAGES = {
    "train": "corpus: {{path: {at}/corpus.parquet, {vectors}, label_column: label}}\nencoder: {{kind: mlp, dim: 8, "
    "hidden: [32]}}\nloss: {{kind: proxy}}\nquantizer: {{kind: pq, sub_vectors: 2, bits: 3, cells: 4}}\n"
    "fit: {{epochs: 3, warmup_epochs: 1, batch_size: 64}}\noutput: {at}/out/model\nresources: {{workers: 2}}\n",
    "codebook": "source: fitted\nquantizer: {{kind: rq, books: 2, bits: 4, cells: 4}}\nlloyd: {{iterations: 20}}\n"
    "corpus: {{path: {at}/corpus.parquet, {vectors}}}\noutput: {at}/out/codebook\nresources: {{workers: 2}}\n",
    "encode": "corpus: {{path: {at}/corpus.parquet, {vectors}, payload_columns: [label]}}\nshards: 12\nbatch_rows: 1\n"
    "codebook: {at}/out/codebook\noutput: {at}/out/codes\nkeep_vectors: true\nresources: {{workers: 2}}\n",
    "build": "codes: {at}/out/codes\ncodebook: {at}/out/codebook\nindex: {at}/out/index\nversion: v1\nvectors: int8\n",
}
SERVE = (
    "index: {alone}/index\nreplicas: 2\ncopies: 2\nhost: 0.0.0.0\nport: {port}\nserve_port: {serve_port}\n"
    "tokens: {at}/tokens.json\nresources: {{cpus: 0.5}}\n"
)


@pytest.fixture(scope="module")
def machines():
    with start_machines() as machines:
        yield machines


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and a config for each stage."""
    place = tmp_path_factory.mktemp("nodes")
    write_vectors(place / "corpus.parquet", rows=ROWS)
    for stage, text in STAGES.items():
        (place / f"{stage}.yaml").write_text(text.format(at=place, vectors=VECTORS))
    return place


@pytest.fixture(scope="module")
def alone(machines, place):
    """What all stages make on a single machine, where two workers share it; it is moved away."""
    machines.add(cores=2)
    for stage in STAGES:
        finish(machines.start_stage(stage, place / f"{stage}.yaml"))
    machines.leave()
    shutil.move(place / "out", place / "alone")
    return place / "alone"


@pytest.fixture
def spread(machines, alone):
    """Two machines of one core each: two workers have to lie on both."""
    for _ in range(2):
        machines.add(cores=1)
    yield machines
    machines.leave()


class Watch(threading.Thread):
    """Notes which machines do tasks of some names, as their processes call themselves."""

    def __init__(self, machines, *tasks):
        super().__init__(daemon=True)
        self._machines, self._tasks, self._over = machines, tasks, threading.Event()
        self.seen = set()

    def run(self):
        while not self._over.wait(0.02):
            for node in list(self._machines.nodes):
                titles = node.find_workers()
                self.seen |= {(node, task) for task in self._tasks if any(task in title for title in titles)}

    def count(self, task):
        """Give how many machines did a task."""
        return len({node for node, done in self.seen if done == task})

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *failure):
        self._over.set()
        self.join()


def finish(run):
    """Wait until a stage has ended, see that it did well, and give what it wrote."""
    told = run.communicate(timeout=600)[0]
    assert run.returncode == 0, told
    return told


def find_replicas(node, kind="replica"):
    """Give the processes of the service that a machine runs, by the names of their deployments."""
    found = [title.removeprefix("ray::ServeReplica:gsl:").partition(".")[0] for title in node.find_workers()]
    return [name for name in found if name.startswith(kind)]


def await_shards(folder, count, run):
    while len(list(folder.glob("shard-*.note.json"))) < count:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)


def digest_files(folder):
    """Give what is in every file, of manifests without the time at which they were made."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "manifest.json":
                told = json.loads(content)
                content = json.dumps({key: told[key] for key in told if key not in ("created", "digest")}).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def read_ids(folder):
    files = sorted(folder.glob("shard-*.parquet"))
    return np.concatenate([pq.read_table(path, columns=["id"])["id"].to_numpy() for path in files])


def give(alone, place, *names):
    """Let stages begin with what a single machine made."""
    shutil.rmtree(place / "out", ignore_errors=True)
    for name in names:
        shutil.copytree(alone / name, place / "out" / name)


def test_two_machines_make_the_bytes_that_one_makes(spread, place, alone):
    give(alone, place)
    with Watch(spread, "_take_part", "encode_shard", "build_shard") as watch:
        for stage in ("codebook", "encode", "build"):
            finish(spread.start_stage(stage, place / f"{stage}.yaml"))
    assert [watch.count(task) for task in ("_take_part", "encode_shard", "build_shard")] == [2, 2, 2]
    for name in ("codebook", "codes", "index"):
        assert digest_files(place / "out" / name) == digest_files(alone / name)


@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_a_machine_that_is_lost_while_shards_are_encoded_costs_no_row(spread, place, alone, loss):
    if loss == "cut off" and spread.network is None:
        pytest.skip("network namespaces are not allowed here: there is no network to cut")
    give(alone, place, "codebook")
    with Watch(spread, "encode_shard") as watch:
        run = spread.start_stage("encode", place / "encode.yaml")
        await_shards(place / "out" / "codes", 2, run)
        lost = spread.nodes[0]
        lost.kill() if loss == "killed" else spread.network.cut(lost.namespace)
        spread.add(cores=1)
        finish(run)
    assert watch.count("encode_shard") >= 2
    assert digest_files(place / "out" / "codes") == digest_files(alone / "codes")
    assert np.array_equal(np.sort(read_ids(place / "out" / "codes")), np.arange(ROWS))


def test_two_machines_train_what_one_does_also_when_one_is_lost(spread, place, alone):
    give(alone, place)
    with Watch(spread, "RayTrainWorker") as watch:
        run = spread.start_stage("train", place / "train.yaml")
        # The first checkpoint: something is there to go on from.
        while not list((place / "out" / "model").rglob("state.pt")):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)
        spread.nodes[1].kill()
        spread.add(cores=1)
        finish(run)
    assert watch.count("RayTrainWorker") == 3
    for name in ("encoder.safetensors", "codebook.safetensors"):
        one, two = load_file(alone / "model" / name), load_file(place / "out" / "model" / name)
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=1e-4)


def test_copies_of_a_part_lie_on_different_machines_and_the_loss_of_one_is_not_noticed(machines, alone, place):
    for _ in range(2):
        machines.add(cores=2)
    secret, token = make_token("test", "read")
    add_token(str(place / "tokens.json"), token)
    ports = dict(zip(("port", "serve_port"), find_ports(2), strict=True))
    (place / "serve.yaml").write_text(SERVE.format(alone=alone, at=place, **ports))
    told = finish(machines.start_stage("serve", place / "serve.yaml"))
    held = [[name.rpartition("-")[0] for name in find_replicas(node)] for node in machines.nodes]
    assert [sorted(parts) for parts in held] == [["replica-0", "replica-1"]] * 2
    queries = make_clusters(20, 16, 5, 3)[0]
    expected = open_searcher(str(alone / "index")).search(queries, 5, probes=4, refine=1)
    with Client(json.loads(told.splitlines()[-1])["url"], token=secret) as client:
        # The router has no second copy: the machine that has it stays.
        next(node for node in machines.nodes if not find_replicas(node, "router")).kill()
        end, asked = time.monotonic() + 10, 0
        while time.monotonic() < end:
            hits = client.search(queries, 5, 4, refine=1)
            assert not hits.is_partial and np.array_equal(hits.ids, expected.ids)
            asked += 1
    assert asked > 10
