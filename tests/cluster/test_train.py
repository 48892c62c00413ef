import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import read_pictures, write_images, write_vectors
from safetensors.numpy import load_file

from gsl_dist.artefact import open_card
from gsl_dist.cluster.model import load_encoder, load_trained_codebook
from gsl_dist.cluster.train import EpochBatches, TrainConfig, mine_rows, run_train
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.encoders import HeadConfig, make_encoder
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.fit import Diverged, embed
from gsl_dist.losses import NeighbourConfig, level_rows
from gsl_dist.quantizers import LloydConfig, ProductConfig, make_quantizer, train_codebook
from gsl_dist.ranked import find_neighbours, measure_recall
from gsl_dist.sampling import plan_neighbours
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


def write_plain(path, vectors):
    """Write vectors as somebody's model gave them: no labels."""
    flat = pa.array(np.asarray(vectors, dtype=np.float32).ravel())
    table = {"id": np.arange(len(vectors)), "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    pq.write_table(pa.table(table), path)


def unlabelled(tmp_path, name="model", **changes):
    """Give settings for the same vectors without labels: a head, and the loss of neighbours."""
    alone = {
        "corpus": {"label_column": None},
        "encoder": {"kind": "head", "dim": 8, "hidden": [32]},
        "loss": {"kind": "neighbours", "neighbours": 100},
        "fit": {"epochs": 4, "warmup_epochs": 1, "batch_size": 128, "learning_rate": 1e-3},
    }
    tree = settings(tmp_path, name) | {key: alone[key] for key in ("encoder", "loss", "fit")}
    tree["corpus"] = tree["corpus"] | alone["corpus"]
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return tree


def train(tree):
    return run_train(check_config(TrainConfig, tree))


def weights(tmp_path, name):
    return load_file(tmp_path / name / "encoder.safetensors")


@pytest.fixture(scope="module")
def alone(ray_session, tmp_path_factory):
    """A folder with the model that one worker trains."""
    place = tmp_path_factory.mktemp("alone")
    train(settings(place))
    return place


def test_two_workers_train_what_one_does(alone):
    for name, workers in (("model", 1), ("other", 2)):
        card = train(settings(alone, name, resources={"workers": workers}))
        assert [record["phase"] for record in card.facts["history"]] == ["warm-up", "snap", "snap", "snap"]
    one, two = weights(alone, "model"), weights(alone, "other")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-4)
    books = [load_trained_codebook(str(alone / name)) for name in ("model", "other")]
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


def test_finished_work_is_not_done_again_nor_overwritten(alone):
    tree, first = settings(alone), open_card(Folder(alone / "model"), "model")
    stamp = (alone / "model" / "encoder.safetensors").stat().st_mtime_ns
    assert train(settings(alone, resources={"workers": 2})) == first
    assert (alone / "model" / "encoder.safetensors").stat().st_mtime_ns == stamp
    assert not (alone / "model" / "runs").exists()
    with pytest.raises(ConfigError, match="output"):
        train(settings(alone, fit={"seed": 1}))
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


def test_codewords_that_are_given_cannot_be_landed_on(tmp_path):
    with pytest.raises(ConfigError, match="rabitq has no codewords to land on"):
        check_config(TrainConfig, settings(tmp_path) | {"quantizer": {"kind": "rabitq"}})


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


@pytest.fixture(scope="module")
def diverged(ray_session, tmp_path_factory):
    """Settings of a training that diverged, and how that was told."""
    # 9 steps an epoch: step 22 lies in the third, which is called 2.
    arguments = {"width": 16, "dim": 8, "at_step": 22}
    encoder = {"kind": "module", "target": "doomed:Poisoned", "arguments": arguments, "dim": 8}
    tree = {**settings(tmp_path_factory.mktemp("diverged")), "encoder": encoder}
    with pytest.raises(Diverged) as error:
        train(tree)
    return tree, error.value


