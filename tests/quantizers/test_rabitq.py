"""RaBitQ: codes and estimates by their formulas, and what a random rotation promises."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from reference import pack_bit_by_bit, rabitq_in_loops

from gsl_dist.codebook import Codebook, space_evenly
from gsl_dist.quantizers import (
    LloydConfig,
    RabitConfig,
    RabitQuantizer,
    decode,
    make_quantizer,
    open_quantizer,
    train_codebook,
)
from gsl_dist.quantizers.base import find_anchors, read_factors
from gsl_dist.quantizers.rabitq import code_rests, draw_rotation
from gsl_dist.storage import Folder

DIM = 24
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def make_rows(rows=300, *, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(6, dim))
    return torch.tensor((centres[rng.integers(6, size=rows)] + rng.normal(size=(rows, dim))).astype(np.float32))


def train(bits=1, cells=5, *, seed=0, dim=DIM):
    quantizer = RabitQuantizer(RabitConfig(kind="rabitq", bits=bits, cells=cells), dim)
    return quantizer, train_codebook(make_rows(dim=dim), quantizer, LloydConfig(iterations=4), seed=seed).codebook


@every_width
@pytest.mark.parametrize("cells", [1, 5])
def test_codes_and_estimates_equal_the_loop(bits, cells):
    quantizer, codebook = train(bits, cells)
    x, queries = make_rows(20, seed=1), make_rows(3, seed=2)
    cells_N, codes = quantizer.encode(x, codebook)
    estimates = quantizer.measure_distances(queries, cells_N, codes, codebook)
    turned, asked = (torch.tensor(codebook.rotate(rows.numpy())).double() for rows in (x, queries))
    for row, (cell, code) in enumerate(zip(cells_N.tolist(), codes, strict=True)):
        centroid = codebook.coarse[cell].tolist()
        for query in range(3):
            words = (code[:DIM].double() + 0.5 - (1 << bits) / 2).tolist()
            slow, signs = rabitq_in_loops(asked[query].tolist(), turned[row].tolist(), centroid, words)
            assert estimates[query, row] == pytest.approx(slow, rel=1e-4, abs=1e-3)
            assert [word > 0 for word in words] == signs


@pytest.mark.parametrize("bits", [2, 3])
def test_several_bits_are_those_that_point_most_nearly_at_the_row(bits):
    rests = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    grid = np.arange(1 << bits) + 0.5 - (1 << bits) / 2
    every = np.array(list(itertools.product(grid, repeat=4)))
    best = (rests.numpy() @ (every / np.linalg.norm(every, axis=1, keepdims=True)).T).max(1)
    words = code_rests(rests, bits)[:, :4].numpy() + 0.5 - (1 << bits) / 2
    mine = (rests.numpy() * words).sum(1) / np.linalg.norm(words, axis=1)
    np.testing.assert_allclose(mine, best, rtol=1e-6)


@every_width
def test_both_ways_of_decoding_give_the_cell_and_the_scaled_numbers(bits):
    quantizer, codebook = train(bits)
    x = make_rows(50, seed=1)
    cells_N, codes = quantizer.encode(x, codebook)
    decoded = decode(cells_N, codes, codebook)
    np.testing.assert_allclose(codebook.decode(cells_N.numpy(), codes.numpy()), decoded, rtol=1e-4, atol=1e-4)
    anchors = find_anchors(cells_N, codes, codebook, x)
    turned, found = (torch.tensor(codebook.rotate(rows.numpy())) - anchors for rows in (x, decoded))
    # |r^| along r is |r|: the estimate of what lies along a row itself is exact.
    torch.testing.assert_close((turned * found).sum(1), turned.square().sum(1), rtol=1e-4, atol=1e-4)
    signs = codes[:, :DIM] >= codebook.codewords // 2
    assert torch.equal(signs, turned > 0) and torch.equal(found > 0, signs)


@every_width
def test_over_random_rotations_the_estimate_is_right_on_average(bits):
    rng, (row, query) = np.random.default_rng(5), make_rows(2, seed=3).numpy().astype(np.float64)
    turns = np.stack([draw_rotation(DIM, rng) for _ in range(4000)])
    rows = torch.tensor(turns @ row)
    codes = code_rests(rows, bits)
    factors = codes[:, DIM:].contiguous().view(torch.float32)
    scale = factors[:, 1] * 2 / DIM**0.5 if bits == 1 else factors[:, 4] / -2
    words = codes[:, :DIM].double() + 0.5 - (1 << bits) / 2
    along = ((turns @ query) * (words * scale[:, None].double()).numpy()).sum(1)
    assert abs(along.mean() - row @ query) < 4 * along.std() / len(along) ** 0.5
    # The error that is allowed for is 1.9 deviations, of twice the product with a query of length 1.
    if bits > 1:
        signs = (words.sign() * factors[:, 1:2].double() / DIM**0.5).numpy()
        off = 2 * np.abs(((turns @ query) * signs).sum(1) - row @ query) / np.linalg.norm(query)
        assert 0.9 < (off <= factors[:, 2].numpy()).mean() < 0.99


def test_every_bit_brings_estimates_nearer():
    x, queries, errors = make_rows(200, seed=1), make_rows(40, seed=2), []
    far = torch.cdist(queries, x).square()
    for bits in (1, 2, 3, 4):
        quantizer, codebook = train(bits)
        found = quantizer.measure_distances(queries, *quantizer.encode(x, codebook), codebook)
        errors.append(float((found - far).square().mean()))
    assert all(more < 0.4 * less for less, more in itertools.pairwise(errors))


@every_width
def test_a_row_on_its_centroid_stands_for_it(bits):
    quantizer, codebook = train(bits)
    x = torch.tensor(codebook.coarse @ codebook.rotation)
    codes = code_rests(torch.zeros(3, DIM), bits)
    assert torch.isfinite(read_factors(codes, codebook)).all() and not read_factors(codes, codebook).any()
    torch.testing.assert_close(decode(torch.arange(3), codes, codebook), x[:3])
    assert len(quantizer.encode(x[:0], codebook)[1]) == 0


def test_rotations_are_orthogonal_and_follow_from_the_seed():
    _, one = train(seed=0)
    for other, same in ((train(seed=0)[1], True), (train(seed=1)[1], False)):
        assert (one.fingerprint == other.fingerprint) == same
        np.testing.assert_allclose(other.rotation @ other.rotation.T, np.eye(DIM), atol=1e-5)
    kept = np.mean([np.sign(draw_rotation(3, np.random.default_rng(seed))[0, 0]) for seed in range(400)])
    assert abs(kept) < 0.2, "no sign is likelier than the other"


def test_one_cell_is_the_mean_and_refining_keeps_the_rotation():
    quantizer, codebook = train(cells=1)
    np.testing.assert_allclose(codebook.coarse @ codebook.rotation, make_rows().mean(0)[None], atol=1e-4)
    again = train_codebook(make_rows(seed=9), quantizer, LloydConfig(), start=codebook).codebook
    np.testing.assert_array_equal(again.rotation, codebook.rotation)
    assert not np.allclose(again.coarse, codebook.coarse)


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    quantizer, codebook = train(2)
    for phase, _ in quantizer.plan(LloydConfig(), refine=False):
        whole = quantizer.assign(quantizer.prepare(make_rows(), codebook, phase), codebook, phase)
        parts = [
            quantizer.assign(quantizer.prepare(x, codebook, phase), codebook, phase) for x in make_rows().split(70)
        ]
        added = sum(parts[1:], parts[0])
        assert (added.rows, added.error) == (300, pytest.approx(whole.error, rel=1e-4))
        np.testing.assert_allclose(added.sums_GKd, whole.sums_GKd, rtol=1e-5)


@every_width
def test_an_opened_quantizer_codes_as_the_one_that_trained(bits):
    quantizer, codebook = train(bits)
    opened, x = open_quantizer(codebook), make_rows(50, seed=1)
    made = make_quantizer(RabitConfig(kind="rabitq", bits=bits, cells=5), DIM)
    assert isinstance(opened, RabitQuantizer) and isinstance(made, RabitQuantizer)
    for mine, theirs in zip(quantizer.encode(x, codebook), opened.encode(x, codebook), strict=True):
        assert torch.equal(mine, theirs)
    assert [array.shape for array in opened.blank().arrays().values()] == [
        array.shape for array in codebook.arrays().values()
    ]


@every_width
def test_the_only_code_of_a_row_is_its_own(bits):
    quantizer, codebook = train(bits)
    x = make_rows(40, seed=1)
    cells_N, codes = quantizer.encode(x, codebook)
    anchors = find_anchors(cells_N, codes, codebook, x)
    turned, decoded = (
        torch.tensor(codebook.rotate(rows.numpy())) - anchors for rows in (x, decode(cells_N, codes, codebook))
    )
    near = quantizer.neighbours(turned, codebook, 7)
    assert near.shape == (40, 1, 1, DIM)
    torch.testing.assert_close(near[:, 0, 0], decoded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 5, 8, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rabitq_codes_pack_to_signs_other_bits_and_factors_and_come_back(bits, dim):
    codebook = Codebook(np.zeros((2, dim)), space_evenly(dim, bits), residual=True, kind="rabitq")
    rng, tail = np.random.default_rng(0), 8 if bits == 1 else 20
    codes = np.hstack([rng.integers(1 << bits, size=(9, dim)), rng.integers(256, size=(9, tail))])
    packed = codebook.pack(codes)
    assert codebook.choices == dim + tail and packed.shape == (9, codebook.code_bytes)
    assert np.array_equal(codebook.unpack(packed), codes) and codebook.code_bits == dim * bits + 8 * tail
    words, factors = codes[:, :dim], codes[:, dim:]
    signs = np.array(pack_bit_by_bit(words >> (bits - 1), 1))
    if bits == 1:
        assert np.array_equal(packed, np.hstack([signs, factors]))
    else:
        others = np.array(pack_bit_by_bit(words & ((1 << (bits - 1)) - 1), bits - 1))
        assert np.array_equal(packed, np.hstack([signs, factors[:, :12], others, factors[:, 12:]]))
    assert codebook.unpack(codebook.pack(codes[:0])).shape == (0, dim + tail)


@pytest.mark.parametrize(
    "change", [{"residual": False}, {"books": space_evenly(5, 2) + 1}, {"landing": space_evenly(5, 2)}]
)
def test_a_rabitq_codebook_has_no_codewords_of_its_own(change):
    codebook = Codebook(np.zeros((2, 5)), space_evenly(5, 2), residual=True, kind="rabitq")
    with pytest.raises(AssertionError):
        dataclasses.replace(codebook, **change)


def test_a_saved_rabitq_codebook_comes_back(tmp_path):
    codebook = Codebook(np.ones((2, 5)), space_evenly(5, 3), residual=True, kind="rabitq", rotation=np.eye(5))
    codebook.save(Folder(tmp_path), "codebook")
    assert Codebook.load(Folder(tmp_path), "codebook").fingerprint == codebook.fingerprint
