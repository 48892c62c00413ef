"""Many cells: the search by way of super-cells against looking at all, mini-batches, seeds and the dead."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from meetings import drive, share_rows

from gsl_dist.codebook import Codebook
from gsl_dist.errors import DataError
from gsl_dist.quantizers import LloydConfig, ProductConfig, Rows, answer, coordinate, make_quantizer, train_codebook
from gsl_dist.quantizers import cells as cells_module
from gsl_dist.quantizers.base import find_cells, leave_over
from gsl_dist.quantizers.cells import Cells, CellSearch, divide_cells, hold_cells, measure_cells, search_partition
from gsl_dist.quantizers.kmeans import (
    MANY,
    Stats,
    add_stats,
    find_nearest,
    measure_stats,
    revive_dead,
    seed_centroids,
    sum_by_label,
    sum_touched,
    update_centroids,
)

# Under its own name the package gives the function.
coordinate_module = importlib.import_module("gsl_dist.quantizers.coordinate")
kmeans_module = importlib.import_module("gsl_dist.quantizers.kmeans")

ALL, TWO_LEVEL = CellSearch(two_level=False), CellSearch(two_level=True)


def make_uniform(rows, dim=6, *, seed=0):
    return torch.rand(rows, dim, generator=torch.Generator().manual_seed(seed))


def make_clusters(rows, dim=16, *, clusters=400, seed=0):
    centres = np.random.default_rng(99).normal(size=(clusters, dim))
    rng = np.random.default_rng(seed)
    rows_ND = centres[rng.integers(clusters, size=rows)] + 0.3 * rng.normal(size=(rows, dim))
    return torch.tensor(rows_ND.astype(np.float32))


def make_flat(rows, dim=24, *, seed=0):
    """Give rows near a plane of 4 dimensions, away from the origin."""
    plane = torch.randn(4, dim, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    return 5 + torch.randn(rows, 4, generator=draw) @ plane + 0.05 * torch.randn(rows, dim, generator=draw)


WORLDS = {"uniform": make_uniform, "clusters": make_clusters, "flat": make_flat}
every_world = pytest.mark.parametrize("world", WORLDS)


def make_centroids(world, cells=2000):
    """Give centroids as one of Lloyd's iterations leaves them, and rows that it did not see."""
    x = WORLDS[world](3 * cells)
    return refine(x, x[:cells]), WORLDS[world](4000, seed=1)


def refine(x, centroids):
    return torch.tensor(update_centroids(centroids[None].numpy(), measure_stats(x[None], centroids[None]))[0])


def make_codebook(centroids):
    books = np.zeros((2, 2, centroids.shape[1] // 2))
    return Codebook(coarse=centroids.numpy(), books=books, residual=True)


def make_pq(cells, *, dim=8, bits=2):
    return make_quantizer(ProductConfig(sub_vectors=2, bits=bits, cells=cells), dim)


# The search


@every_world
def test_two_levels_find_the_nearest_of_99_in_100_rows_and_err_by_a_thousandth(world):
    centroids, x = make_centroids(world)
    labels, distances = Cells(centroids).find(x, TWO_LEVEL)
    nearest, least = Cells(centroids).find(x, ALL)
    assert (labels == nearest).float().mean() >= 0.99
    assert least.sum() * (1 - 1e-6) <= distances.sum() <= 1.001 * least.sum()


@every_world
def test_looking_into_every_super_cell_is_looking_at_all_cells(world):
    centroids, x = make_centroids(world, cells=500)
    labels, distances = Cells(centroids).find(x, CellSearch(two_level=True, width=1000))
    nearest, least = Cells(centroids).find(x, ALL)
    assert torch.equal(labels, nearest)
    torch.testing.assert_close(distances, least, rtol=1e-3, atol=1e-4)


@every_world
def test_the_distance_is_that_to_the_cell_that_was_found(world):
    centroids, x = make_centroids(world)
    labels, distances = Cells(centroids).find(x, CellSearch(two_level=True, width=1))
    torch.testing.assert_close(distances, (x - centroids[labels]).square().sum(1), rtol=1e-4, atol=1e-5)


@every_world
def test_a_wider_search_never_finds_anything_farther(world):
    centroids, x = make_centroids(world)
    partition = divide_cells(centroids)
    reach = [search_partition(x, partition, width)[1] for width in (1, 2, 4, 8, 16, 32)]
    assert all((wider <= narrower + 1e-5).all() for narrower, wider in itertools.pairwise(reach))


def test_the_width_follows_the_data():
    grouped, scattered = (Cells(make_centroids(world)[0]).width for world in ("clusters", "uniform"))
    flat = Cells(torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))).width
    assert grouped == scattered == 16 < 2 * scattered < flat


