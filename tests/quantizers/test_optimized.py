"""Product codes behind a learned rotation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import deal_in_loops

from gsl_dist.quantizers import (
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    decode,
    leave_over,
    make_quantizer,
    train_codebook,
)
from gsl_dist.quantizers.kmeans import update_centroids

DIM, PARTS = 8, 4
LLOYD = LloydConfig(iterations=10, refresh_iterations=4)
every_start = pytest.mark.parametrize("start", ["auto", "axes", "identity"])


def make_optimized(*, parts=PARTS, bits=3, dim=DIM, **settings):
    return make_quantizer(OptimizedConfig(kind="opq", sub_vectors=parts, bits=bits, **settings), dim)


def make_crossed(rows=800, *, seed=0):
    """Give rows whose dimensions depend on one another in pairs, each of which lies across a border of sub-vectors."""
    rng = np.random.default_rng(seed)
    common = 2 * rng.normal(size=(rows, PARTS))
    return torch.tensor(np.hstack([common, common + 0.3 * rng.normal(size=(rows, PARTS))]).astype(np.float32))


def make_clusters(rows=800, *, scale=1.0, seed=0):
    """Give clustered rows whose dimensions depend on one another and vary unlike."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    widths = 1.6 ** -np.arange(DIM)
    centres = 2 * rng.normal(size=(20, DIM))
    x = (centres[rng.integers(20, size=rows)] + rng.normal(size=(rows, DIM))) * widths @ turn
    return torch.tensor((scale * x).astype(np.float32))


def step(quantizer, codebook, x, phase):
    """Give the codebook after one iteration of a phase."""
    stats = quantizer.assign(quantizer.prepare(x, codebook, phase), codebook, phase)
    return quantizer.update(codebook, phase, stats)


def measure_error(quantizer, codebook, x):
    decoded = decode(*quantizer.encode(x, codebook), codebook)
    return float((x - decoded).square().sum() / (x - x.mean(0)).square().sum())


def assert_orthogonal(rotation):
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-5)


@every_start
@pytest.mark.parametrize("cells", [1, 5])
def test_the_rotation_is_orthogonal_after_training_and_after_refining(start, cells):
    x, quantizer = make_crossed(), make_optimized(start=start, cells=cells)
    trained = train_codebook(x, quantizer, LLOYD)
    refined = train_codebook(x + 0.3, quantizer, LLOYD, start=trained.codebook)
    for codebook in (trained.codebook, refined.codebook):
        assert_orthogonal(codebook.rotation)
    assert not np.allclose(trained.codebook.rotation, np.eye(DIM), atol=0.1)
    assert not np.array_equal(refined.codebook.rotation, trained.codebook.rotation)


def test_the_start_says_whether_axes_are_shared_out():
    def phases(*, refine=False, **settings):
        return make_optimized(rotation_iterations=7, **settings).plan(LLOYD, refine=refine)

    assert phases() == (("balance", 1), ("rotation", 7), ("books", 10))
    assert phases(start="identity") == (("rotation", 7), ("books", 10))
    assert phases(cells=3) == (("cells", 10), ("balance", 1), ("rotation", 7), ("books", 10))
    assert phases(start="axes") == phases()
    for start in ("auto", "axes", "identity"):
        assert phases(refine=True, start=start) == (("rotation", 4), ("books", 4))


@pytest.mark.parametrize(("cells", "residual"), [(1, False), (5, True), (5, False)], ids=["flat", "residual", "cells"])
def test_the_error_is_that_of_the_decoded_rows_over_their_variance(cells, residual):
    x, quantizer = make_clusters(), make_optimized(cells=cells, residual=residual)
    trained = train_codebook(x, quantizer, LLOYD)
    assert trained.relative_error == pytest.approx(measure_error(quantizer, trained.codebook, x), rel=1e-4)
    assert trained.codebook.residual == residual


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_that_begins_with_none_errs_no_more_than_plain_product_codes(seed):
    x = make_clusters(seed=seed)
    plain = train_codebook(x, make_quantizer(ProductConfig(sub_vectors=PARTS, bits=3), DIM), LLOYD, seed=seed)
    turned = train_codebook(x, make_optimized(start="identity"), LLOYD, seed=seed)
    assert turned.relative_error <= plain.relative_error


def make_grouped(rows=800, *, seed=0):
    """Give rows whose parts are clusters of their own, at the corners of a square, which other axes do not show."""
    rng = np.random.default_rng(seed)
    corners = rng.choice([-1.0, 1.0], size=(rows, DIM))
    return torch.tensor((corners + 0.1 * rng.normal(size=(rows, DIM))).astype(np.float32))


@pytest.mark.parametrize(("make", "wanted"), [(make_grouped, "identity"), (make_crossed, "axes")])
def test_the_automatic_start_is_the_one_that_lies_nearer(make, wanted):
    x, lloyd = make(), LloydConfig(iterations=1)

    def error(start):
        return train_codebook(x, make_optimized(start=start, bits=2, rotation_iterations=1), lloyd).relative_error

    other = "axes" if wanted == "identity" else "identity"
    assert error("auto") <= 1.02 * error(wanted) < 0.5 * error(other)


