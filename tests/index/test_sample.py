"""A sample of queries comes back as it was left, and knows what was written since."""

import numpy as np
import pytest

pytest.importorskip("faiss")
from worlds import make_index, make_queries, make_vectors

from gsl_dist.errors import ArtefactError
from gsl_dist.hits import NO_ID, Hits
from gsl_dist.index.log import Write
from gsl_dist.index.manifest import version_folder
from gsl_dist.index.overlay import Overlay, read_schema
from gsl_dist.index.sample import Sample, keep_sample, read_sample
from gsl_dist.storage import Folder

QUERIES, VECTORS = make_queries(6), make_vectors(400)
FAR = ((QUERIES[:, None] - VECTORS) ** 2).sum(2)
NEAR = np.argsort(FAR, axis=1)[:, :10]
SAMPLE = Sample(QUERIES, Hits(NEAR, np.take_along_axis(FAR, NEAR, 1).astype(np.float32), 1, 1, "v1"))


def test_a_sample_comes_back_as_it_was_left(tmp_path):
    index = Folder(str(tmp_path))
    assert read_sample(index, "v1") is None
    keep_sample(index, "v1", SAMPLE)
    back = read_sample(index, "v1")
    assert np.array_equal(back.queries_QD, QUERIES) and np.array_equal(back.truth.ids, NEAR)
    assert np.array_equal(back.truth.distances, SAMPLE.truth.distances) and back.truth.version == "v1"


def test_a_damaged_sample_is_named(tmp_path):
    index = Folder(str(tmp_path))
    keep_sample(index, "v1", SAMPLE)
    [path] = (tmp_path / "sample").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=path.name):
        read_sample(index, "v1")


def test_a_sample_takes_the_place_of_the_one_before_and_of_no_other_versions(tmp_path):
    index = Folder(str(tmp_path))
    other = Sample(QUERIES[:2], Hits(NEAR[:2], SAMPLE.truth.distances[:2], 1, 1, "v1"))
    for version, sample in (("v1-b", SAMPLE), ("v1", SAMPLE), ("v1", other)):
        keep_sample(index, version, sample)
    assert [len(read_sample(index, version).queries_QD) for version in ("v1", "v1-b")] == [2, 6]
    assert len(list((tmp_path / "sample").iterdir())) == 2


def test_what_is_true_after_writes_is_what_all_rows_say(tmp_path):
    index, manifest = Folder(str(tmp_path)), make_index(tmp_path)
    overlay = Overlay(manifest, read_schema(version_folder(index, "v1"), manifest))
    gone, fresh = [*NEAR[0, :3].tolist(), 5], make_vectors(40, seed=7)
    writes = [Write("delete", item) for item in gone]
    writes += [Write("upsert", 1000 + place, vector) for place, vector in enumerate(fresh)]
    overlay.apply(overlay.check(writes), 1)
    queries, truth = SAMPLE.lay_over(overlay, np.array([0, 4]))
    ids = np.r_[np.arange(400), 1000 + np.arange(40)]
    far = ((queries[:, None] - np.concatenate([VECTORS, fresh])) ** 2).sum(2)
    far[:, np.isin(ids, gone)] = np.inf
    for row in range(2):
        known = truth[row][truth[row] != NO_ID]
        assert known.tolist() == ids[np.argsort(far[row])][: len(known)].tolist() and len(known) >= 7