@every_world
def test_a_row_is_given_the_same_cell_whatever_rows_are_beside_it(world):
    centroids, x = make_centroids(world)
    codebook, x = make_codebook(centroids), x[:1000]
    for search in (TWO_LEVEL, ALL):
        cells = hold_cells(codebook, x)
        together = cells.find(x, search)[0]
        apart = torch.cat([cells.find(part, search)[0] for part in x.split([1, 2, 7, 90, 400, 500])])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        assert torch.equal(apart, together) and torch.equal(cells.find(x[order], search)[0], together[order])


@every_world
@pytest.mark.parametrize("search", [TWO_LEVEL, ALL], ids=["two levels", "all"])
def test_chunks_change_nothing(world, search, monkeypatch):
    centroids, x = make_centroids(world)
    x = x[:500]
    labels, distances = Cells(centroids).find(x, search)
    monkeypatch.setattr(cells_module, "_CHUNK_BYTES", 30_000)
    monkeypatch.setattr(cells_module, "_CHUNK_FLOATS", 500)
    monkeypatch.setattr(kmeans_module, "_CHUNK_FLOATS", 3_000)
    monkeypatch.setattr(kmeans_module, "_CHUNK_WORDS", 77)
    in_chunks = Cells(centroids).find(x, search)
    assert torch.equal(in_chunks[0], labels)
    torch.testing.assert_close(in_chunks[1], distances, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("search", [TWO_LEVEL, ALL], ids=["two levels", "all"])
def test_of_equal_cells_the_first_is_taken(search, monkeypatch):
    monkeypatch.setattr(kmeans_module, "_CHUNK_WORDS", 100)
    # In one dimension equal cells are equally far to the last bit.
    centroids, x = make_uniform(300, 1), make_uniform(4000, 1, seed=1)
    twice = torch.cat([centroids, centroids.flip(0)])
    assert (Cells(twice).find(x, search)[0] < 300).all()


@pytest.mark.parametrize("cells", [2, 3, 7])
def test_a_few_cells_may_be_searched_by_two_levels_too(cells):
    centroids, x = make_centroids("uniform", cells=cells)
    assert torch.equal(Cells(centroids).find(x, TWO_LEVEL)[0], Cells(centroids).find(x, ALL)[0])


def test_cells_that_all_lie_in_one_place_are_one_super_cell():
    partition = divide_cells(torch.zeros(50, 4))
    assert [members.tolist() for members in partition.members] == [list(range(50))]
    assert not Cells(torch.zeros(50, 4)).find(make_uniform(20, 4), TWO_LEVEL)[0].any()


def test_every_cell_is_in_one_super_cell_and_none_is_empty():
    partition = divide_cells(make_centroids("clusters")[0])
    assert sorted(torch.cat(partition.members).tolist()) == list(range(2000))
    assert all(len(members) and (members.diff() > 0).all() for members in partition.members)


def test_no_rows_are_given_no_cells():
    centroids, _ = make_centroids("uniform", cells=50)
    for search in (TWO_LEVEL, ALL):
        labels, distances = Cells(centroids).find(torch.empty(0, 6), search)
        assert len(labels) == len(distances) == 0 and labels.dtype == torch.int64


def test_two_levels_begin_above_a_limit_and_only_where_they_save_something(monkeypatch):
    asked = []
    search = search_partition
    monkeypatch.setattr(cells_module, "search_partition", lambda *given: asked.append(given[2]) or search(*given))
    x = make_flat(8)
    for cells, two_level in ((MANY, False), (3 * MANY, True)):
        Cells(make_flat(cells)).find(x)
        assert bool(asked) == two_level, cells
    asked.clear()
    Cells(torch.randn(3 * MANY, 24, generator=torch.Generator().manual_seed(0))).find(x)
    assert not asked


def test_encoding_trains_nothing_twice_for_the_same_codebook(monkeypatch):
    built, divide = [], divide_cells
    monkeypatch.setattr(cells_module, "divide_cells", lambda coarse: built.append(len(coarse)) or divide(coarse))
    one, other = (make_codebook(make_flat(MANY * 2, seed=seed)) for seed in (0, 1))
    x = make_flat(300, seed=2)
    first = find_cells(x, one)
    assert torch.equal(torch.cat([find_cells(part, one) for part in x.split(100)]), first) and len(built) == 1
    assert not torch.equal(find_cells(x, other), first) and len(built) == 2
    assert torch.equal(find_cells(x, one), first)


def test_rows_are_coded_by_what_the_cell_that_was_found_leaves_over():
    codebook, x = make_codebook(make_flat(MANY * 2)), make_flat(500, seed=1)
    cells, rest = leave_over(x, codebook)
    torch.testing.assert_close(rest, x - torch.tensor(codebook.coarse)[cells])


def test_cells_that_were_first_held_without_gradients_may_meet_them():
    codebook, x = make_codebook(make_flat(MANY * 2)), make_flat(500, seed=1)
    with torch.inference_mode():
        before = find_cells(x, codebook)
    assert torch.equal(leave_over(x.requires_grad_(), codebook)[0], before)
    (x[:, None] * hold_cells(codebook, x).coarse_CD[:3]).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor(codebook.coarse)[:3].sum(0).expand(500, -1))


