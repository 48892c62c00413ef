"""Codewords that add up: the searches and the least squares against loops and exhaustive ones."""

import itertools

import numpy as np
import pytest
import torch
from reference import beam_in_loops, count_choices, descend_in_loops, sum_exhaustively

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import (
    AdditiveConfig,
    AdditiveQuantizer,
    LloydConfig,
    ProductConfig,
    decode,
    make_quantizer,
    train_codebook,
)
from gsl_dist.quantizers import additive as module
from gsl_dist.quantizers.additive import search_beam, search_local, solve_books, sum_by_choice

every_kind = pytest.mark.parametrize("kind", ["rq", "lsq"])
LLOYD = LloydConfig(iterations=5, refresh_iterations=3)


def make_books(*, books=3, words=4, dims=5, dtype=torch.float64, seed=0):
    # Each book half as long as the one before, as those of a trained residual quantizer are.
    numbers = torch.randn(books, words, dims, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return numbers / 2.0 ** torch.arange(books)[:, None, None]


def make_rows(rows=40, dims=5, *, dtype=torch.float64, seed=1):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_clusters(rows, dims=8, *, seed=0):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(15, dims))
    return torch.tensor((centres[rng.integers(15, size=rows)] + rng.normal(size=(rows, dims))).astype(np.float32))


def make_codes(rows=40, books=3, words=4, *, seed=2):
    return torch.randint(0, words, (rows, books), generator=torch.Generator().manual_seed(seed))


def make_additive(kind="rq", *, dim=8, effort=None, **settings):
    return AdditiveQuantizer(AdditiveConfig(kind=kind, **{"books": 2, "bits": 4} | settings), dim, **(effort or {}))


def add_up(codes, books):
    return sum(book[codes[:, place]] for place, book in enumerate(books))


def measure_errors(rows, codes, books):
    return (rows - add_up(codes, books)).square().sum(1)


def codebook_of(books, kind="rq"):
    return Codebook(coarse=np.zeros((1, books.shape[2])), books=books.numpy(), residual=False, kind=kind)


# The beam


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 64, 100])
def test_a_beam_equals_the_loop(width):
    rows, books = make_rows(), make_books()
    beam = search_beam(rows, books, width)
    slow = [beam_in_loops(row, books.tolist(), width) for row in rows.tolist()]
    assert beam.codes_NLM.tolist() == [[list(code) for code, _ in kept] for kept in slow]
    torch.testing.assert_close(beam.rests_NLD.tolist(), [[rest for _, rest in kept] for kept in slow])


@pytest.mark.parametrize(("books", "words"), [(2, 4), (3, 4), (4, 2)])
def test_a_beam_that_drops_nothing_before_the_last_book_finds_the_nearest_of_all_sums(books, words):
    rows, books_MKD = make_rows(), make_books(books=books, words=words)
    found = search_beam(rows, books_MKD, words ** (books - 1)).codes_NLM[:, 0]
    assert [tuple(code) for code in found.tolist()] == [
        sum_exhaustively(row, books_MKD.tolist())[0][0] for row in rows.tolist()
    ]


def test_a_beam_of_one_takes_the_nearest_codeword_of_one_book_after_another():
    rows, books = make_rows(), make_books()
    rest, code = rows, []
    for book in books:
        code.append(torch.cdist(rest, book).argmin(1))
        rest = rest - book[code[-1]]
    assert torch.equal(search_beam(rows, books, 1).codes_NLM[:, 0], torch.stack(code, 1))


