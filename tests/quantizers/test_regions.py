"""Rows that torch holds: the search against loops, the compiled lists and itself in small batches."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("faiss")

from corpora import read_pictures  # noqa: E402
from reference import search_regions_in_loops  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from worlds import make_codebook, make_queries, make_rows  # noqa: E402

from gsl_dist.cluster.device import hold_lists  # noqa: E402
from gsl_dist.codebook import LEVELS, Codebook  # noqa: E402
from gsl_dist.hits import FAR  # noqa: E402
from gsl_dist.index.selection import Selection  # noqa: E402
from gsl_dist.index.vlq import count_cells, make_lists  # noqa: E402
from gsl_dist.quantizers import LineConfig, LloydConfig, make_quantizer, train_codebook  # noqa: E402
from gsl_dist.quantizers.regions import _make_keys, _read_keys, measure_bytes  # noqa: E402

FEW_BYTES = 1 << 14


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return request.param


def make_random(rows=3000, *, bits=5, rotated=False, cells=40):
    codebook = make_codebook("vlq", bits=bits, cells=cells, rotated=rotated)
    return make_lists(codebook, *make_rows(codebook, rows))


def make_whole(rows=3000, *, dim=8, seed=0):
    """Lists of whole numbers and quarters, so that sums are exact in any order, and many rows are as near as others."""
    rng = np.random.default_rng(seed)
    half = rng.integers(-8, 9, size=(20, dim))
    coarse = np.concatenate([half, -half])  # around 0, which all is measured from
    edges = np.stack([rng.permutation(np.delete(np.arange(40), cell))[:4] for cell in range(40)])
    lines = {"edges": edges, "feet": rng.uniform(0, 0.5, edges.shape), "levels": np.arange(LEVELS) // 64 / 4}
    codebook = Codebook(coarse, rng.integers(-2, 3, size=(4, 16, dim // 4)), True, "vlq", **lines)
    ids, regions, codes = make_rows(codebook, rows)
    # A third of the regions hold nothing.
    return make_lists(codebook, ids, regions - regions % 3 % 2, codes)


def ask_whole(count=30, *, dim=8):
    return np.random.default_rng(7).integers(-9, 10, size=(count, dim)).astype(np.float32)


def choose(lists, every):
    places = np.arange(0, lists.rows, every)
    return Selection(lists.ids_N[places], places, lists.rows)


def assert_alike(found, wanted, *, share=0.99):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert ((found[1] == -1) == (wanted[1] == -1)).all()
    assert (found[1] == wanted[1]).mean() > share  # rows as near as each other may change places


@pytest.mark.parametrize("probes", [1, 6, 60, 160])
def test_what_is_found_is_what_loops_find(device, probes):
    lists = make_random(500)
    ids, regions, codes = lists.read()
    codebook, queries = lists.codebook, make_queries(5)
    rows = list(zip(ids, regions, codebook.decode(regions, codebook.unpack(codes)), strict=True))
    distances, found = hold_lists(lists, device).search(queries, 20, probes)
    for row, query in enumerate(queries):
        wanted = search_regions_in_loops(query, codebook, rows, 20, probes, count_cells(codebook, probes))
        assert found[row][: len(wanted)].tolist() == [item for _, item in wanted]
        np.testing.assert_allclose(distances[row][: len(wanted)], [far for far, _ in wanted], rtol=1e-4)
        assert (found[row][len(wanted) :] == -1).all() and (distances[row][len(wanted) :] == FAR).all()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_lists_on_a_device_answer_as_those_on_a_processor(device, bits, rotated):
    lists = make_random(bits=bits, rotated=rotated)
    held, queries = hold_lists(lists, device), make_queries(33)
    for probes in (1, 7, 50, 160):
        for k in (1, 10, 400, 4000):
            assert_alike(held.search(queries, k, probes), lists.search(queries, k, probes))


def test_equal_distances_are_cut_off_and_ordered_by_id_to_the_last_bit(device):
    pytest.importorskip("numba")
    lists, queries = make_whole(), ask_whole()
    held, ties = hold_lists(lists, device), 0
    for probes in (1, 9, 40, 160):
        for k in (1, 10, 100, 3000):
            for chosen in (None, choose(lists, 3)):
                found, wanted = (some.search(queries, k, probes, chosen) for some in (held, lists))
                np.testing.assert_array_equal(found[0], wanted[0])
                np.testing.assert_array_equal(found[1], wanted[1])
                ties += ((found[0][:, 1:] == found[0][:, :-1]) & (found[1][:, 1:] >= 0)).sum()
    assert ties > 10_000


def test_codes_of_pictures_are_found_as_on_a_processor(device):
    x = torch.tensor(read_pictures(1200, 16).astype(np.float32))
    quantizer = make_quantizer(LineConfig(kind="vlq", sub_vectors=4, bits=6, cells=24, edges=6), 16)
    codebook = train_codebook(x[:1000], quantizer, LloydConfig(iterations=4)).codebook
    regions, codes = quantizer.encode(x[:1000], codebook)
    lists = make_lists(codebook, np.arange(1000), regions.numpy(), codebook.pack(codes.numpy()))
    assert (np.diff(lists.offsets_R) == 0).any()
    held, queries = hold_lists(lists, device), x[1000:].numpy()
    for probes in (1, 12, 144):
        assert_alike(held.search(queries, 10, probes), lists.search(queries, 10, probes))


@pytest.mark.parametrize(("batch_bytes", "count"), [(1, 2), (FEW_BYTES, 10), (1 << 18, 30)])
def test_small_batches_give_the_same_answer(device, batch_bytes, count):
    lists, queries = make_whole(), ask_whole(count)
    whole, parts = hold_lists(lists, device), hold_lists(lists, device, batch_bytes=batch_bytes)
    for k in (1, 300):
        for one, other in zip(whole.search(queries, k, 60), parts.search(queries, k, 60), strict=True):
            np.testing.assert_array_equal(one, other)


def test_one_query_is_answered_as_in_a_batch(device):
    held, queries = hold_lists(make_whole(), device), ask_whole(9)
    batch = held.search(queries, 10, 30)
    for row in range(9):
        for one, all_of in zip(held.search(queries[row : row + 1], 10, 30), batch, strict=True):
            np.testing.assert_array_equal(one[0], all_of[row])
    distances, ids = held.search(queries[:0], 10, 30)
    assert distances.shape == ids.shape == (0, 10)


def test_rows_that_are_not_chosen_are_not_found(device):
    lists, queries = make_random(), make_queries()
    held = hold_lists(lists, device)
    for every in (2, 50, 2, 5000):  # one mask after another, and one again
        chosen = choose(lists, every)
        found = held.search(queries, 30, 60, chosen)
        assert set(found[1][found[1] >= 0].tolist()) <= set(chosen.ids_n.tolist())
        assert_alike(found, lists.search(queries, 30, 60, chosen))
    assert_alike(held.search(queries, 30, 60), lists.search(queries, 30, 60))


def test_lists_without_rows_find_nothing(device):
    lists = make_random(0)
    distances, ids = hold_lists(lists, device).search(make_queries(), 3, 9)
    assert (ids == -1).all() and (distances == FAR).all()


@pytest.mark.parametrize("scale", [1e30, 1e38])
def test_a_query_that_overflows_harms_no_other(device, scale):
    held, queries = hold_lists(make_random(), device), make_queries(4)
    wild, kept = queries.copy(), [0, 2, 3]
    wild[1] *= scale
    distances, ids = held.search(wild, 10, 40)
    assert (distances[1] >= FAR).all()
    assert_alike((distances[kept], ids[kept]), tuple(part[kept] for part in held.search(queries, 10, 40)))


def test_distances_far_from_the_origin_are_as_exact(device):
    near, queries = make_random().codebook, make_queries()
    far = Codebook(near.coarse + 300, near.books, True, "vlq", edges=near.edges, levels=near.levels, feet=near.feet)
    rows = make_rows(near, 3000)
    lists = make_lists(far, *rows)
    distances, ids = hold_lists(lists, device).search(queries + 300, 10, 160)
    wanted = make_lists(near, *rows).search(queries, 10, 160)
    np.testing.assert_allclose(distances, wanted[0], rtol=2e-3)
    assert (ids == wanted[1]).mean() > 0.9


def test_threads_share_rows(device):
    held, queries = hold_lists(make_whole(), device, batch_bytes=FEW_BYTES), ask_whole()
    masks = [None, choose(held.lists, 2), choose(held.lists, 7)] * 4
    wanted = [held.search(queries, 10, 40, mask) for mask in masks]
    with ThreadPoolExecutor(4) as pool:
        for found, own in zip(pool.map(lambda mask: held.search(queries, 10, 40, mask), masks), wanted, strict=True):
            np.testing.assert_array_equal(found[1], own[1])


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, as long as these are there."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {part.untyped_storage()._cdata for part in tree_leaves(args) if isinstance(part, torch.Tensor)}
        made = operation(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor) and part.untyped_storage()._cdata not in given | self.known:
                self._count(part.untyped_storage())
        return made

    def _count(self, storage):
        self.known.add(storage._cdata)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key, size):
        self.known.discard(key)
        self.held -= size


def measure_peak(search, device):
    """Give the most bytes that were held at once on a device while a search ran, besides what was held before."""
    if device == "cpu":
        with Meter() as meter:
            search()
        return meter.peak
    search()  # what the first product of matrices makes is there for good
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    search()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("k", "probes", "cells"), [(10, 160, 40), (10, 400, 3000), (500, 8, 40)])
def test_a_search_takes_no_more_memory_than_it_may(device, k, probes, cells):
    lists, queries = make_random(20_000, cells=cells), make_queries(100)
    answers = 12 * k * len(queries)  # which leave a GPU, but not a processor
    for batch_bytes in (1 << 21, 1 << 23):
        held = hold_lists(lists, device, batch_bytes=batch_bytes)
        peak = measure_peak(lambda held=held: held.search(queries, k, probes), device)
        assert batch_bytes / 8 < peak < batch_bytes + answers


@pytest.mark.parametrize("batch_bytes", [FEW_BYTES, 1 << 20, 1 << 30])
def test_queries_taken_together_have_about_as_many_rows(device, batch_bytes):
    held, rng = hold_lists(make_random(100), device, batch_bytes=batch_bytes).regions, np.random.default_rng(0)
    for counts in (rng.geometric(0.001, size=500), rng.integers(3, size=50), np.ones(20, int), [1, 0], [0], []):
        counts = torch.tensor(counts, dtype=torch.int64, device=device)
        parts = list(held._split(counts, 10))
        places = torch.cat([counts[:0], *(some for some, _, _ in parts)])
        assert places.sort().values.tolist() == counts.nonzero().flatten().tolist()
        for some, most, width in parts:
            assert counts[some].max() == most >= width >= 1 and 2 * counts[some].min() >= most
            assert len(some) == 1 or len(some) * width * 100 < batch_bytes


@pytest.mark.parametrize("rotated", [False, True])
def test_what_rows_take_is_told_beforehand(device, rotated):
    lists = make_random(rotated=rotated)
    regions = hold_lists(lists, device).regions
    regions.search(make_queries(), 3, 5, cells=5, mask_N=np.ones(lists.rows, np.uint8))
    tensors = [part for part in [*vars(regions).values(), regions._mask[1]] if isinstance(part, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in tensors)
    assert 0 <= held - measure_bytes(lists.codebook, lists.rows) < 2048  # levels, the centre and the like


def test_keys_are_in_the_order_of_values_and_then_of_ranks():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=200), rng.integers(-3, 4, size=200), [0, 1e-40, -1e-40, 3e38, -3e38]])
    values, ranks = values.astype(np.float32), rng.permutation(len(values))
    keys = _make_keys(torch.tensor(values), torch.tensor(ranks))
    assert keys.argsort().tolist() == np.lexsort((ranks, values)).tolist()
    read = _read_keys(keys)
    assert read[0].numpy().tobytes() == values.tobytes() and read[1].tolist() == ranks.tolist()
    wild = _make_keys(torch.tensor([np.inf, np.nan, FAR, -np.inf]), torch.arange(4))
    assert _read_keys(wild)[0].tolist() == [FAR, FAR, FAR, -np.inf]
