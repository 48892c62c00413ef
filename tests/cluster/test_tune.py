"""The tune stage: curves measured with a version's own shards, kept in its manifest, asked for by recall."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("ray")
from worlds import make_codebook, make_index, make_queries, make_vectors

from gsl_dist.cluster.tune import TuneConfig, find_truth, keep_best, list_probes, run_tune
from gsl_dist.config import check_config
from gsl_dist.errors import ConfigError, QueryError
from gsl_dist.hits import Effort
from gsl_dist.index.manifest import Point, note_points, open_version, verify_version
from gsl_dist.index.search import check_effort, open_searcher
from gsl_dist.storage import Folder


def make_world(folder, *, vectors="float16", metric="l2"):
    manifest = make_index(folder / "index", codebook=make_codebook(metric=metric), vectors=vectors)
    np.save(folder / "queries.npy", make_queries(30))
    np.save(folder / "corpus.npy", make_vectors())
    return manifest


def settings(folder, **changes):
    tree = {"index": str(folder / "index"), "queries": {"path": str(folder / "queries.npy")}, "k": [1, 10]}
    return check_config(TuneConfig, tree | changes)


def rank_by_hand(metric="l2"):
    queries, kept = make_queries(30), make_vectors().astype(np.float16).astype(np.float32)
    far = -queries @ kept.T if metric == "ip" else np.square(queries[:, None] - kept).sum(2)
    return np.argsort(far, axis=1)


def test_the_curve_is_what_searching_gives_and_is_kept_in_the_manifest(tmp_path):
    make_world(tmp_path)
    made = run_tune(settings(tmp_path, output=str(tmp_path / "curve.json"), target=0.9))
    manifest, truth = open_version(Folder(tmp_path / "index")), rank_by_hand()
    assert verify_version(Folder(tmp_path / "index")) == []
    assert [point.model_dump() for point in manifest.points] == made["points"]
    assert json.loads((tmp_path / "curve.json").read_text())["points"] == made["points"]
    searcher = open_searcher(str(tmp_path / "index"))
    for point in manifest.points:
        found = searcher.search(make_queries(30), point.k, probes=point.probes, refine=point.refine).ids
        share = np.mean([len(set(a) & set(b)) / point.k for a, b in zip(found, truth[:, : point.k], strict=True)])
        assert share == pytest.approx(point.recall)
    for k in (1, 10):
        recalls = [point.recall for point in manifest.points if point.k == k]
        assert recalls == sorted(recalls) and len(set(recalls)) == len(recalls)
    # Random codes have nothing to do with the vectors: 32 candidates for a hit are 320 of 400 rows.
    assert made["k"] == 1 and made["reached"] == (made["recall"] >= 0.9)


def test_a_curve_that_is_there_is_kept_until_settings_or_manifest_differ(tmp_path):
    manifest, output = make_world(tmp_path), str(tmp_path / "curve.json")
    told = []

    def run(**changes):
        told.clear()
        return run_tune(settings(tmp_path, output=output, **changes), lambda *step: told.append(step))

    made = run()
    assert told and run() == made and not told
    assert run(sample_queries=20) and told and run(sample_queries=20) and not told
    note_points(Folder(tmp_path / "index"), manifest, [])
    assert run(sample_queries=20) and told
    (tmp_path / "curve.json").write_text("{")
    assert run(sample_queries=20) and told


def test_a_query_by_recall_takes_the_fastest_point_that_reaches_it(tmp_path):
    manifest = make_world(tmp_path)
    points = [(1, 0.5, 1, 1, 0.1), (10, 0.6, 2, 1, 0.2), (10, 0.8, 4, 2, 0.4), (10, 0.95, 8, 8, 0.9)]
    points = [Point(k=k, recall=r, probes=p, refine=f, latency_ms=t) for k, r, p, f, t in points]
    tuned = note_points(Folder(tmp_path / "index"), manifest, points)
    assert open_version(Folder(tmp_path / "index")) == tuned
    for k, recall, wanted in [
        (10, 0.7, (4, 2)),
        (10, 0.6, (2, 1)),
        (5, 0.9, (8, 8)),
        (1, 0.5, (1, 1)),
        (50, 0.7, (4, 2)),
    ]:
        assert check_effort(Effort(k, recall=recall), tuned)[1:3] == wanted
    with pytest.raises(QueryError, match=r"recall: got 0\.99, but the most .* for 10 neighbours is 0\.950"):
        check_effort(Effort(10, recall=0.99), tuned)
    with pytest.raises(QueryError, match="give it without them"):
        check_effort(Effort(10, 3, recall=0.5), tuned)
    with pytest.raises(QueryError, match="run gsl tune"):
        check_effort(Effort(10, recall=0.5), manifest)
    searcher = open_searcher(str(tmp_path / "index"))
    by_recall = searcher.search(make_queries(3), 10, recall=0.8)
    assert np.array_equal(by_recall.ids, searcher.search(make_queries(3), 10, probes=4, refine=2).ids)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_true_neighbours_are_those_of_all_vectors_read_in_pieces(tmp_path, monkeypatch, metric):
    monkeypatch.setattr("gsl_dist.cluster.tune._CHUNK_ROWS", 37)
    make_world(tmp_path, metric=metric)
    searcher = open_searcher(str(tmp_path / "index"))
    kept = find_truth(settings(tmp_path), searcher, make_queries(30)).ids
    assert np.array_equal(kept, rank_by_hand(metric)[:, :10])
    read = find_truth(settings(tmp_path, corpus={"path": str(tmp_path / "corpus.npy")}), searcher, make_queries(30)).ids
    assert np.mean(read == kept) > 0.98, "float16 may turn near ties"


def test_without_vectors_the_corpus_must_be_named(tmp_path):
    make_world(tmp_path, vectors=None)
    with pytest.raises(ConfigError, match=r"corpus: got None, but version v1 keeps no vectors"):
        run_tune(settings(tmp_path))
    made = run_tune(settings(tmp_path, corpus={"path": str(tmp_path / "corpus.npy")}, k=[5]))
    assert {point["refine"] for point in made["points"]} == {1} and made["points"]


def test_numbers_of_lists_to_try_grow_by_about_a_half_up_to_all():
    assert list_probes(1) == [1] and list_probes(2) == [1, 2] and list_probes(10) == [1, 2, 3, 4, 6, 8, 10]
    steps = list_probes(5000)
    assert steps[-1] == 5000 and all(b / a <= 2 for a, b in itertools.pairwise(steps))


def test_only_points_that_nothing_beats_are_kept():
    def make(recall, latency):
        return Point(k=1, recall=recall, probes=1, refine=1, latency_ms=latency)

    kept = keep_best([make(0.5, 3.0), make(0.4, 1.0), make(0.4, 2.0), make(0.9, 5.0), make(0.8, 5.0), make(0.9, 6.0)])
    assert [(point.recall, point.latency_ms) for point in kept] == [(0.4, 1.0), (0.5, 3.0), (0.9, 5.0)]
