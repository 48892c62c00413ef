"""Composite codes: scores against brute force, searches against trying everything, biases against least squares."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import (
    AdditiveConfig,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    decode,
    make_quantizer,
    open_quantizer,
    train_codebook,
)
from gsl_dist.quantizers.composite import (
    compose,
    fit_biases,
    measure_misfit,
    open_words,
    search_scored,
    spread_books,
)

DIM = 8
STARTS = {
    "pq": ProductConfig(kind="pq", sub_vectors=4, bits=4),
    "cells": ProductConfig(kind="pq", sub_vectors=4, bits=4, cells=3, residual=False),
    "opq": OptimizedConfig(kind="opq", sub_vectors=4, bits=4, rotation_iterations=5),
    "rq": AdditiveConfig(kind="rq", books=4, bits=4, joint_iterations=2),
}
EVERY_CODE = list(itertools.product(range(4), repeat=3))
every_start = pytest.mark.parametrize("start", STARTS)


def make_rows(rows=600, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, DIM))
    return torch.tensor(centres[rng.integers(40, size=rows)] + 0.3 * rng.normal(size=(rows, DIM)), dtype=torch.float32)


def make_codebook(choices=3, bits=2, seed=0):
    rng = np.random.default_rng(seed)
    books, bias = rng.normal(size=(choices, 1 << bits, DIM)) / 2, rng.normal(size=(choices, 1 << bits)) / 2
    return Codebook(np.zeros((1, DIM)), books, residual=False, kind="cq", bias=bias)


def start_codebook(start, x):
    quantizer = make_quantizer(STARTS[start], DIM)
    codebook = train_codebook(x, quantizer, LloydConfig(iterations=6)).codebook
    return codebook, *quantizer.encode(x, codebook)


def misfit_of(x, codes, codebook):
    words = open_words(codebook, x)
    parts = [(w[c], b[c]) for w, b, c in zip(*words, codes.T, strict=True)]
    return measure_misfit(x, sum(w for w, _ in parts), sum(b for _, b in parts), words.vectors_MKD)


@every_start
def test_spread_codewords_add_up_to_what_the_codebook_decodes(start):
    x = make_rows()
    codebook, cells, codes = start_codebook(start, x)
    added = sum(words[code] for words, code in zip(spread_books(codebook), codes.T.long(), strict=True))
    torch.testing.assert_close(added, decode(cells, codes, codebook), atol=1e-5, rtol=1e-4)


@every_start
def test_a_composed_codebook_keeps_cells_and_what_codes_stand_for(start):
    x = make_rows()
    codebook, cells, codes = start_codebook(start, x)
    composed = compose(codebook, x, codes)
    assert composed.kind == "cq" and composed.rotation is None and not composed.residual
    torch.testing.assert_close(decode(cells, codes, composed), decode(cells, codes, codebook), atol=1e-5, rtol=1e-4)
    assert torch.equal(open_quantizer(composed).encode(x, composed)[0], cells)


def test_biases_are_those_of_least_squares():
    x, rng = make_rows(300), np.random.default_rng(1)
    codes = torch.tensor(rng.integers(5, size=(300, 2)))
    table = torch.nn.functional.one_hot(codes, 5).flatten(1).double()
    wanted = -x.square().sum(1).double() / 2
    best = table @ torch.linalg.lstsq(table, wanted[:, None], driver="gelsd").solution
    found = table @ fit_biases(codes, x, 5).double().flatten()
    torch.testing.assert_close(found, best[:, 0], atol=1e-4, rtol=1e-4)


def test_distances_by_look_up_are_those_of_the_score():
    codebook, queries = make_codebook(), make_rows(6, seed=1)
    codes = torch.randint(0, 4, (20, 3), generator=torch.Generator().manual_seed(1))
    words = open_words(codebook, queries)
    plain = [
        [float(q @ q - 2 * sum(q @ words[0][m, c] + words[1][m, c] for m, c in enumerate(code))) for code in codes]
        for q in queries
    ]
    measured = open_quantizer(codebook).measure_distances(queries, torch.zeros(20), codes, codebook)
    torch.testing.assert_close(measured, torch.tensor(plain), atol=1e-4, rtol=1e-4)


def test_codes_that_are_exact_give_exact_distances():
    x = make_rows(16)
    bias = -x.square().sum(1)[None] / 2
    exact = Codebook(np.zeros((1, DIM)), x[None].numpy(), residual=False, kind="cq", bias=bias.numpy())
    quantizer = open_quantizer(exact)
    cells, codes = quantizer.encode(x, exact)
    assert codes[:, 0].tolist() == list(range(16))
    wanted = torch.cdist(x, x).square()
    torch.testing.assert_close(quantizer.measure_distances(x, cells, codes, exact), wanted, atol=1e-4, rtol=1e-3)


def test_a_misfit_is_zero_for_a_code_that_stands_for_the_row_and_its_score():
    x = make_rows(10)
    half = -x.square().sum(1) / 2
    assert float(measure_misfit(x, x, half, x[None]).abs().max()) < 1e-5
    torch.testing.assert_close(measure_misfit(x, x, half + 0.5, x[None]), 0.25 / x.square().sum(1))


def test_the_misfit_of_a_row_of_zeros_is_of_the_size_of_a_codeword():
    x = make_rows(10)
    zero, energy = torch.zeros_like(x), float(x.square().sum(1).mean())
    misfit = measure_misfit(zero, x, torch.full((10,), -0.05 * energy), x[None])
    torch.testing.assert_close(misfit, x.square().sum(1) + 0.05**2 / 0.01 * energy)


def test_the_search_ends_where_no_single_change_helps():
    x, codebook = make_rows(60), make_codebook()
    start = torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(2))
    found = search_scored(x, start, open_words(codebook, x), restarts=0)
    assert (misfit_of(x, found, codebook) <= misfit_of(x, start, codebook) + 1e-5).all()
    for book, word in itertools.product(range(3), range(4)):
        changed = found.clone()
        changed[:, book] = word
        assert (misfit_of(x, changed, codebook) >= misfit_of(x, found, codebook) - 1e-4).all()


def test_many_restarts_find_the_best_of_all_codes():
    x, codebook = make_rows(40), make_codebook()
    costs = [misfit_of(x, torch.tensor(code).expand(40, -1), codebook) for code in EVERY_CODE]
    best = torch.stack(costs).min(0).values
    found = search_scored(x, torch.zeros(40, 3, dtype=torch.int64), open_words(codebook, x), restarts=60)
    torch.testing.assert_close(misfit_of(x, found, codebook), best, atol=1e-4, rtol=1e-4)


@every_start
def test_codes_cost_less_than_those_they_were_composed_of(start):
    x = make_rows()
    codebook, _, codes = start_codebook(start, x)
    composed = compose(codebook, x, codes)
    found = open_quantizer(composed).encode(x, composed)[1].long()
    assert misfit_of(x, found, composed).mean() < misfit_of(x, codes.long(), composed).mean()


def test_a_code_does_not_depend_on_the_rows_beside_it():
    x, codebook = make_rows(50), make_codebook()
    quantizer = open_quantizer(codebook)
    whole = quantizer.encode(x, codebook)[1]
    assert torch.equal(whole, torch.cat([quantizer.encode(row[None], codebook)[1] for row in x]))


def test_codes_are_found_by_the_landing_and_stand_for_the_codewords():
    x, found_by, stands_for = make_rows(50), make_codebook(seed=1), make_codebook(seed=2)
    both = replace(stands_for, landing=found_by.books, landing_bias=found_by.bias)
    quantizer = open_quantizer(both)
    cells, codes = quantizer.encode(x, both)
    assert torch.equal(codes, quantizer.encode(x, found_by)[1])
    assert torch.equal(decode(cells, codes, both), decode(cells, codes, stands_for))


def test_near_sums_come_nearest_first():
    x, codebook = make_rows(20), make_codebook()
    near = open_quantizer(codebook).neighbours(x, codebook, 64)[:, 0]
    lengths = (near - x[:, None]).norm(dim=2)
    assert near.shape == (20, 64, DIM) and (lengths.diff(dim=1) > -1e-4).all()
    sums = [sum(book[word] for book, word in zip(codebook.books, code, strict=True)) for code in EVERY_CODE]
    every = torch.cdist(x, torch.tensor(np.stack(sums)))
    torch.testing.assert_close(lengths[:, 0], every.min(1).values, atol=1e-4, rtol=1e-4)
