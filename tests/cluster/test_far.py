"""Every stage with its corpus and artefacts in an object store: what comes of it is what a local disk holds."""

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("moto")
pytest.importorskip("flask")
from clusters import find_ports
from corpora import write_vectors
from stores import Faults, name_place, start_store

from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.compact import CompactConfig, run_compact
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate
from gsl_dist.cluster.serve import ServeConfig, run_serve, stop_service
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import open_version
from gsl_dist.index.overlay import read_overlay
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder, join_location

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
VECTORS = {"id_column": "id", "vector_column": "vector"}
QUANTIZER = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 4}


@pytest.fixture(scope="module")
def store():
    with start_store() as proxy:
        yield proxy


@pytest.fixture
def far(store, request):
    store.faults, store.asked = Faults(), []
    yield name_place(store, request.node.name.replace("[", "-").rstrip("]"))
    store.faults = Faults()


def put_corpus(place, tmp_path):
    """The same corpus and queries in a folder, wherever it is."""
    for name, rows, seed in (("corpus", 600, 0), ("queries", 40, 5)):
        write_vectors(tmp_path / "draft.parquet", rows=rows, seed=seed, first=10_000 * (seed > 0))
        Folder(place).write_bytes(f"{name}.parquet", (tmp_path / "draft.parquet").read_bytes())


def run_stages(place):
    """Fit, encode, build, write and compact, evaluate."""
    corpus = {"path": join_location(place, "corpus.parquet"), **VECTORS}
    codebook, codes, index = (join_location(place, name) for name in ("codebook", "codes", "index"))
    fitted = {"source": "fitted", "corpus": corpus, "quantizer": QUANTIZER, "lloyd": {"iterations": 3}}
    run_codebook(check_config(CodebookConfig, fitted | {"output": codebook}))
    kept = {"corpus": corpus | {"payload_columns": ["label"]}, "shards": 3, "keep_vectors": True, "batch_rows": 100}
    run_encode(check_config(EncodeConfig, kept | {"codebook": codebook, "output": codes}))
    made = run_build(
        check_config(BuildConfig, {"codes": codes, "codebook": codebook, "index": index, "vectors": "float16"})
    )
    folder = Folder(index)
    log, manifest = WriteLog(folder), open_version(folder)
    writes = read_overlay(folder, manifest, log).check([Write("delete", item) for item in (3, 400)])
    log.append(writes, manifest.space)
    compacted = run_compact(check_config(CompactConfig, {"index": index}))
    queries = {"path": join_location(place, "queries.parquet"), **VECTORS}
    told = {"index": index, "queries": queries, "codes": None, "output": join_location(place, "evaluation.json")}
    evaluated = run_evaluate(check_config(EvaluateConfig, told))
    return made, compacted, evaluated


def list_pins(manifest):
    return {entry.name: entry.sha256 for entry in manifest.files}


@pytest.mark.parametrize(
    "faults",
    [Faults(), Faults(refused=0.02, dropped=0.02, cut=0.03, unseen_s=0.1, seed=3)],
    ids=["steady", "failing"],
)
def test_stages_in_a_store_make_the_files_that_they_make_on_a_disk(ray_session, store, far, tmp_path, faults):
    local = str(tmp_path / "near")
    for place in (local, far):
        put_corpus(place, tmp_path)
    wanted = run_stages(local)
    store.faults = faults
    found = run_stages(far)
    # The corpus lies elsewhere, and a version's name tells of where it came from: contents are compared.
    for near, there in zip(wanted[:2], found[:2], strict=True):
        assert list_pins(near) == list_pins(there) and near.rows == there.rows
    assert wanted[2]["database_size"] == found[2]["database_size"] == 598
    if faults.refused:
        assert sum(faults.met.values()) > 20
    near, there = open_searcher(f"{local}/index"), open_searcher(join_location(far, "index"))
    queries = np.random.default_rng(2).normal(size=(10, 16)).astype(np.float32)
    assert np.array_equal(near.search(queries, 5, probes=4).ids, there.search(queries, 5, probes=4).ids)


def test_training_in_a_store_gives_the_network_that_a_disk_holds(ray_session, store, far, tmp_path):
    local, made = str(tmp_path / "near"), {}
    for place in (local, far):
        put_corpus(place, tmp_path)
        tree = {
            "corpus": {"path": join_location(place, "corpus.parquet"), **VECTORS, "label_column": "label"},
            "output": join_location(place, "model"),
            "encoder": {"kind": "mlp", "dim": 8, "hidden": [16]},
            "loss": {"kind": "proxy"},
            "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 4, "cells": 2, "residual": False},
            "lloyd": {"iterations": 2},
            "fit": {"epochs": 2, "warmup_epochs": 1, "batch_size": 64},
        }
        made[place] = run_train(check_config(TrainConfig, tree))
    assert {e.name: e.sha256 for e in made[local].files} == {e.name: e.sha256 for e in made[far].files}
    assert Folder(join_location(far, "model")).names(folders=True) == []


def count_fetched(store):
    return sum(command == "GET" and path.endswith(".faiss") for command, path in store.asked)


def test_a_service_started_again_fetches_no_shard_that_its_cache_has(ray_session, store, far, tmp_path):
    put_corpus(far, tmp_path)
    run_stages(far)
    port, serve_port = find_ports(2)
    tree = {"index": join_location(far, "index"), "replicas": 2, "port": port, "serve_port": serve_port}
    tree |= {"cache": {"folder": str(tmp_path / "cache")}, "resources": {"cpus": 0.5}}
    queries, answers = np.random.default_rng(2).normal(size=(10, 16)).astype(np.float32), []
    wanted = open_searcher(tree["index"]).search(queries, 5, probes=4, refine=1).ids
    for round_ in range(2):
        store.asked.clear()
        try:
            service = run_serve(check_config(ServeConfig, tree))
            with Client(service["url"]) as client:
                answers.append(client.search(queries, k=5, probes=4, refine=1).ids)
        finally:
            stop_service()
        assert (count_fetched(store) > 0) == (round_ == 0)
    assert all(np.array_equal(found, wanted) for found in answers)
    names = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")]
    assert len(names) >= 3 and all(len(name) == 64 for name in names)
