"""Searching a version in passes, or exactly, gives what a searcher that holds all of it gives."""

import numpy as np
import pyarrow as pa
import pytest

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_index, make_queries, make_vectors  # noqa: E402

from gsl_dist.errors import ArtefactError, QueryError  # noqa: E402
from gsl_dist.hits import Effort, show_distances  # noqa: E402
from gsl_dist.index.bulk import CodedSearch, ExactSearch, measure_batch, measure_shard, plan_passes  # noqa: E402
from gsl_dist.index.search import open_searcher  # noqa: E402
from gsl_dist.storage import Folder  # noqa: E402

PAYLOAD = pa.table({"label": np.arange(400) % 5})
PASSES = [
    [["shard-00000", "shard-00001", "shard-00002"]],
    [["shard-00000", "shard-00001"], ["shard-00002"]],
    [["shard-00000"], ["shard-00001"], ["shard-00002"]],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk")
    make_index(folder, vectors="float16", payload=PAYLOAD)
    return folder


@pytest.mark.parametrize("is_swept", [True, False])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("refine", [1, 4])
def test_passes_find_what_all_shards_at_once_do(place, passes, is_swept, refine):
    searcher = open_searcher(str(place))
    search = CodedSearch(Folder(place), searcher.manifest, Effort(7, 3, refine), passes, is_swept=is_swept)
    for queries in (make_queries(), make_queries(seed=9)):
        found, wanted = search.find(queries), searcher.search(queries, 7, probes=3, refine=refine)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_allclose(found.distances, wanted.distances, rtol=1e-4, atol=1e-4)
        assert not found.is_partial and (found.shards_answered, found.version) == (3, "v1")


@pytest.mark.parametrize("passes", PASSES)
def test_filters_hold_in_every_pass(place, passes):
    searcher, where = open_searcher(str(place)), {"label": {"$in": [1, 4]}}
    search = CodedSearch(Folder(place), searcher.manifest, Effort(7, 8, 1, where=where), passes, is_swept=True)
    wanted = searcher.search(make_queries(), 7, probes=8, refine=1, where=where)
    np.testing.assert_array_equal(search.find(make_queries()).ids, wanted.ids)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("where", [None, {"label": 3}, {"id": {"$lt": 3}}])
def test_exact_search_equals_ranking_all_candidates_by_their_vectors(tmp_path, metric, where):
    make_index(tmp_path, codebook=make_codebook(metric=metric), vectors="float16", payload=PAYLOAD)
    searcher = open_searcher(str(tmp_path))
    wanted = searcher.search(make_queries(), 5, probes=8, refine=80, where=where)
    unit = make_queries() / np.linalg.norm(make_queries(), axis=1, keepdims=True)
    found = ExactSearch(Folder(tmp_path), searcher.manifest, 5, where).find(
        unit.astype(np.float32) if metric == "cosine" else make_queries()
    )
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(show_distances(found, metric).distances, wanted.distances, rtol=1e-4, atol=1e-5)


def test_a_column_of_another_type_is_refused(place):
    manifest = open_searcher(str(place)).manifest
    with pytest.raises(QueryError, match=r"where\.label"):
        ExactSearch(Folder(place), manifest, 3, {"label": "three"}).find(make_queries())


@pytest.mark.parametrize("name", ["shard-00001.faiss", "shard-00001.vectors"])
def test_a_damaged_file_is_refused(tmp_path, name):
    manifest = make_index(tmp_path, vectors="float16")
    path = tmp_path / "versions" / "v1" / name
    path.write_bytes(path.read_bytes()[:-1])
    search = CodedSearch(Folder(tmp_path), manifest, Effort(3, 2, 4), PASSES[2], is_swept=False)
    with pytest.raises(ArtefactError, match=name):
        search.find(make_queries())


def test_a_pass_takes_no_more_than_the_room_unless_one_shard_does(place):
    manifest, effort = open_searcher(str(place)).manifest, Effort(10, 8, 1)
    sizes = [measure_shard(shard, effort) for shard in manifest.shards]
    assert plan_passes(manifest, effort, sum(sizes)) == PASSES[0]
    assert plan_passes(manifest, effort, sum(sizes) - 1) == PASSES[1]
    assert plan_passes(manifest, effort, 1) == PASSES[2]


def test_what_is_held_grows_with_what_is_asked_for(place):
    manifest = open_searcher(str(place)).manifest
    plain = measure_batch(manifest, Effort(10, 8, 1), 1000)
    assert plain < measure_batch(manifest, Effort(10, 8, 4), 1000) < measure_batch(manifest, Effort(10, 8, 4), 2000)
    shard, where = manifest.shards[0], {"label": 1}
    assert measure_shard(shard, Effort(10, None, 1)) == 0 < measure_shard(shard, Effort(10, None, 1, where=where))
    assert measure_shard(shard, Effort(10, 8, 1)) > shard.index.bytes


def test_vectors_that_are_mapped_and_measured_are_those_of_the_version(place):
    found = ExactSearch(Folder(place), open_searcher(str(place)).manifest, 1).find(make_vectors()[:50])
    assert found.ids[:, 0].tolist() == list(range(50)) and (found.distances < 1e-4).all()
