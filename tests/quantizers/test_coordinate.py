"""One coordinator over any number of workers trains the codebook that one process trains."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from gsl_dist.errors import DataError
from gsl_dist.quantizers import (
    LloydConfig,
    ProductConfig,
    Rows,
    answer,
    coordinate,
    decode,
    make_quantizer,
    train_codebook,
)

SHAPES = [(1, False), (6, True), (6, False)]
every_shape = pytest.mark.parametrize(("cells", "residual"), SHAPES, ids=["flat", "residual", "cells"])
LLOYD = LloydConfig(iterations=6, refresh_iterations=3)


def make_rows(rows=600, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(15, dim))
    return torch.tensor((centres[rng.integers(15, size=rows)] + rng.normal(size=(rows, dim))).astype(np.float32))


def make_pq(cells=1, residual=False, bits=4, dim=8):
    return make_quantizer(ProductConfig(sub_vectors=2, bits=bits, cells=cells, residual=residual), dim)


def share_rows(x, bounds):
    return [Rows(x[a:b], a, len(x)) for a, b in itertools.pairwise(bounds)]


def drive(quantizer, shares, *, lloyd=LLOYD, seed=0, start=None):
    """Drive the coordinator by hand, through pickle as over a wire; give what it trained and what it asked for."""
    coordination = coordinate(quantizer, lloyd, seed=seed, start=start)
    ask, asked = next(coordination), []
    while True:
        asked.append((ask.what, ask.phase))
        sent = pickle.loads(pickle.dumps(ask))  # noqa: S301 - our own bytes
        answers = [answer(sent, rows, quantizer) for rows in shares]
        try:
            ask = coordination.send(pickle.loads(pickle.dumps(answers)))  # noqa: S301 - our own bytes
        except StopIteration as end:
            return end.value, asked


@every_shape
@pytest.mark.parametrize("bounds", [[0, 600], [0, 300, 600], [0, 200, 400, 600], [0, 1, 450, 600], [0, 0, 600]])
def test_any_number_of_workers_trains_the_same_codebook(cells, residual, bounds):
    x, quantizer = make_rows(), make_pq(cells, residual)
    trained, _ = drive(quantizer, share_rows(x, bounds))
    alone = train_codebook(x, quantizer, LLOYD)
    np.testing.assert_allclose(trained.codebook.coarse, alone.codebook.coarse, atol=1e-5)
    np.testing.assert_allclose(trained.codebook.books, alone.codebook.books, atol=1e-5)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-5)
    assert trained.codebook.residual == residual


@pytest.mark.parametrize("bounds", [[0, 300, 600], [0, 1, 450, 600]])
def test_a_refresh_by_any_number_of_workers_is_the_same(bounds):
    x, quantizer = make_rows(), make_pq(6, residual=True)
    start = train_codebook(make_rows(seed=1), quantizer, LLOYD).codebook
    trained, _ = drive(quantizer, share_rows(x, bounds), start=start)
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
    trained, asked = drive(quantizer, share_rows(x, [0, 600]))
    new = [("sample", "cells"), *[("stats", "cells")] * 6, ("sample", "books"), *[("stats", "books")] * 7]
    assert asked == [("moments", ""), *new]
    _, asked = drive(quantizer, share_rows(x, [0, 600]), start=trained.codebook)
    assert asked == [("moments", ""), *[("stats", "cells")] * 3, *[("stats", "books")] * 4]


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
    assert np.array_equal(*samples) and len(samples[0]) == 4096
    assert samples[0][[0, -1], 0].tolist() == [0, 19_999]


def test_too_few_rows_are_refused_however_they_are_divided():
    quantizer = make_pq(bits=6)
    with pytest.raises(DataError, match="got 63, but a codebook with 64 centroids needs at least as many"):
        drive(quantizer, share_rows(make_rows(63), [0, 30, 63]))
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
