"""By what a corpus is encoded: decided once, told truly, obeyed by all workers and by a relaunch."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gsl_dist.artefact import load_codebook
from gsl_dist.cluster import execution
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode
from gsl_dist.cluster.execution import MOST_NOISE, Decision, Way, _choose, open_encoder
from gsl_dist.cluster.model import load_encoder, save_model
from gsl_dist.config import check_config, fingerprint_config
from gsl_dist.data import CorpusConfig, fashion_folder, open_corpus
from gsl_dist.encoders import CnnConfig, make_encoder
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.fit import embed
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray
onnx, _, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
ROWS, SHAPE = 300, (14, 14, 1)


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    """Shipped pictures, a network that nobody trained, and a codebook fitted to what it gives."""
    place = tmp_path_factory.mktemp("execution")
    pq.write_table(pq.read_table(fashion_folder() / "queries.parquet").slice(0, ROWS), place / "corpus.parquet")
    torch.manual_seed(0)
    encoder = {"kind": "cnn", "dim": 16, "channels": [8, 16]}
    network = make_encoder(check_config(CnnConfig, encoder), SHAPE)
    facts = {"item_shape": list(SHAPE)}
    save_model(Folder(place / "model"), network, None, made_by="m", config={"encoder": encoder}, facts=facts)
    quantizer = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 4}
    fitted = {"source": "fitted", "corpus": corpus(place), "model": str(place / "model"), "quantizer": quantizer}
    run_codebook(check_config(CodebookConfig, fitted | {"output": str(place / "codebook")}))
    return place


def corpus(place):
    image = {"height": SHAPE[0], "width": SHAPE[1], "channels": SHAPE[2]}
    return {"path": str(place / "corpus.parquet"), "id_column": "id", "image_column": "image", "image": image}


def settings(world, name, **changes):
    tree = {"corpus": corpus(world), "codebook": str(world / "codebook"), "model": str(world / "model")}
    tree |= {"output": str(world / name), "shards": 3, "keep_vectors": True}
    return check_config(EncodeConfig, tree | changes)


def read(world, name):
    tables = pa.concat_tables(pq.read_table(world / name / f"shard-{n:05d}.parquet") for n in range(3))
    return np.stack(tables["code"].to_numpy()), np.stack(tables["vector"].to_numpy())


def shards(world, name):
    return [(world / name / f"shard-{n:05d}.parquet").read_bytes() for n in range(3)]


def items(world):
    return torch.from_numpy(open_corpus(check_config(CorpusConfig, corpus(world))).read_all().items)


def test_workers_and_a_relaunch_end_with_the_same_bytes(world):
    run_encode(settings(world, "int8", execution="int8"))
    whole = shards(world, "int8")
    run_encode(settings(world, "twin", execution="int8", resources={"workers": 2}, batch_rows=37))
    assert read(world, "twin")[1].tobytes() == read(world, "int8")[1].tobytes()
    for lost in ("codes.json", "shard-00001.note.json"):
        (world / "int8" / lost).unlink()
    before = (world / "int8" / "shard-00000.parquet").stat().st_mtime_ns
    run_encode(settings(world, "int8", execution="int8"))
    assert shards(world, "int8") == whole
    assert (world / "int8" / "shard-00000.parquet").stat().st_mtime_ns == before


@pytest.mark.parametrize("path", ["onnx", "int8"])
def test_vectors_are_what_the_graph_in_the_card_gives_by_plain_onnx_runtime(world, path):
    card = run_encode(settings(world, path, execution=path))
    assert card.facts["encoder_path"].endswith(f"by ONNX Runtime {onnxruntime.__version__}")
    assert card.facts["encoder_path"].startswith("int8" if path == "int8" else "float32")
    assert card.facts["execution"]["graph"]["sha256"] == card.entry("encoder.onnx").sha256
    content = (world / path / "encoder.onnx").read_bytes()
    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert ("QuantizeLinear" in kinds) == (path == "int8")
    given = onnxruntime.InferenceSession(content).run(None, {"items": items(world).numpy()})[0]
    np.testing.assert_allclose(read(world, path)[1], given, atol=1e-3)


def test_codes_agree_with_those_of_torch_as_far_as_the_card_says(world):
    run_encode(settings(world, "torch"))
    codes, vectors = read(world, "torch")
    for path, least in (("onnx", 0.999), ("int8", 0.9)):
        way = run_encode(settings(world, path, execution=path)).facts["execution"]["ways"][path]
        others, other_vectors = read(world, path)
        assert way["equal_codes"] >= least
        assert abs((codes == others).mean() - way["equal_codes"]) < 0.1
        cosines = (vectors * other_vectors.astype(np.float64)).sum(1)
        assert abs(cosines.mean() - way["cosine"]) < 1e-3
        assert way["noise"] <= MOST_NOISE


def test_raw_queries_are_vectors_like_those_that_were_coded(world):
    run_encode(settings(world, "int8", execution="int8"))
    queries_QD = embed(load_encoder(str(world / "model"))[0], items(world)).numpy()
    kept_ND = read(world, "int8")[1].astype(np.float32)
    assert ((queries_QD * kept_ND).sum(1) > 0.995).all()
    nearest = ((queries_QD[:, None] - kept_ND[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == np.arange(ROWS)).mean() > 0.99


def test_the_fastest_is_decided_once_and_workers_do_as_the_note_says(world, monkeypatch):
    ways = {"torch": (100, 0), "onnx": (150, 0), "int8": (500, MOST_NOISE / 2)}
    ways = {path: Way(rows_per_s=rate, cosine=1, noise=noise, equal_codes=1) for path, (rate, noise) in ways.items()}
    monkeypatch.setattr(execution, "_measure_ways", lambda *measured: ways)
    card = run_encode(settings(world, "fastest", execution="fastest"))
    assert card.facts["execution"]["path"] == "int8" and card.facts["encoder_path"].startswith("int8")
    run_encode(settings(world, "int8", execution="int8"))
    assert read(world, "fastest")[1].tobytes() == read(world, "int8")[1].tobytes()

    # Were it measured again, torch would win now.
    ways["torch"] = ways["torch"].model_copy(update={"rows_per_s": 1000})
    (world / "fastest" / "codes.json").unlink()
    (world / "fastest" / "shard-00002.note.json").unlink()
    again = run_encode(settings(world, "fastest", execution="fastest"))
    assert again.facts == card.facts


def test_a_lost_decision_makes_all_shards_anew(world, monkeypatch):
    ways = {path: Way(rows_per_s=1, cosine=1, noise=0, equal_codes=1) for path in ("torch", "onnx", "int8")}
    ways["int8"] = ways["int8"].model_copy(update={"rows_per_s": 9})
    monkeypatch.setattr(execution, "_measure_ways", lambda *measured: ways)
    run_encode(settings(world, "lost", execution="fastest"))
    for lost in ("codes.json", "execution.json", "shard-00001.note.json"):
        (world / "lost" / lost).unlink()
    ways["torch"] = ways["torch"].model_copy(update={"rows_per_s": 1000})
    card = run_encode(settings(world, "lost", execution="fastest"))
    run_encode(settings(world, "torch"))
    assert card.facts["encoder_path"] == "float32" and "encoder.onnx" not in [entry.name for entry in card.files]
    assert read(world, "lost")[1].tobytes() == read(world, "torch")[1].tobytes()


def test_the_fastest_is_the_fastest_of_those_that_are_near_enough_and_worth_it():
    def choose(**ways):
        given = {path: Way(rows_per_s=r, cosine=1, noise=noise, equal_codes=1) for path, (r, noise) in ways.items()}
        return _choose(given)

    assert choose(torch=(100, 0), onnx=(150, 0), int8=(300, 0.01)) == "int8"
    assert choose(torch=(100, 0), onnx=(150, 0), int8=(300, MOST_NOISE * 1.01)) == "onnx"
    assert choose(torch=(100, 0), onnx=(105, 0), int8=(90, 0.01)) == "torch"
    assert choose(torch=(100, 0)) == "torch"


def test_a_real_measurement_tells_rates_of_all_ways_and_picks_among_them(world):
    found = Decision.model_validate(
        run_encode(settings(world, "measured", execution="fastest", shards=1)).facts["execution"]
    )
    assert set(found.ways) == {"torch", "onnx", "int8"}
    assert all(way.rows_per_s > 0 for way in found.ways.values())
    assert found.ways["torch"].noise == 0 and found.ways["torch"].equal_codes == 1
    assert 0 < found.ways["onnx"].noise < 1e-6 < found.ways["int8"].noise
    assert found.path == _choose(found.ways)


def test_codes_by_torch_are_known_by_the_name_that_they_always_had(world):
    config = settings(world, "torch")
    card = run_encode(config)
    left_out = {"output", "resources", "codebook", "model", "batch_rows", "execution"}
    decided = config.model_dump(mode="json", exclude=left_out)
    parts = (open_corpus(config.corpus).fingerprint, load_codebook(config.codebook).fingerprint, "m")
    assert card.made_by == fingerprint_config(decided, *parts)
    assert "execution" not in card.facts and card.facts["encoder_path"] == "float32"


def test_a_choice_where_there_is_none_is_refused(world):
    with pytest.raises(ConfigError, match="execution: got 'int8', but graphs are computed on the CPU"):
        run_encode(settings(world, "none", execution="int8", resources={"gpus": 1}))
    vectors = {"path": str(world / "v.parquet"), "id_column": "id", "vector_column": "vector"}
    rows = pa.FixedSizeListArray.from_arrays(np.zeros(160, np.float32), 16)
    pq.write_table(pa.table({"id": np.arange(10), "vector": rows}), world / "v.parquet")
    with pytest.raises(ConfigError, match="execution: got 'fastest', but without a model nothing is computed"):
        run_encode(settings(world, "none", execution="fastest", corpus=vectors, model=None))
    with pytest.raises(ConfigError, match="execution"):
        settings(world, "none", execution="quickest")


def test_a_worker_with_another_runtime_or_a_damaged_graph_stops(world, monkeypatch):
    config = settings(world, "other", execution="onnx")
    card = run_encode(config)
    decided = Decision.model_validate(card.facts["execution"])
    monkeypatch.setattr(execution, "name_runtime", lambda: "ONNX Runtime 0.1")
    with pytest.raises(ConfigError, match=r"this worker has ONNX Runtime 0\.1, it was decided for ONNX Runtime"):
        open_encoder(Folder(config.output), decided, 1)
    monkeypatch.undo()
    content = (world / "other" / "encoder.onnx").read_bytes()
    (world / "other" / "encoder.onnx").write_bytes(content[:-1] + b"!")
    with pytest.raises(ArtefactError, match=r"encoder\.onnx"):
        ShardEncoder(config, "test")


def test_a_note_holds_what_the_card_tells(world):
    card = run_encode(settings(world, "int8", execution="int8"))
    assert Folder(world / "int8").read_sealed("execution.json") == card.facts["execution"]
