"""One coordinator over any number of workers trains the codebook that one process trains."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from meetings import drive, share_rows

from gsl_dist.codebook import Codebook
from gsl_dist.errors import DataError
from gsl_dist.quantizers import (
    AdditiveConfig,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    answer,
    cells,
    coordinate,
    decode,
    kmeans,
    make_quantizer,
    train_codebook,
)
from gsl_dist.quantizers.coordinate import shake_books
from gsl_dist.quantizers.kmeans import Stats, Touched, join_stats, update_centroids

SHAPES = [(1, False), (6, True), (6, False)]
every_shape = pytest.mark.parametrize(("cells", "residual"), SHAPES, ids=["flat", "residual", "cells"])
LLOYD = LloydConfig(iterations=6, refresh_iterations=3)
KINDS = {
    "pq": ProductConfig(sub_vectors=2, bits=4),
    "opq": OptimizedConfig(kind="opq", sub_vectors=2, bits=4, rotation_iterations=5),
    "rq": AdditiveConfig(kind="rq", books=2, bits=4, joint_iterations=3),
    "lsq": AdditiveConfig(kind="lsq", books=2, bits=4, joint_iterations=8),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# Under its own name the package gives the function.
module = importlib.import_module("gsl_dist.quantizers.coordinate")


def make_rows(rows=600, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(15, dim))
    return torch.tensor((centres[rng.integers(15, size=rows)] + rng.normal(size=(rows, dim))).astype(np.float32))


def make_pq(cells=1, residual=False, bits=4, dim=8):
    return make_quantizer(ProductConfig(sub_vectors=2, bits=bits, cells=cells, residual=residual), dim)


def make_kind(kind, *, cells=1, dim=8):
    return make_quantizer(KINDS[kind].model_copy(update={"cells": cells}), dim)


@every_shape
@pytest.mark.parametrize("bounds", [[0, 600], [0, 300, 600], [0, 200, 400, 600], [0, 1, 450, 600], [0, 0, 600]])
def test_any_number_of_workers_trains_the_same_codebook(cells, residual, bounds):
    x, quantizer = make_rows(), make_pq(cells, residual)
    trained, _ = drive(quantizer, share_rows(x, bounds), LLOYD)
    alone = train_codebook(x, quantizer, LLOYD)
    np.testing.assert_allclose(trained.codebook.coarse, alone.codebook.coarse, atol=1e-5)
    np.testing.assert_allclose(trained.codebook.books, alone.codebook.books, atol=1e-5)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-5)
    assert trained.codebook.residual == residual


@pytest.mark.parametrize("bounds", [[0, 300, 600], [0, 1, 450, 600]])
def test_a_refresh_by_any_number_of_workers_is_the_same(bounds):
    x, quantizer = make_rows(), make_pq(6, residual=True)
    start = train_codebook(make_rows(seed=1), quantizer, LLOYD).codebook
    trained, _ = drive(quantizer, share_rows(x, bounds), LLOYD, start=start)
    alone = train_codebook(x, quantizer, LLOYD, start=start)
    np.testing.assert_allclose(trained.codebook.books, alone.codebook.books, atol=1e-5)


def test_a_seed_decides_the_codebook_to_the_last_bit():
    x, quantizer = make_rows(), make_pq(6, residual=True)
    one, two, other = (train_codebook(x, quantizer, LLOYD, seed=seed).codebook.fingerprint for seed in (1, 1, 2))
    assert one == two != other


def test_the_error_is_that_of_the_decoded_rows_over_their_variance():
    x, quantizer = make_rows(), make_pq(6, residual=True)
    trained = train_codebook(x, quantizer, LLOYD)
    decoded = decode(*quantizer.encode(x, trained.codebook), trained.codebook)
    wanted = (x - decoded).square().sum() / (x - x.mean(0)).square().sum()
    assert trained.relative_error == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_warm_start_on_the_same_rows_lowers_the_error_or_keeps_it(rounds):
    x, quantizer = make_rows(), make_pq()
    trained = train_codebook(x, quantizer, LloydConfig(iterations=1))
    for _ in range(rounds):
        before = trained.relative_error
        trained = train_codebook(x, quantizer, LloydConfig(refresh_iterations=2), start=trained.codebook)
        assert trained.relative_error <= before * (1 + 1e-6)


def test_a_warm_start_follows_rows_that_moved():
    quantizer = make_pq(6, residual=True)
    start = train_codebook(make_rows(), quantizer, LLOYD).codebook
    moved = make_rows() + 3
    stale = quantizer.assign(quantizer.prepare(moved, start, "books"), start, "books").mean_error / float(
        (moved - moved.mean(0)).square().sum(1).mean()
    )
    assert train_codebook(moved, quantizer, LLOYD, start=start).relative_error < 0.5 * stale


def test_a_warm_start_asks_for_no_sample():
    x, quantizer = make_rows(), make_pq(6, residual=True)
    trained, asked = drive(quantizer, share_rows(x, [0, 600]), LLOYD)
    new = [("sample", "cells"), *[("stats", "cells")] * 6, ("sample", "books"), *[("stats", "books")] * 7]
    assert [(ask.what, ask.phase) for ask in asked] == [("moments", ""), *new]
    _, asked = drive(quantizer, share_rows(x, [0, 600]), LLOYD, start=trained.codebook)
    wanted = [("moments", ""), *[("stats", "cells")] * 3, *[("stats", "books")] * 4]
    assert [(ask.what, ask.phase) for ask in asked] == wanted


def test_the_sample_is_bounded_and_the_same_however_rows_are_divided():
    x, quantizer = torch.arange(20_000.0)[:, None].expand(-1, 8), make_pq()
    coordination = coordinate(quantizer, LLOYD, seed=0)
    moments = next(coordination)
    ask = coordination.send([answer(moments, rows, quantizer) for rows in share_rows(x, [0, 20_000])])
    assert ask.what == "sample"
    samples = [
        np.concatenate([answer(ask, rows, quantizer) for rows in share_rows(x, bounds)])
        for bounds in ([0, 20_000], [0, 7, 12_345, 20_000])
    ]
    assert np.array_equal(*samples) and len(samples[0]) == 8192
    assert samples[0][[0, -1], 0].tolist() == [0, 19_999]


@every_kind
def test_answers_that_are_joined_on_their_way_train_the_same_codebook(kind):
    x, quantizer = make_rows(), make_kind(kind, cells=5)
    shares = share_rows(x, [0, 10, 100, 250, 251, 400, 520, 600])
    plain, joined = (drive(quantizer, shares, LLOYD, fan_in=fan_in)[0] for fan_in in (None, 2))
    for name, array in plain.codebook.arrays().items():
        np.testing.assert_allclose(array, joined.codebook.arrays()[name], atol=1e-5)
    assert joined.relative_error == pytest.approx(plain.relative_error, rel=1e-5)


def test_statistics_of_many_cells_stay_sparse_when_they_are_joined(monkeypatch):
    monkeypatch.setattr(kmeans, "MANY", 16)
    monkeypatch.setattr(cells, "MANY", 16)
    x, quantizer = make_rows(), make_pq(cells=40)
    shares, whole_rows = share_rows(x, [0, 100, 250, 400, 600]), share_rows(x, [0, 600])
    ask = next(ask for ask in drive(quantizer, shares, LLOYD)[1] if ask.what == "stats")
    [whole], parts = ([answer(ask, rows, quantizer) for rows in held] for held in (whole_rows, shares))
    joined = join_stats(parts)
    assert isinstance(joined, Touched) and np.array_equal(joined.touched_T, whole.touched_T)
    assert np.array_equal(joined.counts_T, whole.counts_T) and joined.rows == whole.rows == 600
    np.testing.assert_allclose(joined.sums_Td, whole.sums_Td, rtol=1e-9)


@every_kind
def test_what_the_coordinator_sends_and_takes_in_is_the_same_of_ten_times_the_rows(kind):
    quantizer, seen = make_kind(kind, cells=5), {}
    for rows in (9_000, 90_000):
        sizes = []
        drive(quantizer, share_rows(make_rows(rows), [0, rows // 2, rows]), LLOYD, sizes=sizes)
        seen[rows] = {
            (what, name): max(size[place] for size in sizes if size[0] == what)
            for what in ("moments", "sample", "stats")
            for place, name in ((1, "sent"), (2, "taken in"))
        }
    assert all(size <= seen[9_000][key] + 64 for key, size in seen[90_000].items())


@pytest.mark.parametrize("workers", [9, 64])
def test_joined_on_their_way_answers_of_any_number_of_workers_are_as_much_to_take_in(workers):
    quantizer, x, seen = make_pq(6, residual=True), make_rows(), {}
    for count in (2, workers):
        sizes = seen[count] = []
        bounds = np.linspace(0, len(x), count + 1).astype(int)
        drive(quantizer, share_rows(x, bounds), LLOYD, sizes=sizes, fan_in=2)
    stats = {count: max(size[2] for size in sizes if size[0] == "stats") for count, sizes in seen.items()}
    assert stats[workers] <= stats[2] + 64


def test_too_few_rows_are_refused_however_they_are_divided():
    quantizer = make_pq(bits=6)
    with pytest.raises(DataError, match="got 63, but a codebook with 64 centroids needs at least as many"):
        drive(quantizer, share_rows(make_rows(63), [0, 30, 63]), LLOYD)
    assert train_codebook(make_rows(64), quantizer, LLOYD).relative_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e4])
def test_constant_rows_are_refused(value):
    with pytest.raises(DataError, match="rows must be finite and differ"):
        train_codebook(torch.full((100, 8), value), make_pq(), LLOYD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(value):
    x = make_rows()
    x[5, 3] = value
    with pytest.raises(DataError, match="rows must be finite"):
        train_codebook(x, make_pq(), LLOYD)


def test_fewer_distinct_rows_than_codewords_are_coded_exactly():
    x = make_rows(7).repeat(20, 1)
    assert train_codebook(x, make_pq(), LLOYD).relative_error == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bounds", [[0, 300, 600], [0, 200, 400, 600], [0, 1, 450, 600], [0, 0, 600]])
@pytest.mark.parametrize("cells", [1, 6], ids=["flat", "residual"])
@every_kind
def test_any_number_of_workers_trains_the_same_codebook_of_every_kind(kind, cells, bounds):
    x, quantizer = make_rows(), make_kind(kind, cells=cells)
    trained, _ = drive(quantizer, share_rows(x, bounds), LLOYD)
    alone = train_codebook(x, quantizer, LLOYD)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-4)
    for name, array in alone.codebook.arrays().items():
        np.testing.assert_allclose(trained.codebook.arrays()[name], array, atol=1e-4)


@pytest.mark.parametrize("bounds", [[0, 300, 600], [0, 1, 450, 600]])
@every_kind
def test_a_refresh_of_every_kind_is_the_same_by_any_number_of_workers(kind, bounds):
    x, quantizer = make_rows(), make_kind(kind, cells=6)
    start = train_codebook(make_rows(seed=1), quantizer, LLOYD).codebook
    trained, _ = drive(quantizer, share_rows(x, bounds), LLOYD, start=start)
    alone = train_codebook(x, quantizer, LLOYD, start=start)
    for name, array in alone.codebook.arrays().items():
        np.testing.assert_allclose(trained.codebook.arrays()[name], array, atol=1e-4)


@every_kind
def test_a_seed_decides_a_codebook_of_every_kind_to_the_last_bit(kind):
    x, quantizer = make_rows(), make_kind(kind, cells=6)
    one, two, other = (train_codebook(x, quantizer, LLOYD, seed=seed).codebook.fingerprint for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("rounds", [1, 3])
@every_kind
def test_a_warm_start_of_every_kind_on_the_same_rows_lowers_the_error_or_keeps_it(kind, rounds):
    x, quantizer = make_rows(), make_kind(kind)
    first = trained = train_codebook(x, quantizer, LloydConfig(iterations=1))
    for _ in range(rounds):
        before = trained.relative_error
        trained = train_codebook(x, quantizer, LloydConfig(refresh_iterations=4), start=trained.codebook)
        # lsq begins its search of codes from nothing, and may end with others.
        assert trained.relative_error <= before * (1.02 if kind == "lsq" else 1 + 1e-6)
    assert trained.codebook.kind == first.codebook.kind


@every_kind
def test_rows_are_prepared_once_a_phase_and_again_for_another_training(kind):
    x, quantizer, prepared = make_rows(), make_kind(kind, cells=6), []

    class Counting(type(quantizer)):
        def prepare(self, x_ND, codebook, phase):
            prepared.append((len(x_ND), phase))
            return super().prepare(x_ND, codebook, phase)

    counting, shares = Counting(quantizer.config, 8), share_rows(x, [0, 250, 600])
    trained, _ = drive(counting, shares, LLOYD)
    phases = [phase for phase, _ in quantizer.plan(LLOYD, refine=False)]
    assert [phase for rows, phase in prepared if rows == 250] == phases
    assert [phase for rows, phase in prepared if rows == 350] == phases
    # The sample, which here is all of the rows.
    assert [phase for rows, phase in prepared if rows == 600] == phases
    prepared.clear()
    drive(counting, shares, LLOYD, start=trained.codebook)
    again = [phase for phase, _ in quantizer.plan(LLOYD, refine=True)]
    assert prepared == [(rows, phase) for phase in again for rows in (250, 350)]


def make_books(*, books=4, words=64, dim=6):
    rng = np.random.default_rng(0)
    # Dimensions of unlike spread, each book about a centre of its own.
    spread = np.array([8, 4, 2, 1, 0.5, 0])
    return Codebook(
        coarse=np.zeros((1, dim)), books=rng.normal(size=(books, words, dim)) * spread, residual=False, kind="lsq"
    )


def test_shaking_with_no_iterations_left_moves_nothing():
    codebook = make_books()
    assert np.array_equal(shake_books(codebook, 0.0, np.random.default_rng(1)).books, codebook.books)


@pytest.mark.parametrize("books", [1, 4, 16])
@pytest.mark.parametrize("left", [0.25, 1.0])
def test_shaking_moves_codewords_by_their_deviation_over_the_root_of_the_books(books, left):
    codebook = make_books(books=books, words=256)
    moved = shake_books(codebook, left, np.random.default_rng(1)).books - codebook.books
    wanted = 0.3 * codebook.books.std(axis=(0, 1)) * np.sqrt(left / books)
    np.testing.assert_allclose(moved.std(axis=(0, 1)), wanted, rtol=0.12, atol=1e-7)
    assert np.abs(moved.mean(axis=(0, 1)))[:5].max() < 0.3 * wanted.max()
    assert not moved[..., 5].any()


def test_shaking_leaves_the_rest_of_the_codebook_and_the_books_it_was_given_alone():
    codebook = make_books()
    before = codebook.fingerprint
    shaken = shake_books(codebook, 1.0, np.random.default_rng(1))
    assert codebook.fingerprint == before != shaken.fingerprint
    assert np.array_equal(shaken.coarse, codebook.coarse) and shaken.kind == "lsq"


@pytest.mark.parametrize("refine", [False, True], ids=["new", "refined"])
@every_kind
def test_books_are_shaken_in_annealing_alone_less_and_less_to_nothing(kind, refine, monkeypatch):
    x, quantizer, shares = make_rows(), make_kind(kind, cells=6), []
    start = train_codebook(x, quantizer, LLOYD).codebook if refine else None
    monkeypatch.setattr(module, "shake_books", lambda codebook, left, rng: shares.append(left) or codebook)
    train_codebook(x, quantizer, LLOYD, start=start)
    assert shares == ([1 - turn / 8 for turn in range(1, 9)] if kind == "lsq" and not refine else [])


def record_errors(x, iterations, stride, monkeypatch, quantizer):
    """Give the errors before each iteration of the codewords, and the last."""
    monkeypatch.setattr(module, "_STRIDE", stride)
    trained, asked = drive(quantizer, share_rows(x, [0, len(x)]), LloydConfig(iterations=iterations))
    turns = [ask.turn.error for ask in asked if ask.turn and ask.phase in ("books", "cells") and ask.turn.number]
    return [*turns, trained.relative_error]


@pytest.mark.parametrize("seed", range(5))
def test_going_further_never_raises_the_error(seed, monkeypatch):
    # Continuous rows, so many that no codeword dies.
    x = torch.tensor(np.random.default_rng(seed).normal(size=(4000, 4)), dtype=torch.float32)
    quantizer = make_quantizer(ProductConfig(sub_vectors=1, bits=4), 4)
    errors = record_errors(x, 30, 1.9, monkeypatch, quantizer)
    assert len(errors) == 30 and all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize(
    "shape", [ProductConfig(sub_vectors=2, bits=6), ProductConfig(sub_vectors=1, cells=60, bits=2)]
)
def test_half_the_iterations_reach_the_error_of_twice_as_many_that_go_no_further(shape, monkeypatch):
    x = torch.tensor(np.random.default_rng(0).normal(size=(6000, 8)), dtype=torch.float32)
    quantizer = make_quantizer(shape, 8)
    plain = record_errors(x, 20, 1.0, monkeypatch, quantizer)[-1]
    assert record_errors(x, 10, 1.8, monkeypatch, quantizer)[-1] < 1.003 * plain
    assert record_errors(x, 10, 1.0, monkeypatch, quantizer)[-1] > 1.004 * plain


def lay_out(*numbers):
    return np.array(numbers, np.float32)[None, :, None]


def test_centroids_that_won_no_row_are_put_where_they_belong_and_not_beyond():
    stats = Stats(np.array([[4.0, 0.0]]), np.array([[[8.0], [0.0]]]), 0.0, 4)
    one, two = update_centroids(lay_out(0, 100), stats), update_centroids(lay_out(0, 100), stats, 1.8)
    np.testing.assert_allclose(two[0, 0], 1.8 * one[0, 0], rtol=1e-6)
    assert abs(one[0, 1, 0] - 2) < 0.01 and two[0, 1] == one[0, 1]


def test_a_phase_that_is_not_of_lloyds_iterations_knows_no_stride():
    x, quantizer = make_rows(), make_quantizer(KINDS["rq"], 8)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    stats = quantizer.assign(quantizer.prepare(x, codebook, "settle"), codebook, "settle")
    one, two = (quantizer.update(codebook, "settle", stats, stride).books for stride in (1.0, 1.8))
    assert np.array_equal(one, two)


def test_the_last_iteration_goes_no_further_than_the_means():
    x = make_rows()
    quantizer = make_quantizer(ProductConfig(sub_vectors=2, bits=4), 8)
    one = train_codebook(x, quantizer, LloydConfig(iterations=1)).codebook
    samples = quantizer.prepare(x, quantizer.blank(), "books")
    start = quantizer.seed(quantizer.blank(), "books", samples, np.random.default_rng(0))
    means = quantizer.update(start, "books", quantizer.assign(samples, start, "books"))
    np.testing.assert_allclose(one.books, means.books, rtol=1e-5)
