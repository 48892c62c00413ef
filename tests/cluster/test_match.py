"""The match stage: every query's nearest items as Parquet, joins of a version with itself, groups, and relaunches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")
pytest.importorskip("faiss")
from corpora import write_images
from pydantic import TypeAdapter
from reference import connect_in_loops
from worlds import make_codebook, make_index, make_queries, make_vectors

from gsl_dist.artefact import open_card
from gsl_dist.cluster.evaluate import embed_queries
from gsl_dist.cluster.match import MatchConfig, Matcher, open_queries, run_match, settle_task
from gsl_dist.cluster.model import save_model
from gsl_dist.config import check_config
from gsl_dist.data import CorpusConfig, open_corpus, split_rows
from gsl_dist.encoders import EncoderConfig, make_encoder
from gsl_dist.errors import BadInput, ConfigError, DataError, QueryError
from gsl_dist.hits import FAR
from gsl_dist.index.manifest import (
    Point,
    note_points,
    open_version,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder

PAYLOAD = pa.table({"label": np.arange(400) % 5})
QUERIES, IDS = make_queries(50), np.arange(50) * 3 + 7


def make_world(place, **settings):
    """A version of 400 items that keeps vectors, and 50 queries as a Parquet file."""
    make_index(place / "index", **{"vectors": "float16", "payload": PAYLOAD} | settings)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(QUERIES.ravel()), 16)
    pq.write_table(pa.table({"key": IDS, "vector": vectors}), place / "queries.parquet")
    return place


def settle(place, **changes):
    corpus = {"path": str(place / "queries.parquet"), "id_column": "key", "vector_column": "vector"}
    tree = {"index": str(place / "index"), "queries": corpus, "output": str(place / "match"), "shards": 3}
    return check_config(MatchConfig, tree | changes)


def settle_own(place, **changes):
    return settle(place, queries=None, **changes)


def read_answers(place, name="match"):
    """The answers of all files, as query ids, ids and distances."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((place / name).glob("shard-*.parquet"))])
    ids, distances = (np.array(table[column].to_pylist()) for column in ("ids", "distances"))
    return table["query_id"].to_numpy(), ids, distances.astype(np.float32)


def settle_here(config):
    manifest = open_version(Folder(config.index), config.version)
    return settle_task(config, manifest, open_queries(config, manifest))


def match_here(config):
    """Run all shards of a match in this process, without Ray, and give the notes."""
    matcher = Matcher(settle_here(config))
    ranges = split_rows(matcher.queries.rows, config.shards)
    return [matcher.match_shard(number, *ends) for number, ends in enumerate(ranges)]


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("match"))


@pytest.mark.ray
def test_a_match_is_what_the_searcher_answers_and_its_card_pins_every_file(world):
    card = run_match(settle(world, output=str(world / "usual"), k=7, probes=3))
    ids, found, distances = read_answers(world, "usual")
    wanted = open_searcher(str(world / "index")).search(QUERIES, 7, probes=3)
    np.testing.assert_array_equal(ids, IDS)
    np.testing.assert_array_equal(found, wanted.ids)
    np.testing.assert_allclose(distances, wanted.distances, rtol=1e-4, atol=1e-4)
    assert open_card(Folder(world / "usual"), "match") == card
    facts = {name: card.facts[name] for name in ("rows", "hits", "full", "rejects", "version", "k", "probes", "refine")}
    assert facts == dict(rows=50, hits=350, full=50, rejects=0, version="v1", k=7, probes=3, refine=4)
    assert [shard["rows"] for shard in card.facts["shards"]] == [16, 17, 17]
    assert [entry.name for entry in card.files] == [f"shard-{number:05d}.parquet" for number in range(3)]
    assert run_match(settle(world, output=str(world / "usual"), k=7, probes=3)) == card


@pytest.mark.ray
def test_one_worker_equals_two_and_a_relaunch_after_a_crash_a_clean_run(world, monkeypatch):
    clean = run_match(settle(world, output=str(world / "clean")))
    twin = run_match(settle(world, output=str(world / "twin"), resources={"workers": 2}))
    torn = settle(world, output=str(world / "torn"))
    matcher = Matcher(settle_here(torn))
    first = matcher.match_shard(0, 0, 16)
    (world / "torn" / "shard-00001.parquet").write_bytes(b"half of it")
    monkeypatch.setattr("gsl_dist.cluster.match.make_table", lambda *given: pytest.fail("the process falls here"))
    with pytest.raises(pytest.fail.Exception):
        matcher.match_shard(2, 33, 50)
    assert not list((world / "torn").glob(".*")) and not (world / "torn" / "match.json").exists()
    kept = (world / "torn" / "shard-00000.parquet").stat().st_mtime_ns
    again = run_match(torn)
    assert (world / "torn" / "shard-00000.parquet").stat().st_mtime_ns == kept and first.file in again.files
    assert clean.files == twin.files == again.files and clean.made_by == twin.made_by == again.made_by
    for entry in clean.files:
        contents = {(world / name / entry.name).read_bytes() for name in ("clean", "twin", "torn")}
        assert len(contents) == 1


