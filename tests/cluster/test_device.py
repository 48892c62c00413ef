"""Where a replica's rows are searched: what a GPU may be asked for, and that answers do not depend on it."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("uvloop")

from worlds import make_codebook, make_index, make_queries  # noqa: E402

from gsl_dist.cluster import device as module  # noqa: E402
from gsl_dist.cluster.device import DeviceLists, check_device, find_shortage, hold_lists, place_searcher  # noqa: E402
from gsl_dist.errors import ConfigError  # noqa: E402
from gsl_dist.hits import Effort  # noqa: E402
from gsl_dist.index import search as searching  # noqa: E402
from gsl_dist.index.lists import open_lists  # noqa: E402
from gsl_dist.index.search import open_searcher  # noqa: E402
from gsl_dist.quantizers import regions  # noqa: E402
from gsl_dist.service.frames import Ask  # noqa: E402
from gsl_dist.service.replica import Holding  # noqa: E402
from gsl_dist.wire import pack_query, unpack_hits  # noqa: E402

ROWS = 400
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    payload = pa.table({"label": np.arange(ROWS) % 5})
    make_index(folder, rows=ROWS, codebook=make_codebook("vlq", rotated=True), payload=payload, vectors="float16")
    return str(folder)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[gpu, needs_gpu])])
def pair(folder, request):
    """The same version on a processor and on a device."""
    plain = open_searcher(folder)
    return plain, replace(plain, lists=hold_lists(plain.lists, request.param))


def assert_alike(found, wanted):
    np.testing.assert_allclose(found.distances, wanted.distances, rtol=1e-4, atol=1e-4)
    assert (found.ids == wanted.ids).mean() > 0.99
    assert (found.shards_answered, found.version) == (wanted.shards_answered, wanted.version)


@pytest.mark.parametrize("where", [None, {"label": {"$in": [1, 3]}}, {"id": {"$lt": 30}}, {"label": 9}])
@pytest.mark.parametrize("refine", [1, 4])
def test_a_searcher_answers_the_same_wherever_its_rows_lie(pair, refine, where, monkeypatch):
    monkeypatch.setattr(searching, "FEW_ROWS", 40)  # so that a filter of more goes through lists
    plain, placed = pair
    for probes in (1, 8, 32):
        asked = {"probes": probes, "refine": refine, "where": where}
        assert_alike(placed.search(make_queries(), 12, **asked), plain.search(make_queries(), 12, **asked))


def test_a_replica_answers_from_a_device_what_it_answers_from_a_processor(pair):
    body = pack_query(make_queries(), Effort(10, 8, 1))
    found = []
    for searcher in pair:
        status, answer = Holding("v1", searcher.shards, searcher).answer(Ask.SEARCH, body)
        assert status == 0, answer
        found.append(unpack_hits(answer))
    assert_alike(*found)


def test_lists_on_a_device_are_still_read_and_written(pair, tmp_path):
    plain, placed = (searcher.lists for searcher in pair)
    assert placed.rows == ROWS
    found, wanted = ((*lists.read(), *lists.take(np.arange(9))) for lists in (placed, plain))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    placed.write(tmp_path / "shard")
    for one, other in zip(open_lists(tmp_path / "shard", pair[0].codebook).read(), plain.read(), strict=True):
        np.testing.assert_array_equal(one, other)


@gpu
@needs_gpu
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_rows_are_placed_on_the_gpu_that_there_is(folder, wanted):
    plain = open_searcher(folder)
    placed = place_searcher(plain, wanted)
    assert isinstance(placed.lists, DeviceLists)
    assert_alike(placed.search(make_queries(), 10), plain.search(make_queries(), 10))


def test_a_processor_that_was_asked_for_is_taken_without_a_look(folder, monkeypatch):
    monkeypatch.setattr(module, "find_fault", None)
    searcher = open_searcher(folder)
    assert place_searcher(searcher, "cpu") is searcher


def lack_driver(monkeypatch):
    monkeypatch.setattr(module, "_DRIVER", "libno-such-driver.so")


def lack_share(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def lack_torch(monkeypatch):
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)


def lack_gpu(monkeypatch):
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def lack_memory(monkeypatch):
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 30))


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (lack_driver, "no GPU was found for this process"),
        (lack_share, "resources.gpus gives replicas theirs"),
        (lack_torch, "torch is not installed"),
        (lack_gpu, "torch finds no GPU"),
        (lack_memory, "400 rows take 1.00 GiB with what a search takes, and 0.00 GiB are free there"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused_where_asked_for_and_else_done_without(
    folder, lack, said, monkeypatch, caplog
):
    lack(monkeypatch)
    searcher = open_searcher(folder)
    with pytest.raises(ConfigError, match=f"device: got 'cuda', but .*{said}"):
        place_searcher(searcher, "cuda")
    with caplog.at_level(logging.INFO):
        assert place_searcher(searcher, "auto") is searcher
    assert said in caplog.text


def test_codes_of_other_kinds_stay_on_the_processor(tmp_path):
    make_index(tmp_path)
    searcher = open_searcher(str(tmp_path))
    assert place_searcher(searcher, "auto") is searcher
    with pytest.raises(ConfigError, match=r"device: got 'cuda', but codes of lines \(`vlq`\) alone .* are of kind pq"):
        place_searcher(searcher, "cuda")
    with pytest.raises(ConfigError, match="are of kind pq"):
        check_device("cuda", "pq")
    for device, kind in (("cuda", "vlq"), ("auto", "pq"), ("cpu", "pq")):
        check_device(device, kind)


def test_rows_fit_where_there_is_room_for_them_and_for_a_search(folder, monkeypatch):
    lists = open_searcher(folder).lists
    wanted = regions.measure_bytes(lists.codebook, ROWS) + regions.BATCH_BYTES
    assert find_shortage(lists, wanted) is None
    assert "more replicas" in find_shortage(lists, wanted - 1)
    monkeypatch.setattr(regions, "MOST_ROWS", ROWS - 1)
    assert "399 rows at most and these are 400" in find_shortage(lists, wanted)


@pytest.mark.parametrize("kind", ["pq", "vlq"])
def test_a_replica_on_a_processor_does_without_torch(kind, tmp_path):
    make_index(tmp_path, codebook=make_codebook(kind))
    code = (
        "import sys; from gsl_dist.cluster.device import place_searcher; "
        "from gsl_dist.service.replica import probe; from gsl_dist.index.search import open_searcher; "
        f"probe(place_searcher(open_searcher({str(tmp_path)!r}), 'auto')); print('torch' in sys.modules)"
    )
    root, hidden = Path(__file__).resolve().parents[2], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=hidden, check=True)
    assert ran.stdout.strip() == "False"
