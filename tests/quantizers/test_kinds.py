"""What every kind of codebook promises: decoding, distances by look-up, near codewords, an encoder of its own."""

import itertools

import numpy as np
import pytest
import torch
from reference import decode_in_loops, sum_exhaustively

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import (
    AdditiveConfig,
    AdditiveQuantizer,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    ProductQuantizer,
    decode,
    leave_over,
    make_quantizer,
    open_quantizer,
    rotate,
    train_codebook,
)

DIM, CHOICES, BITS = 8, 4, 3
KINDS = [(kind, rotated) for kind in ("pq", "rq", "lsq") for rotated in (False, True)]
every_kind = pytest.mark.parametrize(
    ("kind", "rotated"), KINDS, ids=[f"{kind}{' rotated' * rotated}" for kind, rotated in KINDS]
)
every_shape = pytest.mark.parametrize(
    ("cells", "residual"), [(1, False), (5, True), (5, False)], ids=["flat", "residual", "cells"]
)
CONFIGS = {
    "pq": ProductConfig(sub_vectors=CHOICES, bits=BITS),
    "opq": OptimizedConfig(kind="opq", sub_vectors=CHOICES, bits=BITS),
    "rq": AdditiveConfig(kind="rq", books=CHOICES, bits=BITS),
    "lsq": AdditiveConfig(kind="lsq", books=CHOICES, bits=BITS),
}


def make_codebook(kind="pq", rotated=False, *, cells=1, residual=False, choices=CHOICES, bits=BITS, seed=0):
    """Give a codebook of random numbers; books that add up are each half as long as the one before."""
    rng = np.random.default_rng(seed)
    books = rng.normal(size=(choices, 1 << bits, DIM // choices if kind == "pq" else DIM))
    scale = 1 if kind == "pq" else 2.0 ** -np.arange(choices)[:, None, None]
    coarse = 2 * rng.normal(size=(cells, DIM)) if cells > 1 else np.zeros((1, DIM))
    rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0] if rotated else None
    return Codebook(coarse=coarse, books=books * scale, residual=residual, kind=kind, rotation=rotation)


def make_rows(rows=60, *, seed=1):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(12, DIM))
    return torch.tensor((centres[rng.integers(12, size=rows)] + rng.normal(size=(rows, DIM))).astype(np.float32))


@every_shape
@every_kind
def test_both_ways_of_decoding_equal_the_loop(kind, rotated, cells, residual):
    codebook = make_codebook(kind, rotated, cells=cells, residual=residual)
    rng = np.random.default_rng(3)
    cells_N, codes = rng.integers(cells, size=30), rng.integers(1 << BITS, size=(30, CHOICES))
    slow = decode_in_loops(
        cells_N,
        codes,
        codebook.coarse,
        codebook.books,
        residual,
        additive=kind != "pq",
        rotation=None if codebook.rotation is None else codebook.rotation.tolist(),
    )
    np.testing.assert_allclose(codebook.decode(cells_N, codes), slow, atol=1e-5)
    decoded = decode(torch.tensor(cells_N), torch.tensor(codes), codebook)
    np.testing.assert_allclose(decoded, slow, atol=1e-5)
    assert decoded.dtype == torch.float32 and codebook.decode(cells_N, codes).dtype == np.float32