@every_start
def test_correlations_that_cross_the_borders_of_sub_vectors_are_turned_inside(start):
    x = make_crossed()
    plain = train_codebook(x, make_quantizer(ProductConfig(sub_vectors=PARTS, bits=3), DIM), LLOYD)
    turned = train_codebook(x, make_optimized(start=start), LLOYD)
    assert turned.relative_error < 0.6 * plain.relative_error


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_axes_are_dealt_as_in_the_loop_whatever_the_scale(scale):
    x, quantizer = make_clusters(scale=scale), make_optimized()
    codebook = step(quantizer, quantizer.blank(), x, "balance")
    assert_orthogonal(codebook.rotation)
    moments = (x.double().T @ x.double() / len(x)).numpy()
    turned = codebook.rotation @ moments @ codebook.rotation.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-5 * moments.max())
    dealt = np.diag(turned).reshape(PARTS, -1)
    np.testing.assert_allclose(dealt, deal_in_loops(np.linalg.eigvalsh(moments).tolist(), PARTS), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_sharing_out_axes_balances_the_products_of_variances(scale):
    quantizer = make_optimized(dim=16)
    variances = scale * 2.0 ** -np.arange(16)
    x = torch.diag(torch.tensor(np.sqrt(16 * variances), dtype=torch.float32))
    codebook = step(quantizer, quantizer.blank(), x, "balance")
    dealt = np.square(codebook.rotation @ np.sqrt(np.diag(variances))).sum(axis=1).reshape(PARTS, -1)
    products = np.log2(dealt / scale).sum(axis=1)
    # The exponents 0 to 15 add up to 120: 30 a part, were each dealt its share to the last bit.
    assert np.ptp(products) <= 4 and products.sum() == pytest.approx(-120, abs=0.01)


def test_axes_without_variance_are_dealt_as_well():
    quantizer = make_optimized()
    x = make_crossed() * torch.tensor([1.0] * 6 + [0.0] * 2)
    assert_orthogonal(step(quantizer, quantizer.blank(), x, "balance").rotation)
    assert train_codebook(x, quantizer, LLOYD).relative_error < 0.2


def test_cells_stay_where_they_were_among_the_vectors_while_the_rotation_turns():
    x, quantizer = make_clusters(), make_optimized(cells=5)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    places, cells_N = codebook.coarse @ codebook.rotation, leave_over(x, codebook)[0]
    for phase in ("balance", "rotation", "rotation"):
        turned = step(quantizer, codebook, x, phase)
        assert not np.allclose(turned.rotation, codebook.rotation, atol=1e-4)
        np.testing.assert_allclose(turned.coarse @ turned.rotation, places, atol=1e-5)
        assert torch.equal(leave_over(x, turned)[0], cells_N)
        codebook = turned


def test_what_a_rotation_is_learned_on_does_not_turn_with_it():
    x, quantizer = make_clusters(), make_optimized(cells=5)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    before = quantizer.prepare(x, codebook, "rotation")
    after = quantizer.prepare(x, step(quantizer, codebook, x, "rotation"), "rotation")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_phase_updates_its_own_part_of_the_codebook_alone():
    x, quantizer = make_clusters(), make_optimized(cells=5)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    moves = {"cells": {"coarse"}, "balance": {"rotation", "coarse"}, "books": {"books"}}
    for phase, moved in (moves | {"rotation": {"rotation", "coarse", "books"}}).items():
        updated = step(quantizer, codebook, x + 0.5, phase)
        changed = {
            name for name, array in updated.arrays().items() if not np.array_equal(array, codebook.arrays()[name])
        }
        assert changed == moved


@pytest.mark.parametrize("sizes", [[400, 400], [1, 799], [0, 800], [200, 300, 300]])
def test_statistics_of_any_split_add_to_the_whole(sizes):
    x, quantizer = make_clusters(), make_optimized(cells=5)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    for phase in ("cells", "balance", "rotation", "books"):
        first, *others = [
            quantizer.assign(quantizer.prepare(part, codebook, phase), codebook, phase) for part in x.split(sizes)
        ]
        whole = step(quantizer, codebook, x, phase)
        total = quantizer.update(codebook, phase, sum(others, start=first))
        for one, other in zip(total.arrays().values(), whole.arrays().values(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_no_turn_of_the_rotation_takes_rows_farther_from_their_codewords():
    x, quantizer = make_clusters(), make_optimized()
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    codebook = replace(codebook, rotation=np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0])
    errors = []
    for _ in range(30):
        stats = quantizer.assign(quantizer.prepare(x, codebook, "rotation"), codebook, "rotation")
        errors.append(stats.error)
        codebook = quantizer.update(codebook, "rotation", stats)
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_turning_keeps_codewords_at_the_means_of_their_rows():
    x, quantizer = make_clusters(), make_optimized()
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    stats = quantizer.assign(quantizer.prepare(x, codebook, "books"), codebook, "books")
    turned = step(quantizer, codebook, x, "rotation")
    np.testing.assert_allclose(turned.books, update_centroids(codebook.books, stats), atol=1e-4)
