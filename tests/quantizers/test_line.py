"""Vector and line quantization: training, codes and distances."""

import numpy as np
import pytest
import torch
from meetings import drive, share_rows
from pydantic import ValidationError

from gsl_dist.codebook import LEVELS
from gsl_dist.quantizers import (
    LineConfig,
    LloydConfig,
    ProductConfig,
    decode,
    leave_over,
    make_quantizer,
    open_quantizer,
    train_codebook,
)
from gsl_dist.quantizers.lines import find_edges, project

DIM = 8
LLOYD = LloydConfig(iterations=8, refresh_iterations=3)


def make_rows(rows=2000, *, seed=0):
    """Give rows that fill all dimensions alike, as what cells leave over does."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32))


def make_line(**settings):
    return make_quantizer(
        LineConfig(**{"kind": "vlq", "sub_vectors": 4, "bits": 4, "cells": 32, "edges": 8} | settings), DIM
    )


def test_phases_are_cells_lines_and_books():
    def phases(*, refine):
        return make_line().plan(LLOYD, refine=refine)

    assert phases(refine=False) == (("cells", 8), ("edges", 1), ("levels", 8), ("feet", 1), ("books", 8))
    assert phases(refine=True) == (("cells", 3), ("edges", 1), ("levels", 3), ("feet", 1), ("books", 3))


def test_a_trained_codebook_has_lines_between_its_own_cells():
    x, quantizer = make_rows(), make_line()
    for start in (None, train_codebook(x + 0.3, quantizer, LLOYD).codebook):
        codebook = train_codebook(x, quantizer, LLOYD, start=start).codebook
        np.testing.assert_array_equal(codebook.edges, find_edges(torch.tensor(codebook.coarse), 8))
        assert codebook.kind == "vlq" and codebook.lists == 256 and codebook.code_bytes == 3


@pytest.mark.parametrize(
    "bounds", [[0, 2000], [0, 700, 2000], [0, 5, 900, 905, 2000]], ids=lambda bounds: str(len(bounds) - 1)
)
def test_any_number_of_workers_trains_the_same_codebook(bounds):
    x, quantizer = make_rows(), make_line()
    alone = train_codebook(x, quantizer, LLOYD)
    trained, _ = drive(quantizer, share_rows(x, bounds), LLOYD)
    for name, array in alone.codebook.arrays().items():
        np.testing.assert_allclose(trained.codebook.arrays()[name], array, atol=1e-5, err_msg=name)
    assert trained.relative_error == pytest.approx(alone.relative_error, rel=1e-5)


def test_levels_lie_as_rows_do_and_ascend():
    x, quantizer = make_rows(8000), make_line()
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    cells, _ = leave_over(x, codebook)
    along = project(x, cells // 8, codebook)[1]
    assert (np.diff(codebook.levels) >= 0).all() and len(codebook.levels) == LEVELS
    chosen = torch.tensor(codebook.levels)[quantizer.encode(x, codebook)[1][:, -1].long()]
    # As many levels as a byte holds leave next to nothing.
    assert (chosen - along).square().mean() < 1e-4 * along.var()


def test_feet_are_the_means_of_regions_and_the_mean_of_all_where_there_are_no_rows():
    x, quantizer = make_rows(), make_line(cells=64, edges=16)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    regions, _ = leave_over(x, codebook)
    along = project(x, regions // 16, codebook)[1]
    counts = torch.bincount(regions, minlength=1024)
    assert 0 < (counts == 0).sum() < 1024
    for region in range(1024):
        wanted = along[regions == region].mean() if counts[region] else along.mean()
        assert codebook.feet.ravel()[region] == pytest.approx(float(wanted), abs=1e-5)


def test_lines_leave_less_than_cells_and_their_codes_err_less():
    x = make_rows(4000)
    lines = train_codebook(x, make_line(), LLOYD)
    cells = train_codebook(x, make_quantizer(ProductConfig(sub_vectors=4, bits=4, cells=32), DIM), LLOYD)
    np.testing.assert_array_equal(lines.codebook.coarse, cells.codebook.coarse)
    left = [float(leave_over(x, trained.codebook)[1].square().sum()) for trained in (lines, cells)]
    assert left[0] < 0.85 * left[1] and lines.relative_error < 0.9 * cells.relative_error


def test_the_error_is_that_of_the_decoded_rows():
    x, quantizer = make_rows(), make_line()
    trained = train_codebook(x, quantizer, LLOYD)
    decoded = decode(*quantizer.encode(x, trained.codebook), trained.codebook)
    wanted = float((x - decoded).square().sum() / (x - x.mean(0)).square().sum())
    assert trained.relative_error == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("bits", [3, 8])
def test_both_ways_of_decoding_agree_and_codes_survive_packing(bits):
    x, quantizer = make_rows(), make_line(bits=bits)
    codebook = train_codebook(x, quantizer, LLOYD).codebook
    regions, codes = (part.numpy() for part in quantizer.encode(x, codebook))
    packed = codebook.pack(codes)
    assert codes.shape == (2000, 5) and packed.shape == (2000, codebook.code_bytes) == (2000, (4 * bits + 7) // 8 + 1)
    np.testing.assert_array_equal(codebook.unpack(packed), codes)
    decoded = decode(torch.tensor(regions), torch.tensor(codes), codebook)
    np.testing.assert_allclose(codebook.decode(regions, codes), decoded, atol=1e-5)


def test_distances_by_look_up_equal_those_to_decoded_vectors():
    x, queries = make_rows(300), make_rows(7, seed=5)
    codebook = train_codebook(make_rows(), make_line(), LLOYD).codebook
    quantizer = open_quantizer(codebook)
    regions, codes = quantizer.encode(x, codebook)
    plain = (queries[:, None] - decode(regions, codes, codebook)).square().sum(-1)
    torch.testing.assert_close(
        quantizer.measure_distances(queries, regions, codes, codebook), plain, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cells": 1}, "greater than or equal to 2"),
        ({"edges": 32}, "edges .32. go to other cells: there are 31"),
        ({"edges": 0}, "greater than or equal to 1"),
        ({"residual": False}, "should be True"),
    ],
)
def test_shapes_without_lines_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        make_line(**settings)