# Statistics


@pytest.mark.parametrize("sizes", [[600], [200, 400], [0, 1, 599], [100] * 6])
def test_statistics_of_touched_cells_add_up_to_those_of_all(sizes):
    x, centroids = make_uniform(600), make_uniform(900, seed=1)
    labels, distances = (found[0] for found in find_nearest(x[None], centroids[None]))
    whole = sum_by_label(x[None], labels[None], distances[None], 900)
    pieces = zip(x.split(sizes), labels.split(sizes), distances.split(sizes), strict=True)
    parts = [sum_touched(*piece, 900) for piece in pieces]
    total = add_stats(parts)
    assert np.array_equal(total.counts_GK, whole.counts_GK) and total.rows == whole.rows == 600
    np.testing.assert_allclose(total.sums_GKd, whole.sums_GKd, atol=1e-12)
    assert total.error == pytest.approx(whole.error)


def test_no_more_leaves_a_worker_than_it_has_rows():
    codebook, x = make_codebook(make_flat(2 * MANY)), make_flat(50, seed=1)
    stats = measure_cells(x, codebook)
    assert len(stats.touched_T) == len(stats.sums_Td) <= 50 and stats.counts_T.sum() == 50


# The dead


def assert_all_alive(x, centroids, *, within):
    """Assert that every centroid wins rows after so many of Lloyd's iterations; give the errors of these."""
    errors = []
    for _ in range(within):
        stats = measure_stats(x[None], centroids[None])
        errors.append(stats.mean_error)
        centroids = torch.tensor(update_centroids(centroids[None].numpy(), stats)[0])
    assert (measure_stats(x[None], centroids[None]).counts_GK > 0).mean() >= 0.99
    return errors


def test_thousands_of_dead_cells_come_alive():
    x = make_uniform(20_000)
    centroids = torch.full((2500, 6), 1e3)
    centroids[:100] = x[:100]
    errors = assert_all_alive(x, centroids, within=8)
    assert errors[-1] < 0.4 * errors[0]


def test_the_halves_of_one_cell_go_all_ways():
    stats = Stats(np.array([[1000.0] + [0.0] * 255]), np.zeros((1, 256, 4)) + 1000.0, 0.0, 1000)
    stats.sums_GKd[0, 1:] = 0
    revived = revive_dead(stats)
    halves = revived.sums_GKd[0] / revived.counts_GK[0][:, None]
    assert len(np.unique(halves.astype(np.float32), axis=0)) == 256
    assert np.linalg.matrix_rank(halves - halves.mean(0), tol=1e-6) == 4
    np.testing.assert_allclose(halves, 1, atol=0.01)
    assert revived.counts_GK.sum() == pytest.approx(1000) and revived.rows == 1000


def test_the_dead_take_over_as_if_the_fullest_were_halved_one_after_another():
    rng = np.random.default_rng(0)
    counts = np.concatenate([rng.integers(1, 5000, size=300).astype(float), np.zeros(2000)])[None]
    slow = counts[0].copy()
    for dead in range(300, 2300):
        fullest = slow.argmax()
        slow[[dead, fullest]] = slow[fullest] / 2
    revived = revive_dead(Stats(counts, np.ones((1, 2300, 2)), 0.0, 1))
    assert np.array_equal(revived.counts_GK[0], slow)


def test_what_lives_and_what_cannot_be_halved_is_left_alone():
    alive = Stats(np.full((1, 3), 5.0), np.ones((1, 3, 2)), 0.0, 15)
    assert revive_dead(alive) is alive
    single = Stats(np.array([[1.0, 0.0, 1.5]]), np.ones((1, 3, 2)), 0.0, 2)
    assert np.array_equal(revive_dead(single).counts_GK, single.counts_GK)


# Seeds


def refuse(*given):
    raise AssertionError("k-means++ was called")


