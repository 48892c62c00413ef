"""Lists of regions: the scan against numpy, decoded vectors and itself in parts; files and what is wrong with them."""

import mmap

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gsl_dist.errors import ArtefactError, DataError  # noqa: E402
from gsl_dist.hits import FAR  # noqa: E402
from gsl_dist.index import vlq as module  # noqa: E402
from gsl_dist.index.mapped import write_arrays  # noqa: E402
from gsl_dist.index.vlq import join_lists, make_lists, open_lists  # noqa: E402
from gsl_dist.quantizers import LineConfig, LloydConfig, make_quantizer, train_codebook  # noqa: E402

DIM, ROWS, CELLS, EDGES = 8, 1500, 24, 6
compiled = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])


def make_codes(bits=8, *, far=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.tensor((rng.normal(size=(ROWS, DIM)) + far).astype(np.float32))
    quantizer = make_quantizer(LineConfig(kind="vlq", sub_vectors=4, bits=bits, cells=CELLS, edges=EDGES), DIM)
    codebook = train_codebook(x, quantizer, LloydConfig(iterations=4)).codebook
    regions, codes = quantizer.encode(x, codebook)
    return codebook, rng.permutation(10 * ROWS)[:ROWS], regions.numpy(), codebook.pack(codes.numpy())


def make_queries(count=20, *, far=0.0, seed=5):
    return (np.random.default_rng(seed).normal(size=(count, DIM)) + far).astype(np.float32)


@pytest.fixture(scope="module", params=[8, 5])
def made(request):
    return make_codes(request.param)


def measure(codebook, regions, codes, queries):
    decoded = codebook.decode(regions, codebook.unpack(codes))
    return np.square(queries[:, None] - decoded).sum(2, dtype=np.float64)


def find_owner(array):
    while getattr(array, "base", None) is not None:
        array = array.base
    return array


@compiled
def test_looking_into_every_region_ranks_all_rows_by_their_decoded_vectors(made, compiled, monkeypatch):
    monkeypatch.setattr(module, "COMPILED", compiled)
    codebook, ids, regions, codes = made
    queries, lists = make_queries(), make_lists(codebook, ids, regions, codes)
    distances, found = lists.search(queries, ROWS, codebook.lists)
    plain = measure(codebook, regions, codes, queries)
    np.testing.assert_allclose(distances, np.sort(plain, axis=1), rtol=1e-4, atol=1e-4)
    assert (np.sort(found, axis=1) == np.sort(ids)).all()
    place = {number: row for row, number in enumerate(ids)}
    own = np.array([[plain[query, place[number]] for number in row] for query, row in enumerate(found.tolist())])
    np.testing.assert_allclose(distances, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probes", [1, 5, 40, CELLS * EDGES])
@pytest.mark.parametrize("k", [1, 10, 400])
def test_the_compiled_scan_finds_what_numpy_finds(made, probes, k, monkeypatch):
    lists, queries = make_lists(*made), make_queries()
    fast = lists.search(queries, k, probes)
    monkeypatch.setattr(module, "COMPILED", False)
    plain = lists.search(queries, k, probes)
    np.testing.assert_allclose(fast[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (fast[1] == plain[1]).mean() > 0.99  # rows as near as each other may change places


@compiled
@pytest.mark.parametrize("every", [1, 40], ids=["full", "sparse"])
def test_regions_are_looked_into_from_the_nearest_on_empty_ones_included(made, compiled, every, monkeypatch):
    monkeypatch.setattr(module, "COMPILED", compiled)
    codebook, (ids, regions, codes) = made[0], (part[::every] for part in made[1:])
    queries, lists = make_queries(), make_lists(codebook, ids, regions, codes)
    ends = codebook.coarse[codebook.edges]
    points = codebook.coarse[:, None] + codebook.feet[..., None] * (ends - codebook.coarse[:, None])
    reach = np.square(queries[:, None] - points.reshape(-1, DIM)).sum(2)
    assert every == 1 or (np.bincount(regions, minlength=codebook.lists) == 0).any()
    for probes in (1, 7, 30):
        found = lists.search(queries, ROWS, probes, cells=CELLS)[1]
        for query, row in enumerate(found):
            wanted = set(ids[np.isin(regions, np.argsort(reach[query])[:probes])].tolist())
            assert set(row[row >= 0].tolist()) == wanted


def test_only_regions_of_the_nearest_cells_are_ranked(made):
    codebook, ids, regions, _ = made
    queries, lists = make_queries(), make_lists(*made)
    found = lists.search(queries, ROWS, EDGES, cells=1)[1]
    nearest = np.square(queries[:, None] - codebook.coarse).sum(2).argmin(1)
    for cell, row in zip(nearest, found, strict=True):
        assert set(row[row >= 0].tolist()) == set(ids[regions // EDGES == cell].tolist())


@compiled
def test_a_query_that_finds_too_few_says_so(made, compiled, monkeypatch):
    monkeypatch.setattr(module, "COMPILED", compiled)
    lists = make_lists(*made)
    distances, ids = lists.search(make_queries(), ROWS, 1)
    missing = ids < 0
    assert missing.any(axis=1).all() and (distances[missing] == FAR).all() and (distances[~missing] < FAR).all()
    empty = make_lists(made[0], np.empty(0, np.int64), np.empty(0, np.int64), made[3][:0])
    distances, ids = empty.search(make_queries(), 3, 5)
    assert (ids == -1).all() and (distances == FAR).all()


@pytest.mark.parametrize("threads", [2, 7, 50])
def test_any_number_of_threads_answers_alike(made, threads):
    lists, queries = make_lists(*made), make_queries(33)
    (distances, ids), (others, other_ids) = (lists.search(queries, 10, 20, threads=count) for count in (1, threads))
    # A matrix product of fewer queries may round otherwise.
    np.testing.assert_allclose(distances, others, rtol=1e-4, atol=1e-5)
    assert (ids == other_ids).mean() > 0.98


def test_distances_far_from_the_origin_are_as_exact():
    codebook, ids, regions, codes = make_codes(far=300.0)
    queries = make_queries(far=300.0)
    distances, _ = make_lists(codebook, ids, regions, codes).search(queries, 5, codebook.lists)
    nearest = np.sort(measure(codebook, regions, codes, queries), axis=1)[:, :5]
    np.testing.assert_allclose(distances, nearest, rtol=2e-3)


def test_joined_shards_answer_as_one(made):
    codebook, ids, regions, codes = made
    shards = [make_lists(codebook, *(part[rank::3] for part in (ids, regions, codes))) for rank in range(3)]
    whole, joined = make_lists(*made), join_lists(shards)
    for name in ("offsets_R", "ids_N", "codes", "squares_N"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


def test_a_file_of_lists_is_mapped_and_answers_as_they_did(made, tmp_path):
    lists, queries = make_lists(*made), make_queries()
    lists.write(tmp_path / "shard")
    opened = open_lists(tmp_path / "shard", made[0])
    assert isinstance(find_owner(opened.codes), mmap.mmap) and opened.rows == ROWS
    for one, other in zip(lists.search(queries, 10, 20), opened.search(queries, 10, 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_empty_shard_is_a_file_too(made, tmp_path):
    make_lists(made[0], np.empty(0, np.int64), np.empty(0, np.int64), made[3][:0]).write(tmp_path / "shard")
    assert open_lists(tmp_path / "shard", made[0]).rows == 0


def damage_offsets(content):
    content["offsets"] = content["offsets"][::-1].copy()


def cut_codes(content):
    content["codes"] = content["codes"][:-1]


def drop_ids(content):
    del content["ids"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [(damage_offsets, "begin and end"), (cut_codes, "belong together"), (drop_ids, "not a file of lists")],
)
def test_arrays_that_do_not_belong_together_are_refused(made, damage, said, tmp_path):
    lists = make_lists(*made)
    content = {"offsets": lists.offsets_R, "ids": lists.ids_N, "codes": lists.codes, "squares": lists.squares_N}
    damage(content)
    write_arrays(tmp_path / "shard", content, {"fingerprint": made[0].fingerprint})
    with pytest.raises(ArtefactError, match=said):
        open_lists(tmp_path / "shard", made[0])


@pytest.mark.parametrize("content", [b"", b"no lists", b"\xff" * 100, (1 << 60).to_bytes(8, "little") + b"{}"])
def test_what_is_no_file_of_lists_is_refused(made, content, tmp_path):
    (tmp_path / "shard").write_bytes(content)
    with pytest.raises(ArtefactError, match="not a file of lists"):
        open_lists(tmp_path / "shard", made[0])


def test_a_file_cut_short_is_refused(made, tmp_path):
    make_lists(*made).write(tmp_path / "shard")
    whole = (tmp_path / "shard").read_bytes()
    (tmp_path / "shard").write_bytes(whole[:-1])
    with pytest.raises(ArtefactError, match="not a file of lists"):
        open_lists(tmp_path / "shard", made[0])


def test_lists_of_another_codebook_are_refused(made, tmp_path):
    make_lists(*made).write(tmp_path / "shard")
    with pytest.raises(ArtefactError, match="another codebook"):
        open_lists(tmp_path / "shard", make_codes(seed=9)[0])


def test_bad_rows_are_refused(made):
    codebook, ids, regions, codes = made
    twice = ids.copy()
    twice[1] = twice[0]
    for change, said in [
        ((twice, regions), "each id may occur once"),
        ((ids - ids.max(), regions), "ids are 0 or more"),
    ]:
        with pytest.raises(DataError, match=said):
            make_lists(codebook, *change, codes)
    with pytest.raises(DataError, match="regions are 0 to 143"):
        make_lists(codebook, ids, regions + 10_000, codes)


def test_cells_are_picked_as_sorting_would(made):
    scan = pytest.importorskip("gsl_dist.index.scan")
    reach = np.random.default_rng(3).integers(50, size=(40, 90)).astype(np.float32)
    reach[0, :80] = np.inf  # as after an overflow
    reach[1] = np.nan
    for cells in (1, 7, 90):
        picked = scan.pick_cells(reach, cells)
        assert all(len(set(near)) == cells and 0 <= min(near) <= max(near) < 90 for near in picked)
        found, wanted = np.take_along_axis(reach, picked, 1), np.sort(reach, axis=1)[:, :cells]
        np.testing.assert_array_equal(np.sort(found, axis=1)[2:], wanted[2:])
