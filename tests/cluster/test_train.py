import numpy as np
import pytest
from corpora import write_vectors
from safetensors.numpy import load_file

from gsl_dist.cluster.model import load_encoder, load_trained_codebook
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.errors import ConfigError, DataError
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray


def settings(tmp_path, name="model", **changes):
    corpus = tmp_path / "train.parquet"
    if not corpus.exists():
        write_vectors(corpus)
    tree = {
        "corpus": {"path": str(corpus), "id_column": "id", "vector_column": "vector", "label_column": "label"},
        "output": str(tmp_path / name),
        "encoder": {"kind": "mlp", "dim": 8, "hidden": [32]},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 3, "cells": 4},
        "fit": {"epochs": 4, "warmup_epochs": 1, "batch_size": 64},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return tree


def train(tree):
    return run_train(check_config(TrainConfig, tree))


def weights(tmp_path, name):
    return load_file(tmp_path / name / "encoder.safetensors")


def test_two_workers_train_what_one_does(ray_session, tmp_path):
    for workers in (1, 2):
        card = train(settings(tmp_path, f"model{workers}", resources={"workers": workers}))
        assert [record["phase"] for record in card.facts["history"]] == ["warm-up", "snap", "snap", "snap"]
    one, two = weights(tmp_path, "model1"), weights(tmp_path, "model2")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-4)
    books = [load_trained_codebook(str(tmp_path / name)) for name in ("model1", "model2")]
    np.testing.assert_allclose(books[0].books, books[1].books, atol=2e-3)
    np.testing.assert_allclose(books[0].coarse, books[1].coarse, atol=2e-3)


def test_run_with_killed_worker_ends_as_undisturbed_one(ray_session, tmp_path):
    def doomed(name, marker):
        # 600 rows in batches of 64 are 9 steps an epoch: step 22 lies in the third.
        arguments = {"width": 16, "dim": 8, "marker": str(marker), "at_step": 22}
        encoder = {"kind": "module", "target": "doomed:Doomed", "arguments": arguments, "dim": 8}
        tree = settings(tmp_path, name, resources={"workers": 2}, max_failures=2)
        return {**tree, "encoder": encoder}

    spent = tmp_path / "spent"
    spent.touch()
    train(doomed("undisturbed", spent))
    marker = tmp_path / "killed"
    train(doomed("disturbed", marker))
    assert marker.exists(), "no worker was killed: the test proves nothing"
    for name, array in weights(tmp_path, "undisturbed").items():
        np.testing.assert_allclose(array, weights(tmp_path, "disturbed")[name], atol=1e-5)
    books = [load_trained_codebook(str(tmp_path / name)).books for name in ("undisturbed", "disturbed")]
    np.testing.assert_allclose(books[0], books[1], atol=1e-4)


def test_finished_work_is_not_done_again_nor_overwritten(ray_session, tmp_path):
    tree = settings(tmp_path)
    first = train(tree)
    stamp = (tmp_path / "model" / "encoder.safetensors").stat().st_mtime_ns
    assert train(settings(tmp_path, resources={"workers": 2})) == first
    assert (tmp_path / "model" / "encoder.safetensors").stat().st_mtime_ns == stamp
    assert not (tmp_path / "model" / "runs").exists()
    with pytest.raises(ConfigError, match="output"):
        train(settings(tmp_path, fit={"seed": 1}))
    encoder, card = load_encoder(tree["output"])
    assert encoder.dim == 8
    assert (
        card.facts["codebook_fingerprint"] == Codebook.load(Folder(tree["output"]), "codebook.safetensors").fingerprint
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"corpus": {"label_column": None}}, "label_column"),
        ({"corpus": {"label_column": "nolabel"}}, "nolabel"),
        ({"quantizer": {"kind": "pq", "sub_vectors": 3}}, "quantizer.sub_vectors"),
        ({"encoder": {"kind": "cnn", "hidden": None}}, "encoder"),
        ({"fit": {"batch_size": 1000}}, "fit.batch_size"),
        ({"fit": {"batch_size": 65}, "resources": {"workers": 2}}, "fit.batch_size"),
        ({"fit": {"warmup_epochs": 9}}, "warmup_epochs"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(ray_session, tmp_path, changes, named):
    with pytest.raises((ConfigError, DataError), match=named):
        train(settings(tmp_path, **changes))
    assert not (tmp_path / "model").exists()


def test_one_class_is_refused(ray_session, tmp_path):
    write_vectors(tmp_path / "train.parquet", classes=1)
    with pytest.raises(DataError, match="two classes"):
        train(settings(tmp_path))


def test_fewer_rows_than_codewords_are_refused(ray_session, tmp_path):
    write_vectors(tmp_path / "train.parquet", rows=100)
    with pytest.raises(DataError, match="256"):
        train(settings(tmp_path, quantizer={"bits": 8}))


def test_divergence_is_told_and_not_retried(ray_session, tmp_path):
    with pytest.raises(Exception, match="diverged in epoch"):
        train(settings(tmp_path, fit={"learning_rate": 1e30}, encoder={"normalize": False}, loss={"kind": "pairwise"}))
    assert not (tmp_path / "model" / "model.json").exists()
