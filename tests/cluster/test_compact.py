"""What was written over a version becomes part of the next; nobody who asks notices but by time."""

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("ray")
from worlds import make_codebook, make_index, make_queries, make_rows, make_vectors, write_codes

from gsl_dist.cluster.compact import CompactConfig, run_compact
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import current_version, list_versions, open_version, verify_version
from gsl_dist.index.overlay import open_written, read_overlay
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder

pytestmark = pytest.mark.ray

ROWS, DIM = 400, 16


def build(folder, **how):
    payload = pa.table({"label": np.arange(ROWS) % 7, "title": pa.array([f"title {row}" for row in range(ROWS)])})
    return make_index(folder, payload=payload, **how)


def write(folder, writes):
    index = Folder(str(folder))
    manifest = open_version(index)
    return WriteLog(index).append(read_overlay(index, manifest).check(writes), manifest.space)


def upserts(ids, seed=5):
    rows = zip(ids, make_vectors(len(ids), DIM, seed=seed), strict=True)
    return [Write("upsert", item, vector, {"label": 90, "title": f"new {item}"}) for item, vector in rows]


@pytest.fixture
def folder(tmp_path):
    build(tmp_path, vectors="float16")
    write(tmp_path, upserts([1000, 1001, 3, 4]))
    write(tmp_path, [Write("delete", item) for item in (7, 8, 150, 1001)])
    write(tmp_path, [Write("payload", 10, None, {"label": 77}), Write("payload", 1000, None, {"label": 78})])
    return tmp_path


def compact(folder, **how):
    return run_compact(CompactConfig(index=str(folder), **how))


def test_the_next_version_answers_as_the_one_before_with_its_writes(ray_session, folder):
    queries = make_queries(20)
    before = open_written(str(folder))
    # Exact distances of candidates, all of them, so that it does not count whether a row is coded.
    expected = before.search(queries, 30, probes=8, refine=20)
    made = compact(folder)
    after = open_searcher(str(folder))
    found = after.search(queries, 30, probes=8, refine=20)
    assert made.version == current_version(Folder(str(folder))) != "v1" and made.log_seq == 3
    assert made.rows == after.rows == ROWS - 2 - 3 + 3 == 398
    assert (found.ids == expected.ids).mean() > 0.99
    np.testing.assert_allclose(found.distances, expected.distances, rtol=2e-2, atol=2e-2)
    assert verify_version(Folder(str(folder)), made.version) == []
    label = after.payload.fetch(np.array([10, 1000, 3, 11, 7]), ["label", "title"]).to_pylist()
    assert [row["label"] for row in label] == [77, 78, 90, 4, None]
    assert label[1]["title"] == "new 1000" and label[3]["title"] == "title 11"


@pytest.mark.parametrize("kind", ["pq", "opq", "rq", "cq", "rabitq", "vlq"])
def test_new_rows_are_found_by_the_codes_of_every_kind(ray_session, tmp_path, kind):
    codebook = make_codebook("pq" if kind == "opq" else kind, residual=kind != "cq", rotated=kind == "opq")
    build(tmp_path, codebook=codebook)
    write(tmp_path, upserts(list(range(1000, 1050))))
    made = compact(tmp_path)
    found = open_searcher(str(tmp_path)).search(make_queries(10), 450, probes=codebook.lists)
    assert made.rows == 450 and all(sorted(row) == [*range(400), *range(1000, 1050)] for row in found.ids.tolist())


def test_what_did_not_change_is_taken_over_byte_for_byte(ray_session, tmp_path):
    build(tmp_path)
    write(tmp_path, [Write("delete", 5)])
    before, made = open_version(Folder(str(tmp_path)), "v1"), compact(tmp_path)
    assert [one.index == other.index for one, other in zip(before.shards, made.shards, strict=True)] == [
        False,
        True,
        True,
    ]
    assert made.fingerprint == before.fingerprint and made.codebook == before.codebook


def test_compacting_again_does_nothing_and_a_relaunch_ends_with_the_same_version(ray_session, folder):
    made = compact(folder, promote=False)
    assert current_version(Folder(str(folder))) == "v1"
    again = compact(folder)
    assert again == made and compact(folder) == made
    assert list_versions(Folder(str(folder))) == sorted(["v1", made.version])