@pytest.mark.ray
def test_groups_are_the_connected_components_of_near_pairs(ray_session, tmp_path):
    make_world(tmp_path)
    config = settle_own(tmp_path, exact=True, within=9.0, groups=True, k=50, form="rows")
    card = run_match(config)
    kept = make_vectors().astype(np.float16).astype(np.float32)
    near = np.argwhere(np.square(kept[:, None] - kept).sum(2) <= 9.0)
    wanted = connect_in_loops([(one, other) for one, other in near.tolist() if one != other])
    table = pq.read_table(tmp_path / "match" / "groups.parquet")
    assert dict(zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True)) == wanted
    assert (card.facts["groups"], card.facts["grouped"]) == (len(set(wanted.values())), len(wanted))
    assert card.facts["hits"] == sum(one != other for one, other in near.tolist()) and card.facts["full"] == 0
    assert 1 < len(set(wanted.values())) < len(wanted) < 400
    assert card.entry("groups.parquet") == Folder(tmp_path / "match").pin("groups.parquet")
    before = (tmp_path / "match" / "groups.parquet").read_bytes()
    (tmp_path / "match" / "match.json").unlink()
    assert run_match(config) == card and (tmp_path / "match" / "groups.parquet").read_bytes() == before


@pytest.mark.ray
def test_what_a_worker_refuses_is_told_as_ours(world):
    with pytest.raises(QueryError, match=r"where\.label"):
        run_match(settle(world, output=str(world / "bad"), where={"label": "three"}))
    assert not (world / "bad" / "match.json").exists()


def test_the_order_of_lists_passes_and_batches_change_no_neighbour(tmp_path, monkeypatch):
    make_world(tmp_path)
    wanted = open_searcher(str(tmp_path / "index")).search(QUERIES, 10, probes=4)
    monkeypatch.setattr("gsl_dist.cluster.asked._READ_ROWS", 6)
    for number, changes in enumerate([{"order": "lists"}, {"order": "queries"}, {"batch_rows": 7}]):
        match_here(settle(tmp_path, output=str(tmp_path / f"match-{number}"), probes=4, **changes))
        np.testing.assert_array_equal(read_answers(tmp_path, f"match-{number}")[1], wanted.ids)
    # As if a batch left room for a shard alone.
    [shard, *_] = open_version(Folder(tmp_path / "index")).shards
    monkeypatch.setattr("gsl_dist.cluster.match.measure_batch", lambda *given: (64 << 20) - 3 * shard.index.bytes)
    small = settle(tmp_path, output=str(tmp_path / "small"), probes=4, memory_mb=64)
    assert settle_here(small).passes == [["shard-00000"], ["shard-00001"], ["shard-00002"]]
    match_here(small)
    np.testing.assert_array_equal(read_answers(tmp_path, "small")[1], wanted.ids)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("is_exact", [False, True])
def test_hits_lie_within_what_was_asked_in_the_terms_of_the_metric(tmp_path, metric, is_exact):
    make_world(tmp_path, codebook=make_codebook(metric=metric))
    searcher = open_searcher(str(tmp_path / "index"))
    wanted = searcher.search(QUERIES, 10, probes=8, refine=40)
    within = float(np.median(wanted.distances))
    effort = {"exact": True} if is_exact else {"probes": 8, "refine": 40}
    notes = match_here(settle(tmp_path, within=within, **effort))
    _, ids, distances = read_answers(tmp_path)
    is_near = wanted.distances <= within if metric == "l2" else wanted.distances >= within
    np.testing.assert_array_equal(ids, np.where(is_near, wanted.ids, -1))
    np.testing.assert_allclose(distances[is_near], wanted.distances[is_near], rtol=1e-4, atol=1e-5)
    assert (distances[~is_near] == (FAR if metric == "l2" else -FAR)).all()
    assert (
        sum(note.hits for note in notes) == is_near.sum() and sum(note.full for note in notes) == is_near[:, -1].sum()
    )


def test_filters_and_recall_are_those_of_a_search(tmp_path):
    make_world(tmp_path)
    manifest = open_version(Folder(tmp_path / "index"))
    points = [Point(k=10, recall=share, probes=p, refine=2, latency_ms=p) for share, p in ((0.5, 2), (0.9, 5))]
    note_points(Folder(tmp_path / "index"), manifest, points)
    searcher = open_searcher(str(tmp_path / "index"))
    for asked in ({"where": {"label": {"$gte": 2}}}, {"recall": 0.8}):
        match_here(settle(tmp_path, **asked))
        np.testing.assert_array_equal(read_answers(tmp_path)[1], searcher.search(QUERIES, 10, **asked).ids)
    match_here(settle(tmp_path, exact=True, where={"label": 3}))
    assert (read_answers(tmp_path)[1] % 5 == 3).all()


