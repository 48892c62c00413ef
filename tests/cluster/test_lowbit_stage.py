"""Low-bit encoders by config: trained on workers, resumed, written as codes, and encoded with."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from corpora import make_clusters, write_vectors
from safetensors.numpy import load_file

from gsl_dist.artefact import open_card
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.model import load_encoder
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.fit import embed
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray

STOCHASTIC = {"kind": "binary", "ratios": [0.5, 1.0]}
INCREMENTAL = {"kind": "power", "bits": 5, "ratios": [0.5, 1.0], "epochs": 1}


def settings(tmp_path, name, lowbit, **changes):
    corpus = tmp_path / "train.parquet"
    if not corpus.exists():
        write_vectors(corpus)
    tree = {
        "corpus": {"path": str(corpus), "id_column": "id", "vector_column": "vector", "label_column": "label"},
        "output": str(tmp_path / name),
        "encoder": {"kind": "mlp", "dim": 8, "hidden": [32]},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 3, "cells": 4},
        "fit": {"epochs": 2, "warmup_epochs": 1, "batch_size": 64},
        "lowbit": lowbit,
    }
    return tree | changes


def train(tree, progress=lambda *told: None):
    return run_train(check_config(TrainConfig, tree), progress)


def weights(tmp_path, name):
    return load_file(tmp_path / name / "encoder.safetensors")


@pytest.fixture(scope="module")
def binary(ray_session, tmp_path_factory):
    """A folder with a model of binary weights that two workers trained, its settings, and what was told meanwhile."""
    place, told = tmp_path_factory.mktemp("binary"), []
    tree = settings(place, "model", STOCHASTIC, resources={"workers": 2})
    train(tree, lambda *progress: told.append(progress))
    return place, tree, told


def test_two_workers_write_codes_that_say_their_size_and_encode_as_a_float_network(binary):
    place, tree, told = binary
    card = open_card(Folder(tree["output"]), "model")
    assert [(record["stage"], record["ratio"]) for record in card.facts["history"]] == [(1, 0.5)] * 2 + [(2, 1.0)] * 2
    assert told[-1][:3] == ("snap", 4, 4) and told[-1][3].endswith("stage 2 of 2, 100.0% of the weights low-bit")

    numbers, biases = 16 * 32 + 32 * 8, 32 + 8
    facts = card.facts
    assert facts["encoder_bytes"] == (place / "model" / "encoder.safetensors").stat().st_size
    assert facts["encoder_bytes_float"] == 4 * (numbers + biases)
    assert facts["encoder_bytes_ideal"] == numbers // 8 + 4 * biases

    encoder, _ = load_encoder(tree["output"])
    assert all(len(row.unique()) == 2 for layer in (1, 3) for row in encoder.backbone[layer].weight)
    book = {"source": "trained", "model": tree["output"], "output": str(place / "book")}
    run_codebook(check_config(CodebookConfig, book))
    corpus = {key: value for key, value in tree["corpus"].items() if key != "label_column"}
    shard = {"corpus": corpus, "model": tree["output"], "codebook": book["output"], "output": str(place / "codes")}
    codes = run_encode(check_config(EncodeConfig, shard | {"keep_vectors": True}))
    assert codes.facts["encoder_path"] == "binary weights, decoded to float32 when read"
    table = pq.read_table(place / "codes" / "shard-00000.parquet")
    kept = np.stack(table["vector"].to_numpy())[np.argsort(table["id"].to_numpy())]
    items = torch.from_numpy(make_clusters(600, 16, 5, 0)[0])
    assert np.array_equal(kept, embed(encoder, items).numpy().astype(np.float16))


@pytest.mark.slow
@pytest.mark.parametrize("lowbit", [STOCHASTIC, INCREMENTAL], ids=["stochastic", "incremental"])
def test_a_killed_stage_goes_on_and_ends_as_an_undisturbed_one(ray_session, tmp_path, lowbit):
    def doomed(name, marker):
        # 600 rows in batches of 64 are 9 steps an epoch: step 22 lies in the third, which begins a stage.
        arguments = {"width": 16, "dim": 8, "marker": str(marker), "at_step": 22}
        encoder = {"kind": "module", "target": "doomed:Doomed", "arguments": arguments, "dim": 8}
        return settings(tmp_path, name, lowbit, encoder=encoder, resources={"workers": 2}, max_failures=2)

    spent, marker = tmp_path / "spent", tmp_path / "killed"
    spent.touch()
    train(doomed("undisturbed", spent))
    train(doomed("disturbed", marker))
    assert marker.exists(), "no worker was killed: the test proves nothing"
    wanted, given = weights(tmp_path, "undisturbed"), weights(tmp_path, "disturbed")
    assert set(wanted) == set(given) and any(name.endswith(".codes") for name in wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(array, given[name], atol=1e-5)


def test_a_control_is_written_as_a_float_network(ray_session, tmp_path):
    card = train(settings(tmp_path, "model", INCREMENTAL | {"control": True}))
    assert [record["ratio"] for record in card.facts["history"]] == [0.0, 0.0, 0.5]
    assert "encoder_bytes" not in card.facts and "backbone.1.weight" in weights(tmp_path, "model")


@pytest.mark.parametrize(
    ("lowbit", "named"),
    [
        ({"kind": "binary", "ratios": [0.5]}, r"lowbit: .*ratios \[0\.5\] must be above 0, never fall, and end at 1"),
        ({"kind": "power", "bits": 12}, r"lowbit\.bits"),
        ({"kind": "octal"}, r"lowbit"),
        ({"kind": "binary", "leave": ["backbone.0"]}, r"lowbit\.leave.*backbone\.1, backbone\.3"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(tmp_path, lowbit, named):
    with pytest.raises(ConfigError, match=named):
        train(settings(tmp_path, "model", lowbit))
    assert not (tmp_path / "model").exists()


def test_layers_that_share_weights_are_not_quantized(tmp_path):
    with pytest.raises(ConfigError, match="leave out compress"):
        train(settings(tmp_path, "model", STOCHASTIC, compress={"model": "float", "ratio": 4}))


def test_a_file_whose_codes_were_cut_is_not_read(binary, tmp_path):
    folder = Folder(shutil.copytree(binary[0] / "model", tmp_path / "model"))
    path = tmp_path / "model" / "encoder.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ArtefactError, match=r"encoder\.safetensors"):
        load_encoder(folder.location)
    path.write_bytes(content)
    card = folder.read_sealed("model.json")
    card["config"]["encoder"]["hidden"] = [16]
    folder.write_sealed("model.json", card)
    with pytest.raises(ArtefactError, match="the weights do not fit the network"):
        load_encoder(folder.location)
