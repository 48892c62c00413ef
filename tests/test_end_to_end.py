"""The whole pipeline on a small corpus: every stage once, then what must hold between them."""

import json
import shutil

import faiss
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import make_clusters, write_vectors
from reference import search_in_loops

from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, load_codebook, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, read_codes, run_encode
from gsl_dist.cluster.evaluate import EvaluateConfig, embed_queries, run_evaluate
from gsl_dist.cluster.model import load_encoder, load_trained_codebook
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.errors import ArtefactError, BadInput, ConfigError, DataError, QueryError
from gsl_dist.index.manifest import current_version, open_version, verify_version
from gsl_dist.index.search import open_searcher
from gsl_dist.index.shards import extract_codebook
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray
COLUMNS = {"id_column": "id", "vector_column": "vector"}


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    """A trained, encoded and built index over 1,500 vectors in 3 shards, and 100 queries."""
    place = tmp_path_factory.mktemp("world")
    write_vectors(place / "train.parquet", rows=600, seed=1)
    write_vectors(place / "database.parquet", rows=1500, seed=2)
    write_vectors(place / "queries.parquet", rows=100, seed=3, first=10_000)
    train = {
        "corpus": {"path": str(place / "train.parquet"), "label_column": "label", **COLUMNS},
        "output": str(place / "model"),
        "encoder": {"kind": "mlp", "dim": 8, "hidden": [32]},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 8},
        "fit": {"epochs": 4, "warmup_epochs": 1, "batch_size": 64},
    }
    run_train(check_config(TrainConfig, train))
    own = {"model": str(place / "model"), "output": str(place / "codebook")}
    run_codebook(check_config(CodebookConfig, own))
    run_encode(check_config(EncodeConfig, encode_settings(place)))
    run_build(check_config(BuildConfig, build_settings(place)))
    return place


def encode_settings(place):
    return {
        "corpus": {"path": str(place / "database.parquet"), "payload_columns": ["label"], **COLUMNS},
        "model": str(place / "model"),
        "codebook": str(place / "codebook"),
        "output": str(place / "codes"),
        "shards": 3,
        "keep_vectors": True,
    }


def build_settings(place, **changes):
    parts = {name: str(place / name) for name in ("codes", "codebook", "model", "index")}
    return parts | changes


def query_vectors(world):
    vectors, _ = make_clusters(100, 16, 5, seed=3)
    return embed_queries(str(world / "index"), open_version(Folder(world / "index")), vectors)


def test_codebook_of_every_shard_is_the_one_trained_on(world):
    trained = load_trained_codebook(str(world / "model"))
    assert load_codebook(str(world / "codebook")).fingerprint == trained.fingerprint
    manifest = open_version(Folder(world / "index"))
    assert manifest.fingerprint == trained.fingerprint
    folder = world / "index" / "versions" / manifest.version
    for shard in manifest.shards:
        index = faiss.read_index(str(folder / shard.index.name))
        assert extract_codebook(index).fingerprint == trained.fingerprint


def test_version_is_whole_and_promoted(world):
    index = Folder(world / "index")
    assert verify_version(index) == []
    manifest = open_version(index)
    assert current_version(index) == manifest.version
    assert manifest.rows == 1500
    assert set(manifest.configs) == {"train", "codebook", "encode", "build"}
    payload = [pq.read_table(world / "index/versions" / manifest.version / s.payload.name) for s in manifest.shards]
    assert [table.column_names for table in payload] == [["id", "label"]] * 3


def test_shards_answer_what_plain_faiss_over_the_vectors_does(world):
    manifest = open_version(Folder(world / "index"))
    folder = world / "index" / "versions" / manifest.version
    searcher, queries = open_searcher(str(world / "index")), query_vectors(world)
    encoder, _ = load_encoder(str(world / "model"))
    vectors, _ = make_clusters(1500, 16, 5, seed=2)
    whole = faiss.clone_index(faiss.read_index(str(folder / manifest.shards[0].index.name)))
    whole.reset()
    whole.add(embed_queries(str(world / "index"), manifest, vectors))
    assert encoder.dim == whole.d
    for probes in (1, 3, 8):
        hits = searcher.search(queries, 10, probes=probes)
        distances, _ = whole.search(queries, 10, params=faiss.SearchParametersIVF(nprobe=probes))
        found = distances < 1e38
        np.testing.assert_allclose(hits.distances[found], distances[found], atol=1e-4)


