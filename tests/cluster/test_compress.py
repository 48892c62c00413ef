"""Compression in the train stage: from a trained model to a smaller one, saved and loaded, by any number of workers."""

import numpy as np
import pytest
import torch
from corpora import make_clusters, write_vectors
from safetensors.numpy import load_file

from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder
from gsl_dist.cluster.model import load_encoder, save_model
from gsl_dist.cluster.train import EpochBatches, TrainConfig, TrainingSet, make_training, plan, run_train
from gsl_dist.config import Resources, check_config
from gsl_dist.data import open_corpus
from gsl_dist.errors import ConfigError
from gsl_dist.fit import embed, fit
from gsl_dist.quantizers import make_quantizer, train_codebook
from gsl_dist.storage import Folder


def settings(place, name="small", **changes):
    if not (place / "train.parquet").exists():
        write_vectors(place / "train.parquet")
    tree = {
        "corpus": {
            "path": str(place / "train.parquet"),
            "id_column": "id",
            "vector_column": "vector",
            "label_column": "label",
        },
        "output": str(place / name),
        "encoder": {"kind": "mlp", "dim": 8, "hidden": [24, 24, 24, 24]},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 3, "cells": 4},
        "fit": {"epochs": 4, "warmup_epochs": 1, "batch_size": 60, "learning_rate": 5e-3},
        "compress": {"model": str(place / "model"), "ratio": 2},
    }
    return {key: {**tree[key], **changes.get(key, {})} if isinstance(tree[key], dict) else tree[key] for key in tree}


def train_here(config, *, epochs=None):
    """Train in this process, as the stage does with one worker."""
    read = open_corpus(config.corpus).read_all()
    rows = TrainingSet(read.items, read.labels, sorted(set(read.labels.tolist())))
    training = make_training(config, rows)

    def refresh(training):
        y_ND = embed(training.encoder, torch.from_numpy(rows.items))
        quantizer = make_quantizer(config.quantizer, training.encoder.dim)
        return train_codebook(y_ND, quantizer, config.lloyd, seed=0, start=training.codebook)

    fit(training, lambda epoch: EpochBatches(rows, plan(config.fit, rows, epoch), 0, 1), refresh)
    return training


def keep(place, name, config, training, **facts):
    dumped, facts = config.model_dump(mode="json"), {"item_shape": [16], **facts}
    save_model(Folder(place / name), training.encoder, training.codebook, made_by=name, config=dumped, facts=facts)


@pytest.fixture
def taught(tmp_path):
    """A folder with a trained model to begin with."""
    config = check_config(TrainConfig, {**settings(tmp_path, "model"), "compress": None})
    keep(tmp_path, "model", config, train_here(config))
    return tmp_path


def test_a_compressed_network_learns_under_snapping_and_gives_the_same_after_saving(taught):
    config = check_config(TrainConfig, settings(taught))
    training = train_here(config)
    plan_found = training.further._groups
    from gsl_dist.encoders.crosslayer import plan_compression

    decided = plan_compression(load_encoder(str(taught / "model"))[0], config.compress)
    assert decided.groups == plan_found and decided.after <= decided.before / 2
    keep(taught, "small", config, training, compressed=decided.model_dump(mode="json"))
    loaded, _ = load_encoder(str(taught / "small"))
    vectors = torch.from_numpy(make_clusters(50, 16, 5, seed=9)[0])
    assert torch.equal(embed(loaded, vectors), embed(training.encoder, vectors))
    stored = load_file(taught / "small" / "encoder.safetensors")
    assert sum(array.size for array in stored.values()) == decided.after, "what is shared is stored once"
    sizes = [(taught / name / "encoder.safetensors").stat().st_size for name in ("model", "small")]
    assert sizes[1] < 0.62 * sizes[0]  # names and places of arrays take some of both
    assert training.history[-1].quantization_error is not None


def test_a_compressed_network_encodes_a_corpus_by_the_codebook_it_landed_on(taught):
    config = check_config(TrainConfig, settings(taught))
    training = train_here(config)
    from gsl_dist.encoders.crosslayer import plan_compression

    decided = plan_compression(load_encoder(str(taught / "model"))[0], config.compress)
    keep(taught, "small", config, training, compressed=decided.model_dump(mode="json"))
    own = {"model": str(taught / "small"), "output": str(taught / "codebook")}
    run_codebook(check_config(CodebookConfig, own))
    corpus = {"path": str(taught / "train.parquet"), "id_column": "id", "vector_column": "vector"}
    tree = {**own, "corpus": corpus, "codebook": own["output"], "output": str(taught / "codes")}
    encoder = ShardEncoder(check_config(EncodeConfig, tree), "test")
    batch = encoder.corpus.read_all()
    coded = encoder.encode_batch(batch)
    y_ND = embed(training.encoder, torch.from_numpy(batch.items))
    cells_N, _ = encoder.quantizer.encode(y_ND, training.codebook)
    assert coded["cell"].to_numpy().tolist() == cells_N.tolist()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compress": {"ratio": 40}}, r"compress.ratio: got 40.0, but layers that cannot share hold .*backbone"),
        ({"encoder": {"hidden": [24, 24]}}, "encoder: got .*it must be the encoder of compress.model"),
        ({"encoder": {"hidden": [24, 24, 24, 23]}}, "encoder: got .*it must be the encoder of compress.model"),
    ],
)
def test_what_cannot_be_compressed_is_refused_before_anything_starts(taught, changes, match):
    with pytest.raises(ConfigError, match=match):
        run_train(check_config(TrainConfig, settings(taught, **changes)))


def test_a_compressed_network_is_not_compressed_again(taught):
    config = check_config(TrainConfig, {**settings(taught, "model"), "compress": None})
    keep(taught, "model", config, train_here(config), compressed={"groups": [], "before": 0, "after": 0})
    with pytest.raises(ConfigError, match=r"compress.model: .*it is compressed already"):
        run_train(check_config(TrainConfig, settings(taught)))


@pytest.mark.ray
def test_two_workers_compress_as_one_does(ray_session, taught):
    config = check_config(TrainConfig, settings(taught, "both", compress={"preserve": {"level": "both"}}))
    here = train_here(config)
    card = run_train(config.model_copy(update={"resources": Resources(workers=2)}))
    assert card.facts["compressed"]["after"] <= card.facts["compressed"]["before"] / 2
    keep(taught, "here", config, here, compressed=card.facts["compressed"])
    one, two = (load_file(taught / name / "encoder.safetensors") for name in ("here", "both"))
    assert "commons.0" in one and set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-3)
    loaded, _ = load_encoder(str(taught / "both"))
    assert torch.isfinite(embed(loaded, torch.zeros(2, 16))).all()
