"""The pickled service that benchmarks set beside this one: it finds what one process finds, and what ours finds."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")
import faiss
from fleets import World
from worlds import make_index, make_queries, make_vectors

from gsl_dist.client import Client

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS, K, CELLS = 400, 10, 8


@pytest.fixture
def pickled(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pickled

    yield pickled
    sys.modules.pop("pickled")


def build(pickled, folder, factory):
    """Give the folders of two servers, each with half of the vectors; their ids are no places."""
    x, folders = make_vectors(ROWS), []
    for part in range(2):
        folders.append(folder / f"shard-{part}")
        pickled.build_shard(x[part::2], np.arange(part, ROWS, 2), factory, folders[-1])
    return folders


def ask_servers(pickled, folders, queries, *effort):
    with pickled.Servers(folders, 1) as addresses:
        client = pickled.FanOut(addresses)
        found = client.search(queries, K, *effort)
        client.close()
    return found


def find_exactly(queries):
    exact = faiss.IndexFlatL2(queries.shape[1])
    exact.add(make_vectors(ROWS))
    return exact.search(queries, K)


@pytest.mark.parametrize(("factory", "effort"), [("IVF8,PQ8x4np", (3,)), ("IVF8,PQ8x4np,Refine(SQfp16)", (3, 4))])
def test_servers_give_what_their_indexes_give_in_one_process(pickled, tmp_path, factory, effort):
    folders, queries = build(pickled, tmp_path, factory), make_queries()
    distances, ids = ask_servers(pickled, folders, queries, *effort)
    parts = [pickled.Shard(folder, 1).search(queries, K, *effort) for folder in folders]
    for row, (got, near) in enumerate(zip(ids, distances, strict=True)):
        pairs = sorted(
            (far, item) for far_QK, ids_QK in parts for far, item in zip(far_QK[row], ids_QK[row], strict=True)
        )
        assert [item for _, item in pairs[:K]] == got.tolist()
        assert [far for far, _ in pairs[:K]] == near.tolist()


def test_asked_for_everything_servers_and_our_service_both_find_the_true_neighbours(pickled, tmp_path):
    queries = make_queries()
    distances, ids = find_exactly(queries)
    folders = build(pickled, tmp_path, "IVF8,PQ8x4np,Refine(Flat)")
    np.testing.assert_array_equal(ask_servers(pickled, folders, queries, CELLS, ROWS // K)[1], ids)
    make_index(tmp_path / "ours", rows=ROWS, cells=CELLS, vectors="float16")
    world = World(tmp_path / "ours", timeout_s=30.0)  # the first candidates wait for a compiler
    try:
        with Client(world.url) as client:
            hits = client.search(queries, K, CELLS, refine=ROWS // K)
    finally:
        world.stop()
    np.testing.assert_allclose(hits.distances, distances, rtol=2e-3)
    assert (hits.ids == ids).mean() > 0.98  # what float16 cannot tell apart may change places


def test_a_client_that_hangs_up_leaves_servers_to_the_next(pickled, tmp_path):
    folders, queries = build(pickled, tmp_path, "IVF8,PQ8x4np"), make_queries()
    with pickled.Servers(folders, 1) as addresses:
        answers = []
        for _ in range(2):
            client = pickled.FanOut(addresses)
            answers.append(client.search(queries, K, 3)[1])
            client.close()
    np.testing.assert_array_equal(*answers)