def test_client_router_and_local_searcher_agree(world):
    queries = query_vectors(world)
    local = open_searcher(str(world / "index")).search(queries, 10, probes=8)
    service = serve(check_config(ServeConfig, {"index": str(world / "index"), "replicas": 2, "port": 0}))
    try:
        with Client(service.url) as client:
            served = client.search(queries, 10, 8)
    finally:
        stop_service()
    np.testing.assert_allclose(served.distances, local.distances, atol=1e-4)
    # Items at one distance may trade places, and the last of them may be another one.
    inner = local.distances < local.distances[:, -1:] - 1e-4
    for ours, theirs, sure in zip(local.ids, served.ids, inner, strict=True):
        assert set(ours[sure]) == set(theirs[sure])
    assert (served.shards_answered, served.shards_total) == (3, 3)


def test_evaluation_measures_held_out_queries(world):
    settings = {
        "index": str(world / "index"),
        "queries": {"path": str(world / "queries.parquet"), "label_column": "label", **COLUMNS},
        "codes": str(world / "codes"),
        "label_column": "label",
        "output": str(world / "evaluation.json"),
    }
    measured = run_evaluate(check_config(EvaluateConfig, settings))
    assert json.loads((world / "evaluation.json").read_text())["map_coded"] == measured["map_coded"]
    assert measured["map_coded"] > 0.8, "five well separated clusters"
    assert 0 < measured["quantization_error"] < 1
    recalls = [row["recall_at_10"] for row in measured["recall_by_probes"]]
    assert recalls[-1] == measured["recall_at_10_vs_exact"] > 0.1
    among = settings | {"queries": settings["queries"] | {"path": str(world / "database.parquet")}}
    with pytest.raises(DataError, match="database"):
        run_evaluate(check_config(EvaluateConfig, among))
    with pytest.raises(ConfigError, match="label_column"):
        run_evaluate(check_config(EvaluateConfig, settings | {"label_column": "colour"}))


def test_build_is_not_done_twice_and_other_codes_need_another_name(world):
    manifest = open_version(Folder(world / "index"))
    assert run_build(check_config(BuildConfig, build_settings(world))) == manifest
    with pytest.raises(BadInput, match="version"):
        run_build(check_config(BuildConfig, build_settings(world, version=manifest.version, model=None)))


def test_relaunched_build_ends_with_the_same_bytes(world):
    again = build_settings(world, index=str(world / "again"))
    manifest = run_build(check_config(BuildConfig, again))
    folder = world / "again" / "versions" / manifest.version
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.faiss").write_bytes(b"half of it")
    assert [s.index for s in run_build(check_config(BuildConfig, again)).shards] == [s.index for s in manifest.shards]


def test_codebook_that_does_not_fit_the_codes_is_refused(world):
    other = {
        "source": "fitted",
        "model": str(world / "model"),
        "corpus": {"path": str(world / "train.parquet"), **COLUMNS},
        "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 8},
        "output": str(world / "other"),
    }
    run_codebook(check_config(CodebookConfig, other))
    settings = build_settings(world, codebook=str(world / "other"), index=str(world / "wrong"))
    with pytest.raises(ArtefactError, match="written with codebook"):
        run_build(check_config(BuildConfig, settings))
    assert not (world / "wrong").exists()


