"""RaBitQ codes in the file that faiss's own RaBitQ reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_queries, make_rows  # noqa: E402

from gsl_dist.errors import ArtefactError  # noqa: E402
from gsl_dist.index.lists import join_lists, make_lists, open_lists  # noqa: E402
from gsl_dist.index.shards import QUERY_BITS, create_shard, extract_codebook, read_lists  # noqa: E402
from gsl_dist.quantizers import RabitConfig, RabitQuantizer  # noqa: E402

every_shape = pytest.mark.parametrize(
    ("dim", "cells", "rotated"), [(16, 1, False), (16, 7, True), (20, 7, True), (37, 3, False)]
)
every_layout = pytest.mark.parametrize("layout", ["plain", "fastscan"])
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def make_shape(dim, cells, rotated, bits=1):
    """Give a codebook, rows that are spread about its cells, their ids, and queries."""
    codebook = make_codebook("rabitq", bits=bits, cells=cells, rotated=rotated, dim=dim)
    rng = np.random.default_rng(4)
    x_ND = codebook.coarse[rng.integers(cells, size=500)] + rng.normal(size=(500, dim))
    x_ND = (x_ND if codebook.rotation is None else x_ND @ codebook.rotation).astype(np.float32)
    return codebook, x_ND, rng.permutation(5000)[:500], x_ND[:30] + 0.5 * make_queries(30, dim=dim)


def encode(x_ND, codebook):
    quantizer = RabitQuantizer(RabitConfig(kind="rabitq", bits=codebook.bits, cells=codebook.cells), codebook.dim)
    cells_N, codes = quantizer.encode(torch.tensor(x_ND), codebook)
    return cells_N.numpy(), codebook.pack(codes.numpy())


def build_theirs(codebook, x_ND, ids):
    """Give what faiss makes of the vectors with our centroids, behind our rotation."""
    coarse = faiss.IndexFlatL2(codebook.dim)
    coarse.add(codebook.coarse)
    index = faiss.IndexIVFRaBitQ(coarse, codebook.dim, codebook.cells, faiss.METRIC_L2, True, codebook.bits)
    index.referenced_objects = [coarse]
    index.is_trained, index.qb = True, QUERY_BITS
    index.add_with_ids(codebook.rotate(x_ND), ids)
    return index


def by_id(rows):
    return [part[np.argsort(rows[0])] for part in rows]


@every_shape
def test_a_file_of_signs_equals_what_faiss_makes_of_the_vectors(tmp_path, dim, cells, rotated):
    codebook, x_ND, ids, queries = make_shape(dim, cells, rotated)
    make_lists(codebook, ids, *encode(x_ND, codebook)).write(tmp_path / "shard")
    opened, theirs = faiss.read_index(str(tmp_path / "shard")), build_theirs(codebook, x_ND, ids)
    ours, wanted = by_id(open_lists(tmp_path / "shard", codebook).read()), by_id(read_lists(theirs))
    signs = (dim + 7) // 8
    assert ours[2].shape == wanted[2].shape == (500, signs + 8)
    assert np.array_equal(ours[1], wanted[1]) and np.array_equal(ours[2][:, :signs], wanted[2][:, :signs])
    np.testing.assert_allclose(read_factors(ours[2], signs), read_factors(wanted[2], signs), rtol=1e-5)
    params = faiss.SearchParametersIVF(nprobe=cells)
    found, expected = (
        opened.search(queries, 10, params=params),
        theirs.search(codebook.rotate(queries), 10, params=params),
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert (found[1] == expected[1]).mean() > 0.99


def read_factors(packed, start):
    return np.ascontiguousarray(packed[:, start:]).view("<f4")


@every_shape
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_several_bits_point_no_less_nearly_at_a_row_than_those_that_faiss_finds(tmp_path, dim, cells, rotated, bits):
    codebook, x_ND, ids, _ = make_shape(dim, cells, rotated, bits)
    cells_N, packed = encode(x_ND, codebook)
    theirs = by_id(read_lists(build_theirs(codebook, x_ND, ids)))[2][np.argsort(np.argsort(ids))]
    assert packed.shape == theirs.shape
    rests = codebook.rotate(x_ND).astype(np.float64) - codebook.coarse[cells_N]
    cosines = []
    for codes in (packed, theirs):
        words = codebook.unpack(codes)[:, :dim] + 0.5 - codebook.codewords / 2
        cosines.append((words * rests).sum(1) / np.linalg.norm(words, axis=1) / np.linalg.norm(rests, axis=1))
    assert (cosines[0] >= cosines[1] - 1e-6).all() and (1 - cosines[0]).mean() < (1 - cosines[1]).mean()
    signs, ours, wanted = (dim + 7) // 8, *(codebook.unpack(codes)[:, dim:] for codes in (packed, theirs))
    assert np.array_equal(packed[:, :signs], theirs[:, :signs]), "the signs are the same whatever the other bits"
    np.testing.assert_allclose(read_factors(ours, 0)[:, :4], read_factors(wanted, 0)[:, :4], rtol=1e-4)


def tie_precision(codebook, queries, cells_N, packed, layout):
    """Give how far off a distance may be: half a step of a byte in every number of the query, (Q, N).

    In blocks, also half a step of a byte in each table of 4 dimensions, and in their sum.
    """
    asked_QCD = codebook.rotate(queries)[:, None] - codebook.coarse
    rests = codebook.rotate(codebook.decode(cells_N, codebook.unpack(packed))) - codebook.coarse[cells_N]
    slack_QN = (np.ptp(asked_QCD, axis=2) / 255)[:, cells_N] * np.abs(rests).sum(1)
    if layout == "fastscan":
        steps = np.add.reduceat(np.abs(asked_QCD), np.arange(0, codebook.dim, 4), axis=2).max((1, 2)) / 255
        slack_QN += (codebook.dim / 4 + 3) * steps[:, None] * 2 * np.abs(rests).mean(1)
    return slack_QN


@every_layout
@every_width
@every_shape
def test_the_file_answers_what_the_formula_estimates(tmp_path, dim, cells, rotated, bits, layout):
    codebook, x_ND, ids, queries = make_shape(dim, cells, rotated, bits)
    cells_N, packed = encode(x_ND, codebook)
    make_lists(codebook, ids, cells_N, packed, "flat", layout).write(tmp_path / "shard")
    quantizer = RabitQuantizer(RabitConfig(kind="rabitq", bits=bits, cells=cells), dim)
    estimates = quantizer.measure_distances(
        torch.tensor(queries), torch.tensor(cells_N), torch.tensor(codebook.unpack(packed)), codebook
    ).numpy()
    distances, found = open_lists(tmp_path / "shard", codebook).search(queries, 10, cells)
    place = {int(item): at for at, item in enumerate(ids)}
    own = np.stack([row[[place[int(item)] for item in hits]] for row, hits in zip(estimates, found, strict=True)])
    # A query's numbers are cut to bytes for the signs; its distances to the codes of several bits are exact.
    slack = 1e-3 + tie_precision(codebook, queries, cells_N, packed, layout) * (bits == 1)
    slack = np.stack([row[[place[int(item)] for item in hits]] for row, hits in zip(slack, found, strict=True)])
    assert (np.abs(distances - np.maximum(own, 0)) <= slack).all()
    # Candidates that the signs alone put too far off are never looked at, so that a few may be missed.
    assert (own[:, 0] <= np.sort(estimates)[:, 0] + slack[:, 0] + 0.1).mean() > 0.9


@every_layout
@every_width
def test_the_codebook_inside_is_the_one_given_and_no_other_opens_it(tmp_path, bits, layout):
    codebook = make_codebook("rabitq", bits=bits, rotated=True)
    rows = make_rows(codebook)
    make_lists(codebook, *rows, "flat", layout).write(tmp_path / "shard")
    for part, given in zip(by_id(open_lists(tmp_path / "shard", codebook).read()), by_id(rows), strict=True):
        np.testing.assert_array_equal(part, given)
    assert extract_codebook(faiss.read_index(str(tmp_path / "shard"))).fingerprint == codebook.fingerprint
    others = [make_codebook("rabitq", bits=bits, rotated=True, seed=9), replace(codebook, rotation=None)]
    others.append(make_codebook("rabitq", bits=bits % 4 + 1, rotated=True))
    for other in others:
        with pytest.raises(ArtefactError, match="another codebook"):
            open_lists(tmp_path / "shard", other)
    with pytest.raises(ArtefactError, match="another codebook"):
        open_lists(tmp_path / "shard", make_codebook())


@every_layout
@pytest.mark.parametrize("coarse_search", ["flat", "hnsw"])
@every_width
def test_joined_shards_answer_as_one(bits, coarse_search, layout):
    codebook = make_codebook("rabitq", bits=bits, rotated=True)
    ids, cells, codes = make_rows(codebook)
    parts = [(ids[at::3], cells[at::3], codes[at::3]) for at in range(3)]
    joined = join_lists([make_lists(codebook, *part, coarse_search, layout) for part in parts])
    whole = make_lists(codebook, ids, cells, codes, coarse_search, layout)
    for one, other in zip(by_id(joined.read()), by_id(whole.read()), strict=True):
        np.testing.assert_array_equal(one, other)
    found, wanted = (lists.search(make_queries(), 9, 8)[0] for lists in (joined, whole))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@every_layout
@every_width
def test_an_empty_shard_is_searched_and_how_queries_are_cut_stands_in_the_file(tmp_path, bits, layout):
    codebook = make_codebook("rabitq", bits=bits)
    make_lists(codebook, *(part[:0] for part in make_rows(codebook)), "flat", layout).write(tmp_path / "shard")
    index = faiss.read_index(str(tmp_path / "shard"))
    assert index.qb == create_shard(codebook).qb == QUERY_BITS and index.rabitq.nb_bits == bits
    assert (open_lists(tmp_path / "shard", codebook).search(make_queries(), 3, 5)[1] == -1).all()