def test_writes_that_come_later_lie_over_the_next_version(ray_session, folder):
    made = compact(folder)
    write(folder, upserts([2000], seed=8))
    searcher = open_written(str(folder))
    assert searcher.overlay.rows == 1 and searcher.manifest == made
    assert searcher.search(make_vectors(1, DIM, seed=8), 1, probes=8).ids.tolist() == [[2000]]
    # Rolled back, the version before has all writes over it.
    rolled = open_written(str(folder), "v1")
    assert rolled.overlay.rows == 4 and 7 not in rolled.search(make_queries(5), 400, probes=8).ids


def test_commits_that_some_version_needs_are_kept(ray_session, folder):
    index = Folder(str(folder))
    compact(folder, forget=True)
    assert len(list(WriteLog(index).read(0, open_version(index).space))) == 3
    index.clear("versions/v1")
    write(folder, upserts([3000]))
    compact(folder, forget=True)
    assert [seq for seq, _ in WriteLog(index).read(3, open_version(index).space)] == [4]


def test_deleting_every_row_is_refused(ray_session, tmp_path):
    build(tmp_path)
    write(tmp_path, [Write("delete", item) for item in range(ROWS)])
    with pytest.raises(DataError, match="every row was deleted"):
        compact(tmp_path)
    assert current_version(Folder(str(tmp_path))) == "v1"


def test_a_name_that_another_version_has_is_refused(ray_session, folder):
    with pytest.raises(ConfigError, match="immutable"):
        compact(folder, name="v1")


def add(place, ids, *, seed=9, vectors=True, codebook=None):
    """Write codes of new rows under a codebook, and give their folder."""
    codebook = codebook or make_codebook()
    _, lists, codes = make_rows(codebook, len(ids), seed=seed)
    payload = pa.table({"label": np.full(len(ids), 60), "title": pa.array([f"added {item}" for item in ids])})
    kept = make_vectors(len(ids), DIM, seed=seed) if vectors else None
    write_codes(place, codebook, (np.array(ids), lists, codes), files=2, payload=payload, vectors=kept)
    return str(place / "codes")


def test_rows_of_codes_become_shards_of_their_own(ray_session, folder, tmp_path):
    codes = add(tmp_path / "new", range(5000, 5060))
    made = compact(folder, codes=codes)
    assert made.rows == 398 + 60 and len(made.shards) == 3 + 1 + 2
    searcher = open_searcher(str(folder))
    found = searcher.search(make_queries(3), 60, probes=8, where={"label": 60})
    assert all(sorted(row) == list(range(5000, 5060)) for row in found.ids.tolist())
    assert compact(folder, version="v1", codes=codes) == made


def test_codes_of_ids_that_are_there_are_refused_or_take_their_place(ray_session, folder, tmp_path):
    codes = add(tmp_path / "new", [5, 7, 1000, 6000])
    with pytest.raises(DataError, match=r"2 of these ids"):  # 7 was deleted, and is no id of the version any more
        compact(folder, codes=codes)
    made = compact(folder, codes=codes, duplicates="replace")
    found = open_searcher(str(folder)).search(make_queries(2), 500, probes=8)
    for row in found.ids.tolist():
        ids = [item for item in row if item >= 0]
        assert len(ids) == len(set(ids)) == made.rows == 400 and {5, 7, 1000, 6000} <= set(ids)
    titles = open_searcher(str(folder)).payload.fetch(np.array([5, 1000]), ["title"])["title"].to_pylist()
    assert titles == ["added 5", "added 1000"]


def test_codes_that_do_not_fit_are_refused_before_any_work(ray_session, folder, tmp_path):
    with pytest.raises(ArtefactError, match="codebook"):
        compact(folder, codes=add(tmp_path / "other", [6000], codebook=make_codebook(seed=3)))
    with pytest.raises(ConfigError, match="keep_vectors"):
        compact(folder, codes=add(tmp_path / "bare", [6000], vectors=False))
    with pytest.raises(DataError, match="each id may occur once"):
        compact(folder, codes=add(tmp_path / "twice", [6000, 6000]))
    assert list_versions(Folder(str(folder))) == ["v1"]