def test_many_cells_are_seeded_with_distinct_rows_at_once(monkeypatch):
    monkeypatch.setattr(kmeans_module, "_seed_group", refuse)
    sample = make_uniform(MANY + 100).repeat(2, 1).numpy()[None]
    one, two, other = (seed_centroids(sample, MANY + 1, np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert len({row.tobytes() for row in one}) == MANY + 1
    assert {row.tobytes() for row in one} <= {row.tobytes() for row in sample[0]}
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    with pytest.raises(AssertionError, match=r"k-means\+\+ was called"):
        seed_centroids(sample, MANY, np.random.default_rng(0))


def test_zeros_of_either_sign_are_the_same_row():
    sample = np.zeros((1, MANY + 2, 1), dtype=np.float32)
    sample[0, :, 0] = np.arange(MANY + 2)
    sample[0, 1, 0] = -0.0
    assert len(seed_centroids(sample, MANY + 1, np.random.default_rng(0))[0]) == MANY + 1
    with pytest.raises(DataError, match=f"{MANY + 1} distinct among {MANY + 2} sampled.* {MANY + 2} cells"):
        seed_centroids(sample, MANY + 2, np.random.default_rng(0))


def test_the_sample_has_two_rows_for_each_of_many_cells_and_no_more_for_the_codewords():
    cells = MANY + 4
    x, quantizer = make_uniform(30_000, 2), make_pq(cells, dim=2)
    shares = share_rows(x, [0, 30_000])
    _, asked = drive(quantizer, shares, LloydConfig(iterations=1))
    sizes = {ask.phase: len(answer(ask, shares[0], quantizer)) for ask in asked if ask.what == "sample"}
    assert sizes == {"cells": 2 * cells, "books": 8192}


def test_rows_that_are_mostly_copies_are_refused_before_the_first_iteration():
    x, quantizer = make_uniform(MANY // 2, 2).repeat(3, 1), make_pq(MANY + 1, dim=2)
    with pytest.raises(DataError, match=f"{MANY // 2} distinct among .* cells need at least as many that differ"):
        train_codebook(x, quantizer, LloydConfig())


@pytest.mark.parametrize("bounds", [[0, MANY], [0, 5, MANY]])
def test_more_cells_than_rows_are_refused_after_one_question(bounds):
    coordination = coordinate(make_pq(MANY + 1, dim=2), LloydConfig(), seed=0)
    ask, x = next(coordination), make_uniform(MANY, 2)
    assert ask.what == "moments"
    with pytest.raises(DataError, match=f"got {MANY}, but a codebook with {MANY + 1} centroids needs"):
        coordination.send([answer(ask, rows, make_pq(MANY + 1, dim=2)) for rows in share_rows(x, bounds)])


# Mini-batches and any number of workers


SETTINGS = {
    "two levels": {"cell_search": TWO_LEVEL},
    "batches": {"batch_share": 1 / 3},
    "both": {"cell_search": TWO_LEVEL, "batch_share": 1 / 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("bounds", [[0, 900], [0, 450, 900], [0, 1, 500, 900], [0, 0, 900]])
def test_any_number_of_workers_trains_the_same_cells(setting, bounds):
    x, quantizer = make_clusters(900, 8), make_pq(60)
    lloyd = LloydConfig(iterations=7, **SETTINGS[setting])
    trained, _ = drive(quantizer, share_rows(x, bounds), lloyd)
    alone = train_codebook(x, quantizer, lloyd)
    np.testing.assert_allclose(trained.codebook.coarse, alone.codebook.coarse, atol=1e-5)
    np.testing.assert_allclose(trained.codebook.books, alone.codebook.books, atol=1e-5)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-5)


@pytest.mark.parametrize("bounds", [[0, 9000], [0, 2000, 9000], [0, 1, 5000, 9000]])
def test_any_number_of_workers_trains_the_same_many_cells(bounds):
    x, quantizer = make_uniform(9000, 4), make_pq(MANY + 4, dim=4)
    lloyd = LloydConfig(iterations=4, batch_share=1 / 2, cell_search=TWO_LEVEL)
    trained, _ = drive(quantizer, share_rows(x, bounds), lloyd)
    alone = train_codebook(x, quantizer, lloyd)
    np.testing.assert_allclose(trained.codebook.coarse, alone.codebook.coarse, atol=1e-5)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-5)


def test_rows_that_are_missing_do_not_move_the_others_to_other_batches():
    x, numbers = make_clusters(900, 8), np.delete(np.arange(900), [3, 4, 500, 899])
    kept, quantizer = x[numbers], make_pq(60)
    lloyd = LloydConfig(iterations=4, batch_share=1 / 3)

    def share(*bounds):
        edges = np.searchsorted(numbers, bounds)
        return [Rows(kept[a:b], 0, 900, numbers_N=numbers[a:b]) for a, b in itertools.pairwise(edges)]

    one, three = (drive(quantizer, share(*bounds), lloyd)[0] for bounds in ([0, 900], [0, 300, 600, 900]))
    np.testing.assert_allclose(one.codebook.coarse, three.codebook.coarse, atol=1e-5)


def test_the_whole_as_one_batch_is_lloyd_to_the_last_bit():
    x, quantizer = make_clusters(900, 8), make_pq(60)
    plain, whole = (train_codebook(x, quantizer, LloydConfig(iterations=5, batch_share=s)) for s in (1.0, 0.9))
    assert plain.codebook.fingerprint == whole.codebook.fingerprint


@pytest.mark.parametrize("batches", [2, 3, 10])
def test_every_row_takes_part_once_a_round_in_batches_of_like_size(batches):
    rows = Rows(torch.empty(10_000, 1), 0, 10_000)
    drawn = [coordinate_module._draw_batch(rows, batch, batches) for batch in range(batches)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(10_000))
    assert max(map(len, drawn)) < 1.1 * min(map(len, drawn))


def test_batches_come_close_to_all_rows_and_answer_with_fewer():
    x, quantizer = make_clusters(6000, 8), make_pq(100)
    full, _ = drive(quantizer, share_rows(x, [0, 6000]), LloydConfig(iterations=10))
    lloyd = LloydConfig(iterations=30, batch_share=0.1)
    part, asked = drive(quantizer, share_rows(x, [0, 6000]), lloyd)
    assert part.relative_error < 1.05 * full.relative_error
    turns = [ask for ask in asked if ask.what == "stats" and ask.turn]
    sizes = [answer(ask, Rows(x, 0, 6000), quantizer).rows for ask in turns]
    assert max(sizes[:30]) < 700 and set(sizes[30:]) == {6000}


def test_a_cell_is_given_up_when_every_row_had_its_turn_and_none_fell_into_it():
    x = make_clusters(600, 8)
    coarse = x[:20].clone()
    coarse[7] = 1e3
    start = make_codebook(coarse)
    running, codebook = coordinate_module.Running(start, 3), start
    for turn in range(3):
        batch = coordinate_module._draw_batch(Rows(x, 0, 600), turn, 3)
        stats = running.add(measure_stats(x[batch][None], torch.tensor(codebook.coarse)[None]))
        codebook = make_codebook(torch.tensor(update_centroids(codebook.coarse[None], stats)[0]))
        assert (np.abs(codebook.coarse[7]).max() > 100) == (turn < 2), turn
    assert (measure_stats(x[None], torch.tensor(codebook.coarse)[None]).counts_GK > 0).all()


def test_a_cell_that_came_alive_is_given_a_round_to_win_rows():
    start = make_codebook(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    running = coordinate_module.Running(start, 4)
    nothing = Stats(np.array([[8.0, 0.0]]), np.array([[[8.0, 8.0], [0.0, 0.0]]]), 0.0, 8)
    alive = [running.add(nothing).sums_GKd[0, 1] for _ in range(7)]
    # The far one fades for a round, then lies beside the first.
    assert alive[2][0] > 3 and all(np.ptp(one) < 1 for one in alive[4:])
    assert (running.add(nothing).counts_GK > 0).all()


def test_refining_goes_on_from_the_cells_that_there_are():
    x, quantizer = make_clusters(2000, 8), make_pq(40)
    start = train_codebook(x, quantizer, LloydConfig(iterations=10))
    lloyd = LloydConfig(refresh_iterations=8, batch_share=1 / 4, cell_search=TWO_LEVEL)
    again = train_codebook(x, quantizer, lloyd, start=start.codebook)
    assert again.relative_error < 1.03 * start.relative_error


# Progress


def test_every_question_for_statistics_says_which_turn_of_its_phase_it_is():
    x, quantizer = make_clusters(600, 8), make_pq(10)
    trained, asked = drive(quantizer, share_rows(x, [0, 600]), LloydConfig(iterations=3))
    turns = [(ask.phase, ask.turn.number, ask.turn.of) for ask in asked if ask.turn]
    assert turns == [(phase, number, 3) for phase in ("cells", "books") for number in range(3)]
    assert asked[-1].turn is None and asked[-1].what == "stats"
    errors = [ask.turn.error for ask in asked if ask.turn and ask.phase == "books"]
    assert errors[0] is None and errors[1] >= errors[2] >= trained.relative_error
