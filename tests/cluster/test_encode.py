import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_images, write_vectors

from gsl_dist.cluster import encode
from gsl_dist.cluster.codebook import CodebookConfig, load_codebook, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, group_tables, read_ahead, read_codes, run_encode
from gsl_dist.config import check_config
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray
ROWS = 600


@pytest.fixture
def world(tmp_path):
    """A corpus of vectors and a codebook fitted to it."""
    write_vectors(tmp_path / "corpus.parquet", rows=ROWS)
    corpus = {"path": str(tmp_path / "corpus.parquet"), "id_column": "id", "vector_column": "vector"}
    shape = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 4}
    fitted = {"source": "fitted", "corpus": corpus, "quantizer": shape, "output": str(tmp_path / "codebook")}
    run_codebook(check_config(CodebookConfig, fitted))
    return tmp_path


def settings(world, name="codes", **changes):
    corpus = {"path": str(world / "corpus.parquet"), "id_column": "id", "vector_column": "vector"}
    tree = {
        "corpus": corpus | {"payload_columns": ["label"]},
        "codebook": str(world / "codebook"),
        "output": str(world / name),
        "shards": 3,
        "keep_vectors": True,
    }
    return check_config(EncodeConfig, tree | changes)


def read_all(world, name):
    folder, codebook = Folder(world / name), load_codebook(str(world / "codebook"))
    return [read_codes(folder, f"shard-{n:05d}", codebook) for n in range(3)], codebook


