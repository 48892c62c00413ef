"""Lists of every kind behind one door."""

import numpy as np
import pytest

pytest.importorskip("faiss")
from reference import search_in_loops
from worlds import make_codebook, make_index, make_queries, make_rows

from gsl_dist.errors import ArtefactError, QueryError
from gsl_dist.hits import Effort
from gsl_dist.index.lists import join_lists, make_lists, name_file, open_lists
from gsl_dist.index.search import check_effort, open_searcher

KINDS = ("pq", "rq", "lsq", "cq", "vlq", "rabitq")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_world(kind):
    codebook = make_codebook(kind, residual=kind != "cq")
    return codebook, *make_rows(codebook)


@every_kind
def test_what_was_put_in_is_there_again_in_list_order(kind):
    codebook, ids, lists_N, codes = make_world(kind)
    found = make_lists(codebook, ids, lists_N, codes).read()
    order = np.lexsort((ids, lists_N))
    for part, wanted in zip(found, (ids, lists_N, codes), strict=True):
        np.testing.assert_array_equal(part, wanted[order])


@every_kind
def test_a_written_shard_answers_as_it_did(kind, tmp_path):
    codebook, *rows = make_world(kind)
    lists, path = make_lists(codebook, *rows), tmp_path / name_file("shard", codebook)
    lists.write(path)
    opened = open_lists(path, codebook)
    assert opened.rows == lists.rows == 300 and path.suffix == (".lines" if kind == "vlq" else ".faiss")
    for one, other in zip(lists.search(make_queries(), 9, 5), opened.search(make_queries(), 9, 5), strict=True):
        np.testing.assert_array_equal(one, other)


@every_kind
def test_joined_shards_hold_the_rows_of_all(kind):
    codebook, ids, lists_N, codes = make_world(kind)
    shards = [make_lists(codebook, ids[rank::3], lists_N[rank::3], codes[rank::3]) for rank in range(3)]
    joined = join_lists(shards)
    assert joined.rows == 300
    whole = make_lists(codebook, ids, lists_N, codes).search(make_queries(), 9, codebook.lists)
    np.testing.assert_allclose(joined.search(make_queries(), 9, codebook.lists)[0], whole[0], rtol=1e-4, atol=1e-4)


@every_kind
def test_a_file_of_another_kind_is_refused(kind, tmp_path):
    codebook, *rows = make_world(kind)
    make_lists(codebook, *rows).write(tmp_path / "shard")
    other = make_codebook("pq" if kind == "vlq" else "vlq")
    with pytest.raises(ArtefactError, match="it is not a"):
        open_lists(tmp_path / "shard", other)


def is_graph(lists):
    return type(lists.centroids).__name__ == "IndexHNSWFlat"


@pytest.mark.parametrize("kind", ["pq", "rq"])
def test_cells_found_through_a_graph_are_nearly_always_the_nearest(kind, tmp_path):
    codebook = make_codebook(kind, cells=600, dim=32)
    rows, queries = make_rows(codebook, 5000), make_queries(100, dim=32)
    flat, linked = make_lists(codebook, *rows), make_lists(codebook, *rows, "hnsw")
    assert is_graph(linked) and not is_graph(flat)
    for probes in (1, 20, 600):
        same = flat.search(queries, 10, probes)[1] == linked.search(queries, 10, probes)[1]
        assert same.mean() > 0.97
    linked.write(tmp_path / "one")
    make_lists(codebook, *rows, "hnsw").write(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    opened = open_lists(tmp_path / "one", codebook)
    assert is_graph(opened)
    np.testing.assert_array_equal(opened.search(queries, 10, 20)[1], linked.search(queries, 10, 20)[1])


def test_shards_with_one_graph_are_joined():
    codebook = make_codebook(cells=200)
    ids, cells, codes = make_rows(codebook, 3000)
    shards = [make_lists(codebook, ids[rank::3], cells[rank::3], codes[rank::3], "hnsw") for rank in range(3)]
    whole, joined = make_lists(codebook, ids, cells, codes, "hnsw"), join_lists(shards)
    assert is_graph(joined) and joined.rows == 3000
    found = (lists.search(make_queries(), 9, 30) for lists in (whole, joined))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_version_of_lines_is_searched_like_any_other(tmp_path, shards):
    manifest = make_index(tmp_path, shards=shards, codebook=make_codebook("vlq", rotated=True))
    searcher, queries = open_searcher(str(tmp_path)), make_queries(6)
    ids, regions, codes = searcher.lists.read()
    decoded = searcher.codebook.decode(regions, searcher.codebook.unpack(codes))
    hits = searcher.search(queries, 15, probes=manifest.lists)
    wanted = search_in_loops(queries, ids, decoded, 15)
    np.testing.assert_allclose(hits.distances, [[distance for distance, _ in row] for row in wanted], rtol=1e-4)
    assert np.array_equal(hits.ids, [[item for _, item in row] for row in wanted])
    assert (hits.shards_answered, hits.shards_total, searcher.rows) == (shards, shards, 400)


def test_probes_of_lines_are_regions_and_by_default_as_many_as_16_cells_would_hold(tmp_path):
    lines = make_index(tmp_path / "lines", codebook=make_codebook("vlq", cells=40))
    assert lines.lists == 160 and check_effort(Effort(5), lines) == Effort(5, 16, 1)
    assert check_effort(Effort(5, 160), lines) == Effort(5, 160, 1)
    with pytest.raises(QueryError, match="1 to 160, the regions of this index"):
        check_effort(Effort(5, 161), lines)
    with pytest.raises(QueryError, match="1 to 8, the cells of this index"):
        check_effort(Effort(5, 9), make_index(tmp_path / "cells"))