def test_wider_beams_err_less_on_average():
    rows, books = make_rows(300), make_books(books=4, words=8)
    errors = [float(search_beam(rows, books, width).rests_NLD[:, 0].square().sum()) for width in (1, 2, 4, 8, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.85 * errors[0]


@pytest.mark.parametrize("width", [1, 3, 64])
def test_what_a_sum_leaves_over_is_the_row_less_its_codewords_and_the_nearest_comes_first(width):
    rows, books = make_rows(), make_books()
    beam = search_beam(rows, books, width)
    for place in range(beam.codes_NLM.shape[1]):
        torch.testing.assert_close(beam.rests_NLD[:, place], rows - add_up(beam.codes_NLM[:, place], books))
    lengths = beam.rests_NLD.norm(dim=2)
    assert (lengths.diff(dim=1) >= 0).all()
    assert all(len({tuple(code) for code in codes}) == len(codes) for codes in beam.codes_NLM.tolist())


def test_without_books_a_beam_leaves_the_rows_as_they_are():
    rows = make_rows()
    beam = search_beam(rows, make_books()[:0], 5)
    assert torch.equal(beam.rests_NLD, rows[:, None]) and beam.codes_NLM.shape == (40, 1, 0)


def test_searching_in_chunks_equals_searching_at_once(monkeypatch):
    rows, codes, books = make_rows(), make_codes(), make_books()
    whole, revisited = search_beam(rows, books, 3), search_local(rows, codes, books, restarts=4)
    monkeypatch.setattr(module, "_CHUNK_FLOATS", 50)
    parts = search_beam(rows, books, 3)
    assert torch.equal(parts.codes_NLM, whole.codes_NLM)
    torch.testing.assert_close(parts.rests_NLD, whole.rests_NLD)
    assert torch.equal(search_local(rows, codes, books, restarts=4), revisited)


# Choosing again


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_choosing_again_equals_the_loop(sweeps):
    rows, codes, books = make_rows(), make_codes(), make_books()
    found = search_local(rows, codes, books, restarts=0, sweeps=sweeps)
    wanted = [
        descend_in_loops(row, code, books.tolist(), sweeps)
        for row, code in zip(rows.tolist(), codes.tolist(), strict=True)
    ]
    assert found.tolist() == wanted and not torch.equal(found, codes)


def test_sweeps_end_where_no_single_change_helps():
    rows, codes, books = make_rows(), make_codes(), make_books()
    settled = search_local(rows, codes, books, restarts=0, sweeps=50)
    errors = measure_errors(rows, settled, books)
    for place, word in itertools.product(range(3), range(4)):
        changed = settled.clone()
        changed[:, place] = word
        assert (measure_errors(rows, changed, books) >= errors - 1e-12).all()


@pytest.mark.parametrize("sweeps", [1, 4])
def test_no_sweep_and_no_restart_raises_the_error_of_any_row(sweeps):
    rows, codes, books = make_rows(200), make_codes(200), make_books()
    errors = [measure_errors(rows, codes, books)]
    for restarts in (0, 1, 4, 16):
        found = search_local(rows, codes, books, restarts=restarts, sweeps=sweeps)
        errors.append(measure_errors(rows, found, books))
    assert all((later <= earlier + 1e-12).all() for earlier, later in itertools.pairwise(errors))
    assert errors[-1].sum() < errors[1].sum() < errors[0].sum()


def test_many_restarts_find_the_nearest_of_all_sums():
    rows, codes, books = make_rows(), make_codes(books=4), make_books(books=4)
    found = search_local(rows, codes, books, restarts=200)
    assert [tuple(code) for code in found.tolist()] == [
        sum_exhaustively(row, books.tolist())[0][0] for row in rows.tolist()
    ]


def test_choosing_again_leaves_the_codes_it_was_given_alone():
    rows, codes, books = make_rows(), make_codes(), make_books()
    before = codes.clone()
    search_local(rows, codes, books, restarts=4)
    assert torch.equal(codes, before)


@every_kind
def test_a_rows_code_does_not_depend_on_the_rows_beside_it(kind):
    books = make_books(books=4, words=16, dims=8, dtype=torch.float32)
    quantizer, codebook = make_additive(kind, books=4), codebook_of(books, kind)
    rows = make_rows(50, 8, dtype=torch.float32)
    codes = quantizer.encode(rows, codebook)[1]
    assert torch.equal(torch.cat([quantizer.encode(row[None], codebook)[1] for row in rows]), codes)
    assert torch.equal(quantizer.encode(rows.flip(0), codebook)[1].flip(0), codes)


@every_kind
def test_more_effort_finds_better_codes(kind):
    books = make_books(books=4, words=16, dims=8, dtype=torch.float32)
    rows, codebook = make_rows(300, 8, dtype=torch.float32), codebook_of(books, kind)

    def error(**effort):
        _, codes = make_additive(kind, books=4, effort=effort).encode(rows, codebook)
        return float(measure_errors(rows, codes.long(), books).mean())

    assert error(beam=1, restarts=0) > error(beam=4, restarts=1) > error(beam=32, restarts=16)


@every_kind
def test_no_rows_have_no_codes(kind):
    books = make_books(dtype=torch.float32)
    quantizer = make_additive(kind, books=3, bits=2, dim=5)
    cells, codes = quantizer.encode(torch.zeros(0, 5), codebook_of(books, kind))
    assert cells.shape == (0,) and codes.shape == (0, 3)
    assert quantizer.neighbours(torch.zeros(0, 5), codebook_of(books, kind), 1).shape == (0, 1, 1, 5)


def test_what_the_search_of_lsq_finds_leads_its_neighbours():
    books = make_books(books=4, words=16, dims=8, dtype=torch.float32)
    rows, codebook = make_rows(300, 8, dtype=torch.float32), codebook_of(books, "lsq")
    quantizer = make_additive("lsq", books=4, train_restarts=3, effort={"beam": 5, "restarts": 3})
    found = decode(*quantizer.encode(rows, codebook), codebook)
    near = quantizer.neighbours(rows, codebook, 5)[:, 0]
    torch.testing.assert_close(near[:, 0], found)
    by_beam = make_additive("rq", books=4).neighbours(rows, codebook_of(books, "rq"), 5)[:, 0]
    led = (near[:, 0] != by_beam[:, 0]).any(1)
    assert 0 < led.sum() < 300
    torch.testing.assert_close(near[~led], by_beam[~led])
    torch.testing.assert_close(near[led, 1:], by_beam[led, :-1])


@every_kind
def test_encoding_many_rows_keeps_no_more_than_codes(kind, monkeypatch):
    books = make_books(books=3, words=16, dims=8, dtype=torch.float32)
    rows, codebook = make_rows(300, 8, dtype=torch.float32), codebook_of(books, kind)
    whole = make_additive(kind, books=3).encode(rows, codebook)[1]
    held = []
    monkeypatch.setattr(module, "_CHUNK_ROWS", 64)
    monkeypatch.setattr(module, "search_beam", lambda z, *rest: held.append(len(z)) or search_beam(z, *rest))
    assert torch.equal(make_additive(kind, books=3).encode(rows, codebook)[1], whole)
    assert max(held) == 64


# Least squares


def test_the_sums_of_choices_equal_the_loop():
    rows, codes, books = make_rows(), make_codes(), make_books()
    stats = sum_by_choice(rows, codes, books)
    met, sums = count_choices(rows.tolist(), codes.tolist(), 3, 4)
    assert stats.counts_GK.tolist() == met and stats.rows == 40
    np.testing.assert_allclose(stats.sums_GKd.reshape(12, 5), sums, atol=1e-12)
    assert stats.error == pytest.approx(float(measure_errors(rows, codes, books).sum()))


@pytest.mark.parametrize("sizes", [[20, 20], [1, 39], [0, 40], [10, 7, 3, 20]])
def test_the_sums_of_any_split_add_to_the_whole(sizes):
    rows, codes, books = make_rows(), make_codes(), make_books()
    parts = zip(rows.split(sizes), codes.split(sizes), strict=True)
    first, *others = [sum_by_choice(part, chosen, books) for part, chosen in parts]
    total, whole = sum(others, start=first), sum_by_choice(rows, codes, books)
    assert np.array_equal(total.counts_GK, whole.counts_GK) and total.rows == whole.rows
    np.testing.assert_allclose(total.sums_GKd, whole.sums_GKd, atol=1e-12)
    assert total.error == pytest.approx(whole.error)


@pytest.mark.parametrize("rows", [30, 400], ids=["more codewords than rows hold", "enough rows"])
def test_solved_books_err_as_those_of_lstsq(rows):
    rows_ND, codes, books = make_rows(rows), make_codes(rows), make_books()
    solved = torch.tensor(solve_books(books.numpy(), sum_by_choice(rows_ND, codes, books)), dtype=torch.float64)
    chosen = torch.nn.functional.one_hot(codes, 4).flatten(1).double().numpy()
    best = chosen @ np.linalg.lstsq(chosen, rows_ND.numpy(), rcond=None)[0]
    wanted = np.square(rows_ND.numpy() - best).sum()
    assert wanted <= float(measure_errors(rows_ND, codes, solved).sum()) <= wanted * (1 + 1e-4)


def test_codewords_that_nothing_chose_stay_where_they_were():
    rows, codes, books = make_rows(), make_codes(words=3), make_books(dtype=torch.float32)
    stats = sum_by_choice(rows.float(), codes, books)
    solved = solve_books(books.numpy(), stats)
    assert np.array_equal(solved[:, 3], books[:, 3].numpy())
    assert not np.isclose(solved[:, :3], books[:, :3].numpy()).all(axis=2).any()


@pytest.mark.parametrize("rows", [30, 400])
def test_books_that_are_held_minimise_the_error_and_what_they_moved(rows):
    rows_ND, codes, books = make_rows(rows), make_codes(rows), make_books()
    held = torch.tensor(solve_books(books.numpy(), sum_by_choice(rows_ND, codes, books), 5), dtype=torch.float64)
    # As many more rows, each a codeword moved, as make the ridge.
    weight = (1e-4 + 5 * (3 * 4 / rows) ** 2) * rows / 4
    chosen = torch.nn.functional.one_hot(codes, 4).flatten(1).double().numpy()
    lines = np.concatenate([chosen, np.sqrt(weight) * np.eye(12)])
    wanted = np.concatenate([rows_ND.numpy(), np.sqrt(weight) * books.reshape(12, 5).numpy()])
    np.testing.assert_allclose(held.reshape(12, 5), np.linalg.lstsq(lines, wanted, rcond=None)[0], atol=1e-6)


@every_kind
def test_new_books_are_held_where_rows_are_few_and_refined_ones_are_not(kind):
    codebook, quantizer = (
        codebook_of(make_books(words=16, books=2, dims=8, dtype=torch.float32), kind),
        make_additive(kind),
    )

    def moved(rows, phase):
        x = make_clusters(rows)
        stats = quantizer.assign(quantizer.prepare(x, codebook, phase), codebook, phase)
        return np.square(quantizer.update(codebook, phase, stats).books - codebook.books).sum()

    assert moved(40, "settle") < 0.2 * moved(40, "joint")
    assert moved(8000, "settle") > 0.8 * moved(8000, "joint")


def test_solving_again_changes_nothing():
    rows, codes, books = make_rows(400), make_codes(400), make_books()
    solved = [books.numpy().astype(np.float32)]
    for _ in range(3):
        solved.append(solve_books(solved[-1], sum_by_choice(rows, codes, torch.tensor(solved[-1]).double())))
    np.testing.assert_allclose(solved[3], solved[2], atol=1e-5)
    # What a book gains all over and another loses changes no sum: it is not let drift.
    np.testing.assert_allclose(solved[3].sum(0).mean(0), solved[1].sum(0).mean(0), atol=1e-4)


def test_solving_leaves_its_arguments_alone_even_where_they_cannot_be_written():
    rows, codes, books = make_rows(), make_codes(), make_books(dtype=torch.float32)
    stats = sum_by_choice(rows.float(), codes, books)
    counts = stats.counts_GK.astype(np.float64)
    stats = module.Stats(counts, stats.sums_GKd, stats.error, stats.rows)
    before = counts.copy(), stats.sums_GKd.copy(), books.numpy().copy()
    for array in (counts, stats.sums_GKd):
        array.flags.writeable = False
    solve_books(books.numpy(), stats)
    for array, kept in zip((counts, stats.sums_GKd, books.numpy()), before, strict=True):
        assert np.array_equal(array, kept)


# Training


def test_phases_are_cells_books_and_all_together():
    def phases(kind, *, refine=False, **settings):
        return make_additive(kind, **settings).plan(LLOYD, refine=refine)

    stages = (("book 0", 5), ("book 1", 5))
    assert phases("rq") == (*stages, ("settle", 8))
    assert phases("rq", cells=4, joint_iterations=2) == (("cells", 5), *stages, ("settle", 2))
    assert phases("lsq") == (*stages, ("anneal", 25), ("settle", 3))
    assert phases("lsq", cells=4, joint_iterations=2) == (("cells", 5), *stages, ("anneal", 2), ("settle", 3))
    for kind in ("rq", "lsq"):
        assert phases(kind, refine=True, cells=4) == (("cells", 3), ("joint", 3))


def test_a_phase_updates_its_own_part_of_the_codebook_alone():
    x, quantizer = make_clusters(200), make_additive(cells=3)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    moves = {"cells": "coarse", "book 0": "first", "book 1": "second", "settle": "both", "joint": "both"}
    for phase, moved in moves.items():
        stats = quantizer.assign(quantizer.prepare(x + 1, codebook, phase), codebook, phase)
        updated = quantizer.update(codebook, phase, stats)
        assert np.array_equal(updated.coarse, codebook.coarse) == (moved != "coarse")
        assert np.array_equal(updated.books[0], codebook.books[0]) == (moved not in ("first", "both"))
        assert np.array_equal(updated.books[1], codebook.books[1]) == (moved not in ("second", "both"))


def test_a_book_is_trained_on_all_that_the_best_sums_before_it_leave():
    quantizer, x = make_additive(books=3, train_beam=3), make_clusters(30)
    codebook = codebook_of(make_books(words=16, dims=8, dtype=torch.float32))
    for stage, width in ((0, 1), (1, 3), (2, 3)):
        prepared = quantizer.prepare(x, codebook, f"book {stage}")
        slow = [beam_in_loops(row, codebook.books[:stage].tolist(), 3) for row in x.tolist()]
        assert prepared.shape == (1, 30 * width, 8)
        torch.testing.assert_close(prepared[0], torch.tensor([rest for kept in slow for _, rest in kept]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_book_begins_with_what_the_nearest_sum_of_every_row_leaves(stage):
    # As many rows as codewords: each must be taken, half way from their mean, and none of what a lesser sum leaves.
    quantizer, x = make_additive(books=3, bits=5, train_beam=4), make_clusters(32)
    codebook = codebook_of(make_books(words=32, dims=8, dtype=torch.float32))
    phase = f"book {stage}"
    seeded = quantizer.seed(codebook, phase, quantizer.prepare(x, codebook, phase), np.random.default_rng(0))
    nearest = search_beam(x, torch.tensor(codebook.books[:stage]), 4).rests_NLD[:, 0].numpy()
    half_way = (nearest.mean(0) + nearest) / 2
    assert {row.tobytes() for row in seeded.books[stage]} == {row.tobytes() for row in half_way}


@pytest.mark.parametrize(("tail", "most"), [(0.5, 0.31), (1.0, 0.155)])
def test_rows_far_out_do_not_keep_codewords_to_themselves(tail, most):
    # Books that begin on rows leave .34 and .175 here.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 64, generator=generator) * torch.exp(tail * torch.randn(4000, 1, generator=generator))
    trained = train_codebook(x, make_additive("rq", dim=64, books=8, bits=6), LloydConfig(iterations=8))
    assert trained.relative_error < most


@every_kind
@pytest.mark.parametrize(("cells", "residual"), [(1, False), (5, True), (5, False)], ids=["flat", "residual", "cells"])
def test_the_error_is_that_of_decoded_rows_encoded_as_in_training(kind, cells, residual):
    x, quantizer = (
        make_clusters(400),
        make_additive(kind, cells=cells, residual=residual, effort={"beam": 5, "restarts": 8}),
    )
    trained = train_codebook(x, quantizer, LLOYD)
    decoded = decode(*quantizer.encode(x, trained.codebook), trained.codebook)
    afresh = float((x - decoded).square().sum() / (x - x.mean(0)).square().sum())
    assert trained.relative_error == pytest.approx(afresh, rel=1e-4)
    assert trained.codebook.residual == residual and trained.codebook.kind == kind


@every_kind
def test_more_books_bits_and_residuals_err_less(kind):
    x = make_clusters(600)

    def error(**settings):
        return train_codebook(x, make_additive(kind, joint_iterations=4, **settings), LLOYD).relative_error

    assert error(books=1) > error(books=2) > error(books=4)
    assert error(bits=2) > error(bits=3) > error(bits=5)
    assert error(bits=2, cells=16, residual=True) < error(bits=2, cells=16, residual=False)


@every_kind
def test_sums_err_less_than_product_codes_of_as_many_bits(kind):
    x = make_clusters(600)
    product = train_codebook(x, make_quantizer(ProductConfig(sub_vectors=4, bits=4), 8), LloydConfig(iterations=20))
    sums = train_codebook(x, make_additive(kind, books=4), LLOYD)
    assert sums.relative_error < 0.7 * product.relative_error


@every_kind
def test_refitting_all_books_lowers_the_error(kind):
    x = make_clusters(600)
    short, long = (
        train_codebook(x, make_additive(kind, books=4, joint_iterations=iterations), LLOYD).relative_error
        for iterations in (1, 12)
    )
    assert long < 0.97 * short


def test_a_book_of_as_many_codewords_as_rows_codes_them_exactly():
    x = make_clusters(64)
    trained = train_codebook(x, make_additive("rq", books=1, bits=6), LloydConfig(iterations=5))
    assert trained.relative_error == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("rows", "books", "bits", "most"), [(64, 1, 6, 0.1), (600, 2, 8, 0.03)])
def test_shaken_codewords_that_nothing_chooses_do_not_stray(rows, books, bits, most):
    # With few rows a word, many words are not chosen; were they shaken on and on, .14 and .033 would be left.
    trained = train_codebook(make_clusters(rows), make_additive("lsq", books=books, bits=bits), LLOYD)
    assert trained.relative_error < most


def test_annealing_gathers_unused_codewords_where_the_most_chosen_is():
    x, quantizer = make_clusters(20), make_additive("lsq")
    codebook = codebook_of(make_books(books=2, words=16, dims=8, dtype=torch.float32), "lsq")
    stats = quantizer.assign(quantizer.prepare(x, codebook, "anneal"), codebook, "anneal")
    chosen = np.diagonal(stats.counts_GK).reshape(2, 16)
    shaken, solved = quantizer.update(codebook, "anneal", stats).books, solve_books(codebook.books, stats, 10)
    assert (chosen == 0).any(axis=1).all()
    for book in range(2):
        used = chosen[book] > 0
        np.testing.assert_array_equal(shaken[book, used], solved[book, used])
        assert (shaken[book, ~used] == solved[book, chosen[book].argmax()]).all()
        np.testing.assert_array_equal(solved[book, ~used], codebook.books[book, ~used])
