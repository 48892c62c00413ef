"""The build stage on codes at random: ways of sharding, ids that occur twice, memory, and what a relaunch does."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")
pytest.importorskip("faiss")
from worlds import make_codebook, make_queries, make_rows, make_vectors, write_codes

from gsl_dist.cluster import build as module
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.config import check_config, fingerprint_config
from gsl_dist.errors import ConfigError, DataError
from gsl_dist.index.manifest import open_version, verify_version
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder

CODEBOOK = make_codebook(cells=12, bits=8)


def settle(place, **changes):
    parts = {name: str(place / name) for name in ("codes", "codebook", "index")}
    return check_config(BuildConfig, parts | changes)


def write_rows(place, rows=None, **more):
    """Write 400 rows in 3 files, with payload and vectors."""
    rows = rows or make_rows(CODEBOOK, 400)
    payload = pa.table({"row": np.arange(len(rows[0]))})
    write_codes(place, CODEBOOK, rows, files=3, payload=payload, vectors=make_vectors(len(rows[0])), **more)
    return rows


def note_progress(told, *said):
    told.append(said)


@pytest.fixture(scope="module")
def world(ray_session, tmp_path_factory):
    place = tmp_path_factory.mktemp("build")
    write_rows(place)
    return place


@pytest.mark.ray
def test_versions_by_id_and_by_cell_answer_as_a_single_shard_does(world):
    queries, found = make_queries(20), {}
    for name, changes in {
        "usual": {},
        "single": {"shards": 1},
        "runs": {"shards": 5},
        "cells": {"sharding": "cell"},
        "more": {"sharding": "cell", "shards": 4, "vectors": "int8"},
    }.items():
        place = str(world / f"index-{name}")
        manifest = run_build(settle(world, index=place, **changes))
        assert manifest.sharding == changes.get("sharding", "id") and manifest.rows == 400 and manifest.dropped == 0
        assert len(manifest.shards) == changes.get("shards", 3) and verify_version(Folder(place)) == []
        found[name] = open_searcher(place).search(queries, 10, probes=3, refine=1)
    for hits in found.values():
        np.testing.assert_array_equal(hits.ids, found["single"].ids)
    place = world / "index-more"
    folder = place / "versions" / open_version(Folder(place)).version
    payload = [pq.read_table(folder / f"payload-{shard:05d}.parquet") for shard in range(4)]
    ids = make_rows(CODEBOOK, 400)[0]
    for part in payload:
        assert part["id"].to_pylist() == sorted(part["id"].to_pylist())
        np.testing.assert_array_equal(ids[part["row"].to_numpy()], part["id"].to_numpy())
    assert sorted(row for part in payload for row in part["row"].to_pylist()) == list(range(400))


@pytest.mark.ray
def test_what_was_always_so_keeps_the_name_of_a_version(world):
    manifest = run_build(settle(world, index=str(world / "index-usual"), memory_mb=64))
    assert manifest.made_by == fingerprint_config("400 rows", CODEBOOK.fingerprint, None)
    others = [
        {"sharding": "cell"},
        {"shards": 3},
        {"duplicates": "last"},
        {"vectors": "int8"},
        {"coarse_search": "hnsw"},
    ]
    made = [run_build(settle(world, index=str(world / "index-named"), **other)).made_by for other in others]
    assert len({*made, manifest.made_by}) == 6


@pytest.mark.ray
@pytest.mark.parametrize("sharding", ["id", "cell"])
def test_of_rows_with_one_id_one_is_kept_or_none_allowed(ray_session, tmp_path, sharding):
    ids, lists, codes = make_rows(CODEBOOK, 400)
    ids[[7, 390]] = ids[200]  # in three files
    ids[11] = ids[10]  # in one
    write_rows(tmp_path, (ids, lists, codes))
    with pytest.raises(DataError, match=rf"id: got ({ids[10]}|{ids[200]}), but each id may occur once"):
        run_build(settle(tmp_path, sharding=sharding))
    assert not (tmp_path / "index" / "CURRENT.json").exists()
    lost = {"first": {11, 200, 390}, "last": {7, 10, 200}}
    for duplicates, rows in lost.items():
        told = []
        config = settle(tmp_path, sharding=sharding, duplicates=duplicates, index=str(tmp_path / duplicates))
        manifest = run_build(config, functools.partial(note_progress, told))
        assert (manifest.rows, manifest.dropped) == (397, 3) and "3 rows of repeated ids left out" in told[-1]
        searcher, kept = open_searcher(str(tmp_path / duplicates)), np.setdiff1d(np.arange(400), list(rows))
        found = sorted(zip(*(part.tolist() for part in searcher.lists.read()[:2]), strict=True))
        assert found == sorted(zip(ids[kept].tolist(), lists[kept].tolist(), strict=True))
        folder = tmp_path / duplicates / "versions" / manifest.version
        payload = [pq.read_table(folder / shard.payload.name)["row"].to_pylist() for shard in manifest.shards]
        assert sorted(row for part in payload for row in part) == kept.tolist()


@pytest.mark.ray
def test_a_memory_that_cannot_hold_the_ids_is_refused_by_name(world, monkeypatch):
    monkeypatch.setattr(module, "ID_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=r"memory_mb: got 64, but shard-00000 holds .* give \d+, or more shards"):
        run_build(settle(world, index=str(world / "small"), memory_mb=64, shards=2))


def test_there_are_no_more_shards_by_cell_than_cells(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(ConfigError, match="shards: got 13, but by cell there are 12 at most"):
        run_build(settle(tmp_path, sharding="cell", shards=13))


@pytest.mark.parametrize(
    ("name", "value"), [("memory_mb", 63), ("shards", 0), ("sharding", "row"), ("duplicates", "any")]
)
def test_a_setting_out_of_range_is_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name):
        settle(tmp_path, **{name: value})
