import numpy as np
import pytest

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_index, make_queries, make_rows  # noqa: E402

from gsl_dist.errors import QueryError  # noqa: E402
from gsl_dist.index.coarse import CoarseStep, Probed, check_lists, open_coarse  # noqa: E402
from gsl_dist.index.lists import make_lists  # noqa: E402
from gsl_dist.index.manifest import open_version  # noqa: E402
from gsl_dist.storage import Folder  # noqa: E402

KINDS = [("pq", False, "l2"), ("pq", True, "l2"), ("pq", False, "ip"), ("rq", False, "l2"), ("cq", False, "l2")]


@pytest.mark.parametrize("coarse_search", ["flat", "hnsw"])
@pytest.mark.parametrize("kind, rotated, metric", KINDS)
def test_lists_found_beforehand_give_the_answer_of_lists_found_on_the_way(kind, rotated, metric, coarse_search):
    codebook = make_codebook(kind, rotated=rotated, metric=metric, cells=40, residual=kind != "cq")
    lists, queries = make_lists(codebook, *make_rows(codebook, 2000), coarse_search), make_queries(25)
    step = CoarseStep(codebook, coarse_search)
    for probes in (1, 7, 40):
        wanted = lists.search(queries, 9, probes)
        found = lists.search(queries, 9, probes, probed=step.probe(queries, probes))
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
        assert np.mean(found[1] == wanted[1]) > 0.99


def test_lists_are_the_nearest_by_hand():
    codebook, queries = make_codebook(cells=12, rotated=True), make_queries(9)
    lists, distances = CoarseStep(codebook, "flat").probe(queries, 5)
    far = np.square(codebook.rotate(queries)[:, None] - codebook.coarse).sum(2)
    assert np.array_equal(lists, np.argsort(far, axis=1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(far, axis=1)[:, :5], rtol=1e-4, atol=1e-4)


def test_lists_that_are_left_out_are_passed_over():
    codebook, queries = make_codebook(cells=10), make_queries(6)
    ids, cells, codes = make_rows(codebook, 500)
    whole, probed = make_lists(codebook, ids, cells, codes), CoarseStep(codebook, "flat").probe(queries, 6)
    even = Probed(np.where(probed.lists % 2 == 0, probed.lists, -1), probed.distances)
    half = make_lists(codebook, ids[cells % 2 == 0], cells[cells % 2 == 0], codes[cells % 2 == 0])
    np.testing.assert_allclose(
        whole.search(queries, 5, 6, probed=even)[0], half.search(queries, 5, 6, probed=probed)[0], rtol=1e-5
    )


def test_lists_that_are_not_there_are_refused():
    codebook = make_codebook(cells=8)
    assert check_lists(Probed(np.array([[-1, 7]]), np.zeros((1, 2))), codebook)
    for wrong in (8, -2, 2**40):
        with pytest.raises(QueryError, match="lists: got"):
            check_lists(Probed(np.array([[0, wrong]]), np.zeros((1, 2))), codebook)
    with pytest.raises(QueryError, match="without lines"):
        check_lists(Probed(np.array([[0, 1]]), np.zeros((1, 2))), make_codebook("vlq"))


def test_a_version_of_lines_has_no_coarse_step(tmp_path):
    make_index(tmp_path / "lines", codebook=make_codebook("vlq"))
    make_index(tmp_path / "cells")
    index, lines = Folder(tmp_path / "cells"), Folder(tmp_path / "lines")
    assert open_coarse(lines, open_version(lines)) is None
    assert open_coarse(index, open_version(index)).probe(make_queries(2), 3).lists.shape == (2, 3)