@pytest.mark.parametrize("keeps", ["float16", "int8", None])
def test_own_items_find_others_by_their_vectors_or_by_what_codes_stand_for(tmp_path, keeps):
    make_world(tmp_path, vectors=keeps)
    searcher = open_searcher(str(tmp_path / "index"))
    ids, cells, codes = searcher.lists.read()
    own = searcher.codebook.decode(cells, searcher.codebook.unpack(codes))[np.argsort(ids)]
    if keeps:
        own = np.concatenate([store.read(np.arange(len(store.ids_N))) for store in searcher.stores])
    match_here(settle_own(tmp_path, k=4, probes=8, refine=1))
    asked, found, _ = read_answers(tmp_path)
    wanted = searcher.search(own, 5, probes=8, refine=1).ids
    np.testing.assert_array_equal(asked, np.arange(400))
    others = [[item for item in row if item != own_id][:4] for own_id, row in enumerate(wanted.tolist())]
    assert found.tolist() == others


@pytest.mark.parametrize("kind", ["vlq", "rq", "rabitq", "cq"])
def test_versions_of_other_kinds_are_joined_with_themselves(tmp_path, kind):
    make_world(tmp_path, vectors=None, codebook=make_codebook(kind, residual=kind != "cq"))
    [note] = match_here(settle_own(tmp_path, k=3, shards=1))
    asked, found, _ = read_answers(tmp_path)
    assert note.rows == 400 and not (found == asked[:, None]).any() and (found[:, 0] >= 0).mean() > 0.9


def test_rows_are_written_for_hits_alone(tmp_path):
    make_world(tmp_path)
    match_here(settle(tmp_path, exact=True, k=6))
    _, ids, _ = read_answers(tmp_path)
    near = settle(tmp_path, exact=True, k=6, form="rows", within=12.0, output=str(tmp_path / "rows"))
    notes = match_here(near)
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "rows").glob("*.parquet"))])
    assert len(table) == sum(note.hits for note in notes) > 0
    for row in table.to_pylist():
        place = IDS.tolist().index(row["query_id"])
        assert row["distance"] <= 12 and ids[place, row["rank"] - 1] == row["id"]


def add_encoder(index, shape):
    """Publish and promote a version like the promoted one, but with an encoder of images of some shape."""
    manifest, tree = open_version(index), {"kind": "cnn", "dim": 16, "channels": [4]}
    place = version_folder(index, "v2")
    shutil.copytree(version_folder(index, "v1").location, place.location, ignore=lambda *_: ["manifest.json"])
    encoder = make_encoder(TypeAdapter(EncoderConfig).validate_python(tree), shape)
    save_model(
        place.child("model"), encoder, None, made_by="a test", config={"encoder": tree}, facts={"item_shape": shape}
    )
    model = [place.pin(f"model/{path.name}") for path in Path(place.path("model")).iterdir()]
    publish_version(index, manifest.model_copy(update={"version": "v2", "model": model}))
    return promote_version(index, "v2")


def test_images_pass_through_the_encoder_of_the_version_and_unreadable_ones_are_listed(tmp_path):
    make_world(tmp_path)
    manifest = add_encoder(Folder(tmp_path / "index"), (8, 8, 1))
    write_images(tmp_path / "images.parquet", broken=(3, 17))
    corpus = {"path": str(tmp_path / "images.parquet"), "image_column": "image", "id_column": "id"}
    corpus |= {"image": {"height": 8, "width": 8, "channels": 1}}
    notes = match_here(settle(tmp_path, queries=corpus))
    kept = open_corpus(check_config(CorpusConfig, corpus)).read_all()
    wanted = open_searcher(str(tmp_path / "index")).search(embed_queries(str(tmp_path / "index"), manifest, kept.items))
    asked, found, _ = read_answers(tmp_path)
    np.testing.assert_array_equal(asked, kept.ids)
    assert len(kept) == 38 and (found == wanted.ids).mean() > 0.99
    assert [note.rejects for note in notes] == [1, 1, 0] and notes[2].rejects_file is None
    assert [row["row"] for row in json.loads((tmp_path / "match" / "rejects-00000.json").read_text())] == [3]
    corpus["image"]["width"] = 9
    with pytest.raises(DataError, match=r"items of shape \(8, 9, 1\)', but the encoder was trained on \(8, 8, 1\)"):
        run_match(settle(tmp_path, queries=corpus, output=str(tmp_path / "wide")))