def test_ids_that_occur_twice_are_refused(world):
    table = pq.read_table(world / "database.parquet")
    ids = table["id"].to_numpy().copy()
    ids[1400] = ids[3]
    pq.write_table(table.set_column(0, "id", [ids]), world / "twice.parquet")
    settings = encode_settings(world)
    settings["corpus"]["path"] = str(world / "twice.parquet")
    run_encode(check_config(EncodeConfig, settings | {"output": str(world / "codes-twice")}))
    build = build_settings(world, codes=str(world / "codes-twice"), index=str(world / "twice"))
    with pytest.raises(DataError, match="id: got 3"):
        run_build(check_config(BuildConfig, build))
    assert not (world / "twice" / "CURRENT.json").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "opq", "sub_vectors": 4, "rotation_iterations": 3},
        {"kind": "rq", "books": 4, "joint_iterations": 2},
        {"kind": "lsq", "books": 4, "joint_iterations": 3, "train_restarts": 1},
        {"kind": "vlq", "sub_vectors": 4, "edges": 3},
    ],
    ids=lambda shape: shape["kind"],
)
def test_codes_of_every_kind_are_served_from_their_files(ray_session, tmp_path, shape):
    write_vectors(tmp_path / "database.parquet", rows=600, seed=2)
    corpus = {"path": str(tmp_path / "database.parquet"), **COLUMNS}
    fitted = {"source": "fitted", "corpus": corpus, "output": str(tmp_path / "codebook"), "lloyd": {"iterations": 5}}
    run_codebook(check_config(CodebookConfig, fitted | {"quantizer": shape | {"bits": 4, "cells": 4}}))
    run_encode(check_config(EncodeConfig, encode_settings(tmp_path) | {"model": None}))
    manifest = run_build(check_config(BuildConfig, build_settings(tmp_path, model=None, vectors="float16")))
    codebook = load_codebook(str(tmp_path / "codebook"))
    assert (manifest.kind, manifest.rotated) == (codebook.kind, shape["kind"] == "opq")
    if shape["kind"] != "opq":
        with pytest.raises(ConfigError, match=f"code_layout: got 'fastscan', .*these are {shape['kind']} codes"):
            run_build(check_config(BuildConfig, build_settings(tmp_path, model=None, code_layout="fastscan")))
    if shape["kind"] == "vlq":
        linked = build_settings(tmp_path, model=None, coarse_search="hnsw", index=str(tmp_path / "linked"))
        with pytest.raises(ConfigError, match="kind vlq are searched with flat alone"):
            run_build(check_config(BuildConfig, linked))
    tables = [read_codes(Folder(tmp_path / "codes"), shard.name, codebook) for shard in manifest.shards]
    ids, vectors = (np.concatenate([getattr(table, name) for table in tables]) for name in ("ids", "vectors"))
    decoded = np.concatenate([codebook.decode(table.cells, codebook.unpack(table.codes)) for table in tables])
    assert np.square(decoded - vectors).sum() < 0.5 * np.square(vectors - vectors.mean(axis=0)).sum()
    queries, _ = make_clusters(5, 16, 5, seed=3)
    searcher = open_searcher(str(tmp_path / "index"))
    distances, found = searcher.search(queries, 10, probes=manifest.lists, refine=1)
    wanted = search_in_loops(queries, ids, decoded, 10)
    np.testing.assert_allclose(distances, [[distance for distance, _ in row] for row in wanted], rtol=1e-4)
    far = {int(item): vector for item, vector in zip(ids, decoded, strict=True)}
    mine = [
        [np.square(far[int(item)] - query).sum() for item in row] for row, query in zip(found, queries, strict=True)
    ]
    np.testing.assert_allclose(mine, distances, rtol=1e-4)
    exactly = searcher.search(queries, 10, probes=manifest.lists, refine=60)
    assert exactly.ids.tolist() == [[item for _, item in row] for row in search_in_loops(queries, ids, vectors, 10)]


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_every_metric_goes_from_the_codebook_to_the_answer(ray_session, tmp_path, metric):
    write_vectors(tmp_path / "database.parquet", rows=600, seed=2)
    corpus = {"path": str(tmp_path / "database.parquet"), "normalize": metric == "cosine", **COLUMNS}
    fitted = {"source": "fitted", "corpus": corpus, "output": str(tmp_path / "codebook"), "lloyd": {"iterations": 5}}
    shape = {"kind": "pq", "sub_vectors": 8, "bits": 6, "cells": 4}
    run_codebook(check_config(CodebookConfig, fitted | {"quantizer": shape, "metric": metric}))
    encode = encode_settings(tmp_path) | {"model": None, "corpus": corpus | {"payload_columns": ["label"]}}
    if metric == "cosine":
        long = encode | {"corpus": encode["corpus"] | {"normalize": False}, "output": str(tmp_path / "long")}
        with pytest.raises(
            DataError, match=r"vectors: got 'one of length .*wants length 1: set corpus\.normalize=true"
        ):
            run_encode(check_config(EncodeConfig, long))
    run_encode(check_config(EncodeConfig, encode))
    manifest = run_build(check_config(BuildConfig, build_settings(tmp_path, model=None, vectors="float16")))
    assert manifest.metric == metric == load_codebook(str(tmp_path / "codebook")).metric
    queries, x_ND = make_clusters(5, 16, 5, seed=3)[0], make_clusters(600, 16, 5, seed=2)[0]
    products = queries @ x_ND.T
    if metric == "cosine":
        products = products / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(x_ND, axis=1)
    hits = open_searcher(str(tmp_path / "index")).search(queries, 10, probes=4, refine=60)
    np.testing.assert_allclose(hits.distances, -np.sort(-products, axis=1)[:, :10], rtol=2e-3, atol=2e-3)
    coded = open_searcher(str(tmp_path / "index")).search(queries, 50, probes=4, refine=1)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(coded.ids, hits.ids, strict=True)]) > 8