@every_kind
def test_what_is_left_over_and_the_cell_make_up_the_rotated_row(kind, rotated):
    x, codebook = make_rows(), make_codebook(kind, rotated, cells=5, residual=True)
    cells_N, rest = leave_over(x, codebook)
    turned = rotate(x, codebook)
    np.testing.assert_allclose(turned, codebook.rotate(x.numpy()), atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    assert torch.equal(turned, x) != rotated
    assert torch.equal(cells_N, torch.cdist(turned, torch.tensor(codebook.coarse)).argmin(1))
    torch.testing.assert_close(rest, turned - torch.tensor(codebook.coarse)[cells_N])


@every_shape
@every_kind
def test_distances_by_look_up_equal_those_to_decoded_vectors(kind, rotated, cells, residual):
    codebook = make_codebook(kind, rotated, cells=cells, residual=residual)
    quantizer, queries = open_quantizer(codebook), make_rows(7, seed=2)
    cells_N, codes = quantizer.encode(make_rows(), codebook)
    plain = (queries[:, None] - decode(cells_N, codes, codebook)).square().sum(-1)
    measured = quantizer.measure_distances(queries, cells_N, codes, codebook)
    assert measured.shape == (7, 60)
    torch.testing.assert_close(measured, plain, rtol=1e-4, atol=1e-4)


@every_shape
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_a_rotated_codebook_codes_as_the_plain_one_codes_turned_rows(kind, cells, residual):
    turned = make_codebook(kind, rotated=True, cells=cells, residual=residual)
    plain = Codebook(coarse=turned.coarse, books=turned.books, residual=residual, kind=kind)
    x, quantizer = make_rows(), open_quantizer(turned)
    one, other = quantizer.encode(x, turned), quantizer.encode(rotate(x, turned), plain)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    torch.testing.assert_close(rotate(decode(*one, turned), turned), decode(*other, plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_decoded_vectors_encode_to_what_decodes_to_them(kind):
    codebook = make_codebook(kind, rotated=True)
    quantizer = open_quantizer(codebook)
    decoded = decode(*quantizer.encode(make_rows(), codebook), codebook)
    again = decode(*quantizer.encode(decoded, codebook), codebook)
    # A search among sums may miss the sum that a row is; of random books it finds almost all.
    same = (again - decoded).norm(dim=1) < 1e-4
    assert same.all() if kind == "pq" else same.float().mean() > 0.9


@every_kind
@pytest.mark.parametrize("k", [1, 2, 5, 8, 100])
def test_near_codewords_come_nearest_first_and_no_more_than_there_are(kind, rotated, k):
    codebook = make_codebook(kind, rotated, cells=5, residual=True)
    rest = leave_over(make_rows(), codebook)[1]
    near = open_quantizer(codebook).neighbours(rest, codebook, k)
    blocks, width = (CHOICES, 1 << BITS) if kind == "pq" else (1, 64)
    assert near.shape == (60, blocks, min(k, width), DIM // blocks)
    lengths = (near - rest.unflatten(1, (blocks, 1, -1))).norm(dim=3)
    assert (lengths.diff(dim=2) >= -1e-5).all()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_near_codewords_of_product_codes_equal_brute_force(k):
    codebook = make_codebook()
    rest = make_rows()
    near = open_quantizer(codebook).neighbours(rest, codebook, k)
    for part, row in itertools.product(range(CHOICES), range(60)):
        block, words = rest[row].unflatten(0, (CHOICES, -1))[part], torch.tensor(codebook.books[part])
        wanted = words[(words - block).norm(dim=1).argsort()[:k]]
        torch.testing.assert_close(near[row, part], wanted)


@pytest.mark.parametrize("kind", ["rq", "lsq"])
def test_near_sums_are_all_sums_in_order_where_the_beam_holds_them(kind):
    codebook = make_codebook(kind, choices=2)
    rest = make_rows(10)
    near = open_quantizer(codebook).neighbours(rest, codebook, 100)
    assert near.shape == (10, 1, 64, DIM)
    for row, found in zip(rest, near[:, 0], strict=True):
        slow = sum_exhaustively(row.tolist(), codebook.books.tolist())
        torch.testing.assert_close(found, row - torch.tensor([rest for _, rest in slow]), rtol=1e-4, atol=1e-5)


@every_shape
@every_kind
def test_the_nearest_is_what_the_code_of_a_beam_that_wide_stands_for(kind, rotated, cells, residual):
    codebook = make_codebook(kind, rotated, cells=cells, residual=residual)
    if kind == "pq":
        quantizer = open_quantizer(codebook)
    else:
        quantizer = AdditiveQuantizer(AdditiveConfig(kind="rq", books=CHOICES, bits=BITS), DIM, beam=5)
    x = make_rows()
    cells_N, rest = leave_over(x, codebook)
    near = quantizer.neighbours(rest, codebook, 1)[:, :, 0].flatten(1)
    coded = rotate(decode(*quantizer.encode(x, codebook), codebook), codebook)
    coded -= torch.tensor(codebook.coarse)[cells_N] * residual
    torch.testing.assert_close(near, coded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cells", [1, 5])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_opened_quantizer_codes_as_the_one_that_trained(kind, cells):
    config = CONFIGS[kind].model_copy(update={"cells": cells})
    quantizer, x = make_quantizer(config, DIM), make_rows(300)
    codebook = train_codebook(x, quantizer, LloydConfig(iterations=3)).codebook
    opened = open_quantizer(codebook)
    assert isinstance(opened, AdditiveQuantizer if codebook.additive else ProductQuantizer)
    assert (opened.dim, codebook.kind) == (DIM, "pq" if kind == "opq" else kind)
    for mine, theirs in zip(quantizer.encode(x, codebook), opened.encode(x, codebook), strict=True):
        assert torch.equal(mine, theirs)


@every_shape
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_an_opened_quantizer_makes_codebooks_of_the_same_shape(kind, cells, residual):
    codebook = make_codebook(kind, cells=cells, residual=residual)
    blank = open_quantizer(codebook).blank()
    assert (blank.kind, blank.residual) == (kind, residual)
    assert [array.shape for array in blank.arrays().values()] == [array.shape for array in codebook.arrays().values()]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_packed_codes_come_back(kind, bits):
    codebook = make_codebook(kind, bits=bits)
    codes = open_quantizer(codebook).encode(make_rows(), codebook)[1].numpy()
    assert np.array_equal(codebook.unpack(codebook.pack(codes)), codes)
    assert codebook.code_bits == CHOICES * bits


@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_a_quantizer_computes_with_the_numbers_it_is_given(kind):
    codebook = make_codebook(kind, rotated=True, cells=5, residual=True)
    x, quantizer = make_rows(), open_quantizer(codebook)
    single, double = quantizer.encode(x, codebook), quantizer.encode(x.double(), codebook)
    assert (single[1] == double[1]).all(1).float().mean() > 0.95
    assert quantizer.neighbours(leave_over(x.double(), codebook)[1], codebook, 2).dtype == torch.float64