@pytest.mark.parametrize(
    "changes, kind, match",
    [
        ({"k": 0}, QueryError, "k: got 0"),
        ({"k": 20_000}, QueryError, "k: got 20000"),
        ({"queries": None, "k": 16_384}, ConfigError, "k: got 16384, but of own items 16383 at most"),
        ({"probes": 9}, QueryError, "probes: got 9"),
        ({"recall": 0.9}, QueryError, "run gsl tune"),
        ({"within": float("nan")}, ConfigError, "within: .* finite"),
        ({"within": float("inf")}, ConfigError, "within: .* finite"),
        ({"within": -1.0}, ConfigError, "within: got -1.0, but a squared distance is 0 or more"),
        ({"exact": True, "probes": 4}, ConfigError, "probes: got 4, but exact search looks at all vectors"),
        ({"exact": True, "order": "lists"}, ConfigError, "order"),
        ({"where": {"colour": 3}}, QueryError, r"where\.colour: .* the columns of this version are id, label"),
        ({"where": {"$any": 3}}, QueryError, "where"),
        ({"groups": True, "within": 1.0}, ConfigError, "groups: .* leave queries and where null"),
        ({"groups": True, "queries": None}, ConfigError, "groups: .* give within"),
        (
            {"memory_mb": 64, "batch_rows": 1_000_000},
            ConfigError,
            r"memory_mb: got 64, but .* give \d+, or fewer batch_rows",
        ),
        ({"version": "v9"}, BadInput, "version"),
        ({"shards": 0}, ConfigError, "shards"),
        ({"form": "table"}, ConfigError, "form"),
        ({"probe": 3}, ConfigError, "did you mean probes"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(tmp_path, changes, kind, match):
    make_world(tmp_path)
    with pytest.raises(kind, match=match):
        run_match(settle(tmp_path, **changes))
    assert not (tmp_path / "match").exists()


def test_exact_search_without_vectors_is_refused(tmp_path):
    make_world(tmp_path, vectors=None)
    with pytest.raises(ConfigError, match="exact: got True, but version v1 keeps no vectors"):
        run_match(settle(tmp_path, exact=True))


def test_kinds_that_are_not_swept_say_so(tmp_path):
    make_world(tmp_path, vectors=None, codebook=make_codebook("vlq"))
    with pytest.raises(ConfigError, match="order: got 'lists', but codes of kind vlq are searched query by query"):
        run_match(settle(tmp_path, order="lists"))


def test_a_cosine_lies_between_its_bounds(tmp_path):
    make_world(tmp_path, codebook=make_codebook(metric="cosine"))
    with pytest.raises(ConfigError, match=r"within: got 1\.5, but a cosine is -1 to 1"):
        run_match(settle(tmp_path, within=1.5))


@pytest.mark.parametrize(
    "corpus, match",
    [
        ({"path": "wide.npy"}, r"items of shape \(17,\)', but the index holds vectors of 16 numbers"),
        (
            {"path": "queries.parquet", "vector_column": "vector", "id_column": "none"},
            "the columns of queries.parquet are key, vector",
        ),
        ({"path": "nothing.npy"}, "no such file"),
    ],
)
def test_queries_that_cannot_be_asked_are_refused(tmp_path, corpus, match):
    make_world(tmp_path)
    np.save(tmp_path / "wide.npy", np.zeros((3, 17), np.float32))
    with pytest.raises(DataError, match=match):
        run_match(settle(tmp_path, queries=corpus | {"path": str(tmp_path / corpus["path"])}))


def test_another_match_in_the_folder_is_not_overwritten(tmp_path):
    make_world(tmp_path)
    (tmp_path / "match").mkdir()
    card = {"kind": "match", "made_by": "other", "files": [], "config": {}, "facts": {}}
    (tmp_path / "match" / "match.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"output: .* holds a match made by other settings"):
        run_match(settle(tmp_path))


def test_what_decides_the_answers_decides_the_fingerprint(tmp_path):
    make_world(tmp_path)

    def name(**changes):
        return settle_here(settle(tmp_path, **changes)).made_by

    usual = name()
    same = [{"output": str(tmp_path / "other")}, {"resources": {"workers": 3}}, {"version": "v1"}]
    assert {name(**changes) for changes in same} == {usual}
    others = [{"k": 3}, {"probes": 2}, {"within": 1.0}, {"exact": True}, {"queries": None}, {"form": "rows"}]
    made = {usual, *(name(**changes) for changes in others), name(shards=2), name(where={"label": 1})}
    make_index(tmp_path / "index", version="v2", seed=3, vectors="float16", payload=PAYLOAD)
    assert len(made | {name()}) == 10