def test_metrics_that_a_codebook_cannot_have_are_refused(tmp_path):
    fitted = {"source": "fitted", "corpus": {"path": str(tmp_path)}, "output": str(tmp_path / "c"), "metric": "ip"}
    for quantizer in ({"kind": "vlq", "sub_vectors": 4}, {"kind": "rabitq"}):
        with pytest.raises(ConfigError, match=f"metric: ip is nothing that .*{quantizer['kind']} can measure"):
            check_config(CodebookConfig, fitted | {"quantizer": quantizer})
    with pytest.raises(ConfigError, match="ranked learns which rows are near"):
        check_config(CodebookConfig, fitted | {"quantizer": {"kind": "rq", "books": 4}, "ranked": {}})
    with pytest.raises(ConfigError, match="lands by distances"):
        check_config(CodebookConfig, {"model": "m", "output": str(tmp_path / "c"), "metric": "cosine"})


@pytest.mark.parametrize("bits", [1, 3])
def test_bits_for_every_dimension_are_served_from_their_files(ray_session, tmp_path, bits):
    write_vectors(tmp_path / "database.parquet", rows=600, seed=2)
    corpus = {"path": str(tmp_path / "database.parquet"), **COLUMNS}
    fitted = {"source": "fitted", "corpus": corpus, "output": str(tmp_path / "codebook"), "lloyd": {"iterations": 5}}
    run_codebook(check_config(CodebookConfig, fitted | {"quantizer": {"kind": "rabitq", "bits": bits, "cells": 4}}))
    run_encode(check_config(EncodeConfig, encode_settings(tmp_path) | {"model": None}))
    manifest = run_build(check_config(BuildConfig, build_settings(tmp_path, model=None, vectors="float16")))
    assert (manifest.kind, manifest.bits, manifest.bytes_per_item) == ("rabitq", bits, {1: 2 + 8, 3: 6 + 20}[bits])
    codebook, queries = load_codebook(str(tmp_path / "codebook")), make_clusters(20, 16, 5, seed=3)[0]
    tables = [read_codes(Folder(tmp_path / "codes"), shard.name, codebook) for shard in manifest.shards]
    ids, vectors = (np.concatenate([getattr(table, name) for table in tables]) for name in ("ids", "vectors"))
    nearest = np.array([[item for _, item in row] for row in search_in_loops(queries, ids, vectors, 10)])
    refined = open_searcher(str(tmp_path / "index")).search(queries, 10, probes=4, refine=20)
    assert (refined.ids == nearest).mean() > 0.9


def test_a_version_whose_cells_are_found_through_a_graph_answers_as_the_flat_one(world):
    settings = build_settings(world, index=str(world / "linked"), coarse_search="hnsw")
    manifest, queries = run_build(check_config(BuildConfig, settings)), make_clusters(9, 16, 5, seed=3)[0][:, :8]
    assert manifest.coarse_search == "hnsw" and manifest.version != open_version(Folder(world / "index")).version
    linked, flat = (open_searcher(str(world / name)).search(queries, 10, probes=3) for name in ("linked", "index"))
    np.testing.assert_allclose(linked.distances, flat.distances, rtol=1e-4)


def test_a_version_of_blocks_holds_the_same_codes_and_is_refined_by_its_vectors(world):
    parts = {"vectors": "float16", "index": str(world / "fast")}
    manifest = run_build(check_config(BuildConfig, build_settings(world, code_layout="fastscan", **parts)))
    plain, queries = open_version(Folder(world / "index")), query_vectors(world)
    assert (manifest.code_layout, plain.code_layout) == ("fastscan", "plain") and manifest.made_by != plain.made_by
    fast, slow = (open_searcher(str(world / name)) for name in ("fast", "index"))
    for one, other in zip(np.array(fast.lists.read()[:2]).T, np.array(slow.lists.read()[:2]).T, strict=True):
        assert np.array_equal(one, other)
    wanted = slow.search(queries, 10, probes=3)
    found = fast.search(queries, 10, probes=3, refine=1)
    spread = np.square(queries - queries.mean(axis=0)).sum(1).mean()
    np.testing.assert_allclose(found.distances, wanted.distances, atol=0.02 * spread)
    tables = [read_codes(Folder(world / "codes"), shard.name, fast.codebook) for shard in manifest.shards]
    ids, vectors = (np.concatenate([getattr(table, name) for table in tables]) for name in ("ids", "vectors"))
    nearest = np.array([[item for _, item in row] for row in search_in_loops(queries[:20], ids, vectors, 10)])
    refined = fast.search(queries[:20], 10, probes=manifest.lists, refine=20)
    assert (refined.ids == nearest).mean() > 0.9


