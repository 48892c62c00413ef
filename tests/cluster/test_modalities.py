"""Items of two modalities through the whole pipeline: trained, encoded, built, asked with both or with one."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from corpora import write_pairs
from PIL import Image
from typer.testing import CliRunner

from gsl_dist.cli import app
from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode
from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate
from gsl_dist.cluster.model import load_encoder, save_model
from gsl_dist.cluster.query import QueryEncoder
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.cluster.train import EpochBatches, TrainConfig, TrainingSet, make_training, plan, run_train
from gsl_dist.config import check_config
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import BadInput, ConfigError, DataError, QueryError
from gsl_dist.fit import embed, fit
from gsl_dist.index.manifest import open_version
from gsl_dist.index.search import open_searcher
from gsl_dist.quantizers import make_quantizer, train_codebook
from gsl_dist.storage import Folder

NAMES = ("image", "edges")


def corpus(path, *, without=(), **changes):
    parts = [{"column": name, "channels": 1} | ({"absent": True} if name in without else {}) for name in NAMES]
    tree = {"path": str(path), "id_column": "id", "image": {"height": 10, "width": 10}, "modalities": parts}
    return {**tree, "label_column": "label", **changes}


def settings(place, name="model", **changes):
    if not (place / "train.parquet").exists():
        write_pairs(place / "train.parquet", rows=200, seed=1)
    encoder = {"kind": "asymfusion", "dim": 8, "channels": [20], **changes.pop("encoder", {})}
    return {
        "corpus": corpus(place / "train.parquet", **changes.pop("corpus", {})),
        "output": str(place / name),
        "encoder": encoder,
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 3, "cells": 4},
        "fit": {"epochs": 4, "warmup_epochs": 1, "batch_size": 50, "learning_rate": 5e-3},
        **changes,
    }


def train_here(place, name="model", **changes):
    """Train in this process and save, as the stage does with one worker."""
    config = check_config(TrainConfig, settings(place, name, **changes))
    read = open_corpus(config.corpus).read_all()
    rows = TrainingSet(read.items, read.labels, [0, 1, 2, 3])
    training = make_training(config, rows)

    def refresh(training):
        y_ND = embed(training.encoder, torch.from_numpy(rows.items))
        quantizer = make_quantizer(config.quantizer, training.encoder.dim)
        return train_codebook(y_ND, quantizer, config.lloyd, seed=0, start=training.codebook)

    fit(training, lambda epoch: EpochBatches(rows, plan(config.fit, rows, epoch), 0, 1), refresh)
    facts = {"item_shape": list(rows.items.shape[1:])}
    dumped = config.model_dump(mode="json")
    save_model(Folder(place / name), training.encoder, training.codebook, made_by="test", config=dumped, facts=facts)
    return training


def picture(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_items_of_two_modalities_are_read_side_by_side_with_a_plane_that_says_which(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", rows=6, lacking={1: "edges", 4: "image"})
    read = open_corpus(check_config(CorpusConfig, corpus(path, partial=True))).read_all()
    assert read.items.shape == (6, 10, 10, 3)
    assert read.items[:, 0, 0, 2].tolist() == [3, 1, 3, 3, 2, 3]
    table = pq.read_table(path)
    for place, name in enumerate(NAMES):
        content = table[name].to_pylist()[0]
        np.testing.assert_array_equal(read.items[0, :, :, place], np.asarray(Image.open(io.BytesIO(content))))
    assert not read.items[1, :, :, 1].any() and not read.items[4, :, :, 0].any()


def test_items_that_lack_a_modality_are_rejects_unless_partial_ones_are_kept(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", rows=6, lacking={1: "edges", 4: "image"})
    read = open_corpus(check_config(CorpusConfig, corpus(path))).read_all()
    assert read.ids.tolist() == [0, 2, 3, 5]
    reasons = [(reject.row, reject.reason) for reject in read.rejects]
    way = "is null (corpus.partial keeps items that lack a modality)"
    assert reasons == [(1, f"edges {way}"), (4, f"image {way}")]
    alone = open_corpus(check_config(CorpusConfig, corpus(path, without=["edges"], partial=True))).read_all()
    assert [reject.reason for reject in alone.rejects] == ["all of its modalities are null"]
    assert alone.items[:, 0, 0, 2].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"modalities": [{"column": "image"}, {"column": "depth"}]}, "corpus.modalities: got 'depth', but the columns"),
        ({"modalities": [{"column": "image"}, {"column": "label"}]}, "corpus.modalities: got .*it must hold binary"),
        ({"image_column": "image"}, "name exactly one of vector_column, image_column and modalities"),
    ],
)
def test_columns_of_modalities_are_checked_when_a_corpus_is_opened(changes, match, tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", rows=3)
    with pytest.raises(DataError, match=match):
        open_corpus(check_config(CorpusConfig, corpus(path) | changes))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_network_of_two_modalities_learns_under_snapping_and_survives_saving(dropout, tmp_path):
    training = train_here(tmp_path, encoder={"modality_dropout": dropout})
    losses = [record.loss for record in training.history]
    assert losses[-1] < 0.7 * losses[0] and training.history[-1].quantization_error < 0.5
    loaded, card = load_encoder(str(tmp_path / "model"))
    items = torch.from_numpy(open_corpus(check_config(CorpusConfig, card.config["corpus"])).read_all().items)
    assert torch.equal(embed(loaded, items), embed(training.encoder, items))


def encode_settings(place, path, model="model", **changes):
    trained = {"model": str(place / model), "output": str(place / f"{model}-codebook")}
    run_codebook(check_config(CodebookConfig, trained))
    return check_config(
        EncodeConfig,
        {
            "corpus": corpus(path, payload_columns=["label"], **changes),
            "model": str(place / model),
            "codebook": str(place / f"{model}-codebook"),
            "output": str(place / f"{model}-codes"),
        },
    )


def test_an_encoder_that_needs_both_refuses_corpora_and_queries_with_one_and_names_the_way_out(tmp_path):
    train_here(tmp_path)
    path = write_pairs(tmp_path / "database.parquet", rows=20, seed=2)
    both = "the encoder fuses image and edges and needs both: train it with encoder.modality_dropout above 0"
    with pytest.raises(ConfigError, match=f"corpus.modalities: got 'edges absent', but {both}"):
        run_encode(encode_settings(tmp_path, path, without=["edges"]))
    with pytest.raises(ConfigError, match=r"corpus.partial: got True, but the encoder needs image and edges"):
        run_encode(encode_settings(tmp_path, path, partial=True))
    turned = [{"column": "edges", "channels": 1}, {"column": "image", "channels": 1}]
    with pytest.raises(ConfigError, match=r"trained on image of 1 channel.*, edges of 1 channel.*: name these in this"):
        run_encode(encode_settings(tmp_path, path, modalities=turned))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"corpus": {"without": ["edges"]}}, "corpus.modalities: got 'edges absent', but training needs items"),
        ({"corpus": {"partial": True}}, "corpus.partial: got True, but items that lack a modality"),
        ({"encoder": {"kind": "cnn", "channels": [4]}}, "encoder.kind: got 'cnn', but items of several modalities"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_anything_starts(changes, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        run_train(check_config(TrainConfig, settings(tmp_path, **changes)))


def test_a_network_of_modalities_has_no_views_by_dropout(tmp_path):
    tree = settings(tmp_path)
    with pytest.raises(ConfigError, match="asymfusion has none"):
        check_config(TrainConfig, tree | {"fit": tree["fit"] | {"views": 2}})


def build_here(place, model="model"):
    """Encode and build without Ray: one shard, by the plain objects of the stages."""
    path = write_pairs(place / "database.parquet", rows=60, seed=2, first=1000, lacking={7: "image"})
    config = encode_settings(place, path, model, partial=True)
    from gsl_dist.cluster.encode import _publish

    encoder = ShardEncoder(config, "test")
    note = encoder.encode_shard(0, 0, 60)
    _publish(config, encoder.codebook, "test", [note], None)
    return encoder, note


def test_a_corpus_some_of_whose_items_lack_one_is_encoded_as_its_vectors_say(tmp_path):
    training = train_here(tmp_path, encoder={"modality_dropout": 0.5})
    encoder, note = build_here(tmp_path)
    assert (note.rows, note.rejects) == (60, 0)
    read = encoder.corpus.read_all()
    y_ND = embed(training.encoder.cpu(), torch.from_numpy(read.items))
    _, codes_NM = encoder.quantizer.encode(y_ND, encoder.codebook)
    stored = pq.read_table(tmp_path / "model-codes" / "shard-00000.parquet")["code"].to_pylist()
    packed = encoder.codebook.pack(codes_NM.numpy())
    assert [list(code) for code in stored] == packed.tolist()


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    """An index over items of two modalities, made by every stage, with an encoder that does with one."""
    place = tmp_path_factory.mktemp("pairs")
    tree = settings(place, encoder={"modality_dropout": 0.3}, resources={"workers": 2, "cpus": 1})
    run_train(check_config(TrainConfig, tree))
    path = write_pairs(place / "database.parquet", rows=150, seed=2, first=1000)
    run_encode(encode_settings(place, path))
    run_build(
        check_config(
            BuildConfig,
            {
                "codes": str(place / "model-codes"),
                "codebook": str(place / "model-codebook"),
                "model": str(place / "model"),
                "index": str(place / "index"),
            },
        )
    )
    write_pairs(place / "queries.parquet", rows=40, seed=3, first=5000)
    return place


@pytest.mark.ray
def test_two_modalities_go_through_the_whole_pipeline_and_are_found_by_both_and_by_one(world):
    found = {}
    for name, without in (("both", ()), ("image", ("edges",)), ("edges", ("image",))):
        tree = {
            "index": str(world / "index"),
            "queries": corpus(world / "queries.parquet", without=without),
            "label_column": "label",
            "output": str(world / f"{name}.json"),
        }
        found[name] = run_evaluate(check_config(EvaluateConfig, tree))["map_coded"]
    assert found["both"] > 0.7, "the image tells two of four classes apart, the edges the other two"
    assert min(found["image"], found["edges"]) > 0.3 and max(found["image"], found["edges"]) < found["both"]


@pytest.mark.ray
def test_the_service_takes_items_by_the_names_of_their_modalities(world):
    manifest = open_version(Folder(world / "index"))
    rows = pq.read_table(world / "queries.parquet").to_pylist()[:3]
    items = [{name: row[name] for name in NAMES} for row in rows] + [{"edges": rows[0]["edges"]}]
    encoder, searcher = QueryEncoder(str(world / "index"), manifest), open_searcher(str(world / "index"))
    local = searcher.search(encoder.encode(items), 5)
    service = serve(check_config(ServeConfig, {"index": str(world / "index"), "port": 0, "encoder": True}))
    try:
        with Client(service.url) as client:
            served = client.search(items=items, k=5)
            np.testing.assert_allclose(served.distances, local.distances, atol=1e-5)
            with pytest.raises(QueryError, match=r"items\[0\]: got \['depth'\], but it must be an object"):
                client.search(items=[{"depth": rows[0]["image"]}])
            with pytest.raises(QueryError, match=r"items\[0\].image.*cannot identify|items\[0\].image: .*not a PNG"):
                client.search(items=[{"image": b"no picture"}])
    finally:
        stop_service()


@pytest.mark.ray
def test_the_command_line_takes_a_file_for_each_modality(world):
    row = pq.read_table(world / "queries.parquet").to_pylist()[0]
    for name in NAMES:
        (world / f"{name}.png").write_bytes(row[name])
    runner, index = CliRunner(), str(world / "index")
    asked = f"image={world}/image.png,edges={world}/edges.png"
    shown = runner.invoke(app, ["search", index, asked, "-k", "5", "--json"])
    manifest = open_version(Folder(index))
    vector = QueryEncoder(index, manifest).encode([{name: row[name] for name in NAMES}])
    assert json.loads(shown.output)["ids"] == open_searcher(index).search(vector, 5).ids.tolist()
    refused = runner.invoke(app, ["search", index, f"image={world}/none.png"])
    assert isinstance(refused.exception, BadInput) and "must be a readable file" in str(refused.exception)


def test_queries_are_files_or_numbers_of_every_modality_that_the_encoder_needs(tmp_path):
    train_here(tmp_path, "index/versions/v1/model")
    encoder, _ = load_encoder(str(tmp_path / "index/versions/v1/model"))
    asked = QueryEncoder(str(tmp_path / "index"), SimpleNamespace(version="v1", dim=8, metric="l2", model=[]))
    draw = np.random.default_rng(0)
    image, edges = draw.integers(0, 255, (2, 10, 10, 1)).astype(np.uint8)
    mixed = asked.encode([{"image": picture(image[:, :, 0]), "edges": edges.tolist()}])
    plane = np.full((10, 10, 1), 3, np.uint8)
    wanted = embed(encoder, torch.from_numpy(np.concatenate([image, edges, plane], 2)[None]))
    np.testing.assert_allclose(mixed, wanted.numpy(), atol=1e-6)
    way = "needs both: give edges too, or train it with encoder.modality_dropout above 0"
    with pytest.raises(QueryError, match=rf"items\[1\].edges: got None, but the encoder fuses .*{way}"):
        asked.encode([{"image": image, "edges": edges}, {"image": image}])
    with pytest.raises(QueryError, match=r"items\[0\]: got 'an item', but it must be an object with a file"):
        asked.encode([picture(image[:, :, 0])])


def test_base64_of_each_modality_is_what_a_request_carries():
    from gsl_dist.service.reading import _read_item

    read = _read_item({"image": base64.b64encode(b"abc").decode(), "edges": [[1, 2]]}, 0)
    assert read["image"] == b"abc" and read["edges"].tolist() == [[1, 2]]
    assert _read_item({"image": None, "edges": [[1, 2]]}, 0).keys() == {"edges"}
    with pytest.raises(QueryError, match=r"items\[4\].edges: .*it must be a file in base64"):
        _read_item({"edges": 3}, 4)
