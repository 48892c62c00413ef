"""Product codes: shapes, brute force, and distances by look-up against decoded vectors."""

import itertools

import numpy as np
import pytest
import torch

from gsl_dist.codebook import Codebook
from gsl_dist.errors import ConfigError
from gsl_dist.quantizers import LloydConfig, ProductConfig, decode, make_quantizer, train_codebook
from gsl_dist.quantizers.base import find_cells

SHAPES = [(1, False), (5, True), (5, False)]
every_shape = pytest.mark.parametrize(("cells", "residual"), SHAPES, ids=["flat", "residual", "cells"])
every_bits = pytest.mark.parametrize("bits", range(1, 9))


def make_clusters(rows, dim, *, clusters=20, spread=0.5, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    return (centres[rng.integers(clusters, size=rows)] + spread * rng.normal(size=(rows, dim))).astype(np.float32)


def make_random(*, bits=4, cells=1, residual=False, dim=12, parts=4, seed=0):
    """Give a quantizer and a codebook of random numbers."""
    config = ProductConfig(sub_vectors=parts, bits=bits, cells=cells, residual=residual)
    rng = np.random.default_rng(seed)
    quantizer = make_quantizer(config, dim)
    blank = quantizer.blank()
    coarse = rng.normal(size=blank.coarse.shape) if cells > 1 else blank.coarse
    return quantizer, Codebook(coarse=coarse, books=rng.normal(size=blank.books.shape), residual=blank.residual)


def measure(quantizer, x, codebook, phase):
    return quantizer.assign(quantizer.prepare(x, codebook, phase), codebook, phase)


def list_phases(quantizer, *, refine=False):
    return tuple(phase for phase, _ in quantizer.plan(LloydConfig(), refine=refine))


def encode_slowly(x, codebook):
    """Give the cell and codes of one vector by trying everything."""
    cell = int(np.argmin([np.square(x - centroid).sum() for centroid in codebook.coarse]))
    rest = x - codebook.coarse[cell] if codebook.residual else x
    parts = np.split(rest, codebook.sub_vectors)
    choices = [
        int(np.argmin([np.square(part - word).sum() for word in book]))
        for part, book in zip(parts, codebook.books, strict=True)
    ]
    return cell, choices


@every_shape
@every_bits
def test_encode_equals_trying_everything(bits, cells, residual):
    quantizer, codebook = make_random(bits=bits, cells=cells, residual=residual)
    x = torch.tensor(make_clusters(40, 12))
    cells_N, codes = quantizer.encode(x, codebook)
    slow = [encode_slowly(row, codebook) for row in x.numpy()]
    assert cells_N.tolist() == [cell for cell, _ in slow] and codes.tolist() == [choices for _, choices in slow]
    assert (cells_N.dtype, codes.dtype) == (torch.int64, torch.uint8)


@every_shape
def test_ties_go_to_the_lowest_index(cells, residual):
    quantizer, codebook = make_random(bits=2, cells=cells, residual=residual)
    books = codebook.books.copy()
    books[:, 3] = books[:, 1]
    twin = Codebook(coarse=codebook.coarse, books=books, residual=codebook.residual)
    codes = quantizer.encode(torch.tensor(make_clusters(200, 12)), twin)[1]
    assert (codes == 1).any() and not (codes == 3).any()


@every_shape
def test_decoding_what_was_encoded_errs_by_what_was_measured(cells, residual):
    quantizer, codebook = make_random(cells=cells, residual=residual)
    x = torch.tensor(make_clusters(100, 12))
    decoded = decode(*quantizer.encode(x, codebook), codebook)
    measured = measure(quantizer, x, codebook, "books")
    assert float((x - decoded).square().sum()) == pytest.approx(measured.error, rel=1e-5)
    assert measured.rows == 100


@every_shape
def test_decode_equals_that_of_the_codebook(cells, residual):
    quantizer, codebook = make_random(cells=cells, residual=residual)
    cells_N, codes = quantizer.encode(torch.tensor(make_clusters(50, 12)), codebook)
    decoded = decode(cells_N, codes, codebook)
    np.testing.assert_allclose(decoded.numpy(), codebook.decode(cells_N.numpy(), codes.numpy()), atol=1e-6)


@every_shape
def test_decoded_vectors_encode_to_themselves(cells, residual):
    quantizer, codebook = make_random(cells=cells, residual=residual)
    books = codebook.books * (0.01 if residual else 1)  # residuals so small that a decoded vector stays in its cell
    codebook = Codebook(coarse=codebook.coarse, books=books, residual=codebook.residual)
    cells_N, codes = quantizer.encode(torch.tensor(make_clusters(50, 12)), codebook)
    decoded = decode(cells_N, codes, codebook)
    again_N, codes_again = quantizer.encode(decoded, codebook)
    assert torch.equal(codes_again, codes)
    assert torch.equal(again_N, cells_N) or not residual


@every_shape
@every_bits
def test_distances_by_look_up_equal_those_to_decoded_vectors(bits, cells, residual):
    quantizer, codebook = make_random(bits=bits, cells=cells, residual=residual)
    x = torch.tensor(make_clusters(60, 12))
    queries = torch.tensor(make_clusters(7, 12, seed=1))
    cells_N, codes = quantizer.encode(x, codebook)
    decoded = decode(cells_N, codes, codebook)
    plain = (queries[:, None] - decoded).square().sum(-1)
    measured = quantizer.measure_distances(queries, cells_N, codes, codebook)
    torch.testing.assert_close(measured, plain, rtol=1e-4, atol=1e-4)


@every_bits
def test_packed_codes_come_back(bits):
    quantizer, codebook = make_random(bits=bits, parts=3)
    codes = quantizer.encode(torch.tensor(make_clusters(30, 12)), codebook)[1].numpy()
    assert np.array_equal(codebook.unpack(codebook.pack(codes)), codes)


@every_shape
def test_stats_of_any_split_add_to_the_whole(cells, residual):
    quantizer, codebook = make_random(cells=cells, residual=residual)
    x = torch.tensor(make_clusters(90, 12))
    for phase, sizes in itertools.product(list_phases(quantizer), ([45, 45], [1, 89], [30, 0, 60])):
        whole = measure(quantizer, x, codebook, phase)
        first, *others = [measure(quantizer, part, codebook, phase) for part in x.split(sizes)]
        total = sum(others, start=first)
        assert np.array_equal(total.counts_GK, whole.counts_GK)
        one, other = (quantizer.update(codebook, phase, stats) for stats in (total, whole))
        np.testing.assert_allclose(one.books, other.books, atol=1e-6)
        np.testing.assert_allclose(one.coarse, other.coarse, atol=1e-6)


def test_a_phase_updates_its_own_part_of_the_codebook_alone():
    quantizer, codebook = make_random(cells=5, residual=True)
    x = torch.tensor(make_clusters(90, 12))
    for phase, moves in (("cells", "coarse"), ("books", "books")):
        updated = quantizer.update(codebook, phase, measure(quantizer, x, codebook, phase))
        for name in ("coarse", "books"):
            assert np.array_equal(getattr(updated, name), getattr(codebook, name)) == (name != moves)


def test_cells_are_a_phase_only_where_there_are_several():
    assert list_phases(make_random()[0]) == ("books",)
    assert list_phases(make_random(cells=5)[0]) == ("cells", "books")


def test_one_cell_has_no_residual():
    blank = make_quantizer(ProductConfig(sub_vectors=2, bits=3, cells=1, residual=True), 8).blank()
    assert not blank.residual and blank.coarse.shape == (1, 8) and blank.books.shape == (2, 8, 4)


def test_find_cells_equals_brute_force():
    codebook = make_random(cells=5)[1]
    x = torch.tensor(make_clusters(80, 12))
    assert torch.equal(find_cells(x, codebook), torch.cdist(x, torch.tensor(codebook.coarse)).argmin(1))


def test_dimensions_that_do_not_divide_name_the_field_and_what_fits():
    with pytest.raises(ConfigError, match=r"quantizer\.sub_vectors: got 5, but .* 12: \[1, 2, 3, 4, 6, 12\]") as error:
        make_quantizer(ProductConfig(sub_vectors=5), 12)
    assert error.value.field == "quantizer.sub_vectors"


def test_more_bits_and_residuals_err_less():
    x = torch.tensor(make_clusters(1000, 12))
    lloyd = LloydConfig(iterations=8)

    def error(**settings):
        quantizer = make_quantizer(ProductConfig(sub_vectors=4, **settings), 12)
        return train_codebook(x, quantizer, lloyd).relative_error

    errors = [error(bits=bits) for bits in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert error(bits=2, cells=16, residual=True) < error(bits=2, cells=16, residual=False)


@pytest.mark.parametrize(("parts", "bits"), [(4, 4), (2, 6), (8, 3)])
def test_trained_codes_err_no_more_than_those_of_faiss(parts, bits):
    import faiss

    x = make_clusters(3000, 16, clusters=60)
    theirs = faiss.ProductQuantizer(16, parts, bits)
    theirs.cp.niter = 20
    theirs.train(x)
    their_error = np.square(x - theirs.decode(theirs.compute_codes(x))).sum(1).mean() / x.var(0).sum()
    quantizer = make_quantizer(ProductConfig(sub_vectors=parts, bits=bits), 16)
    ours = train_codebook(torch.tensor(x), quantizer, LloydConfig(iterations=20))
    assert ours.relative_error <= 1.05 * their_error