def test_codes_without_vectors_cannot_be_built_with_them(world):
    settings = encode_settings(world) | {"keep_vectors": False, "output": str(world / "codes-alone")}
    run_encode(check_config(EncodeConfig, settings))
    build = build_settings(world, codes=str(world / "codes-alone"), index=str(world / "alone"), vectors="int8")
    with pytest.raises(ConfigError, match=r"vectors: got 'int8', .*keep_vectors=true"):
        run_build(check_config(BuildConfig, build))
    assert not (world / "alone").exists()


def test_composite_codes_are_served_by_look_ups_alone(ray_session, tmp_path):
    write_vectors(tmp_path / "database.parquet", rows=600, seed=2)
    corpus = {"path": str(tmp_path / "database.parquet"), **COLUMNS}
    quantizer = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 4, "residual": False}
    ranked = {"scores": "tables", "rounds": 1, "steps": 10, "last_steps": 20, "batch_rows": 256, "neighbours": 40}
    fitted = {"source": "fitted", "corpus": corpus, "output": str(tmp_path / "codebook"), "lloyd": {"iterations": 5}}
    run_codebook(check_config(CodebookConfig, fitted | {"quantizer": quantizer, "ranked": ranked | {"held_rows": 100}}))
    run_encode(check_config(EncodeConfig, encode_settings(tmp_path) | {"model": None}))
    manifest = run_build(check_config(BuildConfig, build_settings(tmp_path, model=None)))
    codebook = load_codebook(str(tmp_path / "codebook"))
    assert manifest.kind == codebook.kind == "cq"
    tables = [read_codes(Folder(tmp_path / "codes"), shard.name, codebook) for shard in manifest.shards]
    ids = np.concatenate([table.ids for table in tables])
    codes = np.concatenate([codebook.unpack(table.codes) for table in tables])
    decoded = codebook.decode(np.zeros(len(codes), np.int64), codes)
    biases = codebook.bias[np.arange(4), codes].sum(1)
    queries, _ = make_clusters(5, 16, 5, seed=3)
    distances, found = open_searcher(str(tmp_path / "index")).search(queries, 10, probes=4)
    wanted = np.square(queries).sum(1, keepdims=True) - 2 * (queries @ decoded.T + biases)
    np.testing.assert_allclose(distances, np.sort(wanted, axis=1)[:, :10], rtol=1e-3, atol=1e-3)
    place = {int(item): at for at, item in enumerate(ids)}
    mine = [[row[place[int(item)]] for item in items] for row, items in zip(wanted, found, strict=True)]
    np.testing.assert_allclose(mine, distances, rtol=1e-3, atol=1e-3)


def test_a_service_with_an_encoder_takes_raw_items_and_makes_writes_part_of_the_next_version(world, tmp_path):
    shutil.copytree(world / "index", tmp_path / "index")
    raw, _ = make_clusters(100, 16, 5, seed=3)
    vectors, before = query_vectors(world), open_version(Folder(tmp_path / "index")).version
    settings = {"index": str(tmp_path / "index"), "replicas": 2, "port": 0, "encoder": True}
    service = serve(check_config(ServeConfig, settings | {"resources": {"cpus": 0.5}}))
    try:
        with Client(service.url, timeout_s=120) as client:
            found, expected = client.search(items=raw[:5], k=10, probes=8), client.search(vectors[:5], 10, 8)
            assert np.array_equal(found.ids, expected.ids)
            np.testing.assert_allclose(found.distances, expected.distances, atol=1e-4)
            with pytest.raises(QueryError, match=r"items\[1\]"):
                client.search(items=[raw[0], raw[1][:3]])
            client.upsert(range(90_000, 90_005), vectors[:5], {"label": 4})
            client.delete(expected.ids[:, 0].tolist())
            written = client.search(vectors[:5], 5, 8, payload=["label"])
            assert written.ids[:, 0].tolist() == list(range(90_000, 90_005))
            answer = httpx.post(f"{service.url}/v1/compact", timeout=120).json()
            assert answer["served"] != before and answer["seq"] == 2 and client.versions()["new_rows"] == 0
            after = client.search(vectors[:5], 5, 8, where={"label": 4, "id": {"$gte": 90_000}})
            assert sorted(after.ids[0].tolist()) == list(range(90_000, 90_005))
            assert not np.isin(expected.ids[:, 0], client.search(vectors[:5], 50, 8).ids).any()
    finally:
        stop_service()