def test_divergence_names_the_last_good_checkpoint(diverged):
    _, error = diverged
    assert re.search(r"diverged in epoch 2.* last good state is that of epoch 1, kept in ", str(error))
    state = torch.load(Path(error.checkpoint) / "state.pt", weights_only=True)
    assert [record["epoch"] for record in state["history"]] == [0, 1]


@pytest.mark.parametrize(
    "name", ["state.pt", pytest.param("state.json", marks=pytest.mark.slow), "checkpoint_manager_snapshot.json"]
)
def test_a_damaged_checkpoint_is_named_and_never_gone_on_from(diverged, name):
    tree, error = diverged
    place = Path(error.checkpoint)
    path = next(folder / name for folder in (place, place.parent) if (folder / name).exists())
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 0x80
    path.write_bytes(damaged)
    with pytest.raises(ArtefactError, match=name):
        train(tree)
    path.write_bytes(whole)


TAUGHT = {"rounds": 0, "last_steps": 30, "learning_rate": 3e-3, "batch_rows": 128}


TEACHABLE = {"fit": {"views": 3}, "quantizer": {"residual": False}, "encoder": {"dropout": 0.3}}


@pytest.fixture(scope="module")
def untaught(ray_session, tmp_path_factory):
    """A folder with a model whose codebook could be taught, and was not."""
    place = tmp_path_factory.mktemp("untaught")
    train(settings(place, **TEACHABLE))
    return place


@pytest.mark.parametrize("scores", ["exact", pytest.param("tables", marks=pytest.mark.slow)])
def test_the_landing_of_a_taught_codebook_is_the_one_the_network_landed_on(untaught, scores):
    card = train(settings(untaught, scores, ranked=TAUGHT | {"scores": scores}, **TEACHABLE))
    plain, taught = (load_trained_codebook(str(untaught / name)) for name in ("model", scores))
    one, other = weights(untaught, "model"), weights(untaught, scores)
    assert all(np.array_equal(one[name], other[name]) for name in one) and card.kind == "model"
    if scores == "exact":
        assert np.array_equal(taught.landing, plain.books) and not np.array_equal(taught.books, plain.books)
    else:
        assert taught.kind == "cq" and taught.landing_bias.shape == plain.books.shape[:2]
        # Spread over the whole length, the product codewords lie in blocks.
        assert np.array_equal(taught.landing[0, :, :4], plain.books[0]) and not taught.landing[0, :, 4:].any()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"snap": {"variant": "none"}, "fit": {"views": 2}}, "snap.variant may not be none"),
        ({}, "fit.views must be at least 2"),
        ({"fit": {"views": 2}, "ranked": TAUGHT | {"scores": "tables"}}, "quantizer.residual must be false"),
    ],
)
def test_what_cannot_be_taught_is_refused(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        check_config(TrainConfig, settings(tmp_path, **({"ranked": TAUGHT} | changes)))


def test_codes_of_unlabelled_vectors_find_more_of_their_neighbours_than_at_the_start(ray_session, tmp_path):
    pictures = torch.from_numpy(read_pictures(3500, 64).astype(np.float32))
    x, queries = pictures[:3000], pictures[3000:]
    write_plain(tmp_path / "train.parquet", x.numpy())
    quantizer = {"kind": "pq", "sub_vectors": 4, "bits": 6, "cells": 1}
    fitting = {"epochs": 12, "warmup_epochs": 2, "batch_size": 512, "learning_rate": 2e-3}
    card = train(unlabelled(tmp_path, encoder={"dim": 16}, quantizer=quantizer, fit=fitting))
    assert (card.facts["rows"], card.facts["classes"]) == (3000, [])

    def recall(encoder, codebook):
        truth = find_neighbours(x, 10, queries_QD=queries)
        return measure_recall(embed(encoder, x), embed(encoder, queries), truth, codebook)

    start = make_encoder(HeadConfig(kind="head", dim=16), (64,))
    start.backbone.start_from(x)
    shape = make_quantizer(ProductConfig.model_validate(quantizer), 16)
    before = recall(start, train_codebook(embed(start, x), shape, LloydConfig(iterations=60)).codebook)
    model = str(tmp_path / "model")
    after = recall(load_encoder(model)[0], load_trained_codebook(model))
    assert after > before + 0.01


def test_two_workers_train_the_head_that_one_does_whether_or_not_there_are_labels(ray_session, tmp_path):
    for workers, column in ((1, None), (2, "label")):
        corpus, few = {"label_column": column}, {"epochs": 3}
        train(unlabelled(tmp_path, f"model{workers}", corpus=corpus, fit=few, resources={"workers": workers}))
    one, two = weights(tmp_path, "model1"), weights(tmp_path, "model2")
    assert "backbone.linear.weight" in one and "backbone.scale" in one
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-4)
    books = [load_trained_codebook(str(tmp_path / name)).books for name in ("model1", "model2")]
    np.testing.assert_allclose(*books, atol=2e-3)