def test_codes_are_nearest_codewords_and_rows_keep_their_payload(ray_session, world):
    card = run_encode(settings(world))
    assert card.facts["rows"] == ROWS
    tables, codebook = read_all(world, "codes")
    source = pq.read_table(world / "corpus.parquet")
    vectors = np.stack(source["vector"].to_numpy())
    assert np.concatenate([table.ids for table in tables]).tolist() == list(range(ROWS))
    assert np.concatenate([table.payload["label"] for table in tables]).tolist() == source["label"].to_pylist()
    cells = np.concatenate([table.cells for table in tables])
    codes = codebook.unpack(np.concatenate([table.codes for table in tables]))
    far = ((vectors[:, None] - codebook.coarse[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(cells, far.argmin(1))
    rests = (vectors - codebook.coarse[cells]).reshape(ROWS, 4, 4)
    nearest = ((rests[:, :, None] - codebook.books[None]) ** 2).sum(-1).argmin(-1)
    assert (nearest == codes).mean() > 0.999
    kept = np.concatenate([table.vectors for table in tables])
    np.testing.assert_array_equal(kept, vectors.astype(np.float16))


def test_workers_and_batches_do_not_change_a_byte(ray_session, world):
    run_encode(settings(world))
    run_encode(settings(world, "again", resources={"workers": 2}, batch_rows=7))
    for shard in range(3):
        tables = [pq.read_table(world / name / f"shard-{shard:05d}.parquet") for name in ("codes", "again")]
        assert tables[0].equals(tables[1])
    first, twin = (settings(world, name, resources={"workers": n}) for name, n in (("codes", 1), ("twin", 2)))
    run_encode(twin)
    for shard in range(3):
        name = f"shard-{shard:05d}.parquet"
        assert (world / "twin" / name).read_bytes() == (world / "codes" / name).read_bytes()
    assert first.codebook == twin.codebook


def test_relaunch_does_only_what_is_missing(ray_session, world):
    run_encode(settings(world))
    folder = world / "codes"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.parquet")}
    (folder / "codes.json").unlink()
    (folder / "shard-00001.note.json").unlink()
    (folder / "shard-00002.parquet").write_bytes(before["shard-00002.parquet"][1][:-9])
    run_encode(settings(world))
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.parquet")}
    assert after["shard-00000.parquet"] == before["shard-00000.parquet"]
    for name in ("shard-00001.parquet", "shard-00002.parquet"):
        assert after[name][1] == before[name][1]
        assert after[name][0] != before[name][0]


def test_unreadable_images_are_counted_and_listed(ray_session, tmp_path):
    write_images(tmp_path / "images.parquet", broken=(3, 17))
    write_vectors(tmp_path / "flat.parquet", rows=300, dim=8)
    corpus = {"path": str(tmp_path / "images.parquet"), "image_column": "image", "label_column": "label"}
    corpus |= {"image": {"height": 8, "width": 8, "channels": 1}, "id_column": "id"}
    from gsl_dist.cluster.train import TrainConfig, run_train

    tree = {
        "corpus": corpus,
        "output": str(tmp_path / "model"),
        "encoder": {"kind": "cnn", "dim": 8, "channels": [8]},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 2, "bits": 2},
        "fit": {"epochs": 2, "warmup_epochs": 1, "batch_size": 16},
    }
    run_train(check_config(TrainConfig, tree))
    own = {"model": str(tmp_path / "model"), "output": str(tmp_path / "codebook")}
    run_codebook(check_config(CodebookConfig, own))
    encode = {"corpus": corpus, "model": own["model"], "codebook": own["output"], "output": str(tmp_path / "codes")}
    card = run_encode(check_config(EncodeConfig, encode))
    assert card.facts["rejects"] == 2
    assert card.facts["rows"] == 38
    listed = json.loads((tmp_path / "codes" / "rejects-00000.json").read_text())
    assert [reject["row"] for reject in listed] == [3, 17]


def test_nan_names_the_row_and_publishes_nothing(ray_session, world):
    vectors = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    vectors[150, 3] = np.nan
    np.save(world / "bad.npy", vectors)
    with pytest.raises(DataError, match="150"):
        run_encode(settings(world, "bad", corpus={"path": str(world / "bad.npy")}))
    assert not (world / "bad" / "codes.json").exists()
    assert not [path for path in (world / "bad").iterdir() if path.name.startswith(".")]


def test_dimension_of_another_codebook_is_refused(ray_session, world):
    np.save(world / "wide.npy", np.zeros((10, 17), np.float32))
    with pytest.raises(ConfigError, match="17 numbers"):
        run_encode(settings(world, "wide", corpus={"path": str(world / "wide.npy")}))


def test_reading_ahead_keeps_order_and_raises_what_the_source_raises():
    def source():
        yield from range(5)
        raise DataError("x", 1, "it must be good")

    taken = []
    with pytest.raises(DataError, match="good"):
        for batch in read_ahead(source()):
            taken.append(batch)
    assert taken == list(range(5))
    assert list(read_ahead(iter(range(20)))) == list(range(20))


@pytest.mark.parametrize("sizes", [[], [3], [4, 4], [4, 4, 1], [1, 2, 3, 4, 5, 6], [20, 1]])
def test_groups_are_large_and_keep_rows_and_order(sizes, monkeypatch):
    monkeypatch.setattr("gsl_dist.cluster.encode._GROUP_ROWS", 8)
    bounds = np.cumsum([0, *sizes])
    schema = pa.schema([("id", pa.int64())], metadata={"a": "b"})
    tables = [pa.table({"id": np.arange(a, b)}, schema=schema) for a, b in itertools.pairwise(bounds)]
    groups = list(group_tables(iter(tables), schema))
    assert pa.concat_tables(groups)["id"].to_pylist() == list(range(sum(sizes)))
    assert all(len(group) >= 8 for group in groups[:-1])
    assert len(groups[-1]) > 0 or len(groups) == 1
    assert groups[0].schema.metadata == schema.metadata


def test_rows_that_wait_for_their_group_share_one_buffer():
    arrays = [np.arange(1000) for _ in range(10)]
    schema = pa.schema([("id", pa.int64())])
    (group,) = group_tables((pa.table({"id": array}, schema=schema) for array in arrays), schema)
    places = [chunk.buffers()[1].address for chunk in group["id"].chunks]
    assert max(places) - min(places) < 2 * sum(array.nbytes for array in arrays)
    assert not any(place == array.ctypes.data for place, array in zip(places, arrays, strict=True))


def test_a_shard_that_is_gone_is_an_error_and_no_fewer_rows(ray_session, world, monkeypatch):
    write = encode._encode_shards

    def lose(*arguments):
        notes = write(*arguments)
        Folder(world / "codes").delete("shard-00000.parquet")
        return notes

    monkeypatch.setattr(encode, "_encode_shards", lose)
    with pytest.raises(ArtefactError, match=r"shard-00000\.parquet: it was written, but is not there any more"):
        run_encode(settings(world))
    assert not Folder(world / "codes").exists("codes.json")