def test_rows_beyond_the_sample_are_not_learned_from_and_batches_say_which_row_is_which():
    items = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
    rows = mine_rows(items, NeighbourConfig(kind="neighbours", neighbours=50, sample_rows=300))
    assert len(rows.items) == 1000 and len(rows.learned) == 300 and rows.near.shape == (300, 50)
    sample = items[rows.learned]
    nearest = np.square(sample[:, None] - sample).sum(2).argsort(1)[:, 1:51]
    assert np.mean(rows.near == nearest) > 0.999
    plan = rows.learned[plan_neighbours(rows.mined.near_Nk, 64, seed=0, epoch=0)]
    for drawn, numbers in EpochBatches(rows, plan, 0, 1):
        np.testing.assert_array_equal(drawn, sample[numbers])
        torch.testing.assert_close(level_rows(drawn), level_rows(rows.mined.x_ND[numbers]), atol=1e-5, rtol=1e-5)


def test_a_corpus_of_copies_is_refused():
    rng = np.random.default_rng(0)
    apart, copies = rng.normal(size=(400, 6)), np.repeat(rng.normal(size=(20, 6)), 30, axis=0)
    loss = NeighbourConfig(kind="neighbours", neighbours=50)
    for items, share in ((np.ones((300, 6)), "100%"), (np.concatenate([apart, copies]), "60%")):
        with pytest.raises(DataError, match=f"corpus: got '{share} copies', but most rows must have neighbours"):
            mine_rows(items.astype(np.float32), loss)
    mine_rows(np.concatenate([apart, copies[:300]]).astype(np.float32), loss)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": {"neighbours": 600}}, "600 neighbours of each .* more are needed"),
        ({"loss": {"neighbours": 600, "sample_rows": 500}}, "sample_rows"),
        ({"encoder": {"dim": 17}}, r"encoder\.dim.*16"),
        ({"loss": {"kind": "proxy", "neighbours": None}}, "loss"),
        ({"fit": {"batch_size": 32}}, r"fit\.batch_size"),
        ({"fit": {"samples_per_class": 4}}, r"fit\.samples_per_class"),
        ({"fit": {"batch_size": 129}, "resources": {"workers": 2}}, r"fit\.batch_size"),
    ],
)
def test_bad_settings_of_neighbours_are_refused_and_nothing_is_written(tmp_path, changes, named):
    with pytest.raises((ConfigError, DataError), match=named):
        train(unlabelled(tmp_path, **changes))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, r"loss\.kind.*holds images"),
        ({"loss": {"kind": "proxy"}}, r"encoder\.kind.*it takes vectors"),
    ],
)
def test_images_have_no_neighbours_and_take_no_head(tmp_path, changes, named):
    write_images(tmp_path / "train.parquet", rows=300)
    tree = unlabelled(tmp_path) | changes
    image = {"height": 8, "width": 8, "channels": 1}
    tree["corpus"] = tree["corpus"] | {"vector_column": None, "image_column": "image", "image": image}
    tree["corpus"] |= {"label_column": "label"}
    with pytest.raises(ConfigError, match=named):
        train(tree)
