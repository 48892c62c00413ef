"""Lines between cells: edges, feet and levels against the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import place_in_loops

from gsl_dist.codebook import LEVELS, Codebook
from gsl_dist.quantizers import lines as module
from gsl_dist.quantizers.lines import find_edges, find_points, pick_level, place_rows, project

DIM, CELLS, EDGES = 6, 20, 5


def make_codebook(*, cells=CELLS, edges=EDGES, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(cells, DIM)).astype(np.float32)
    return Codebook(
        coarse=coarse,
        books=rng.normal(size=(2, 8, DIM // 2)),
        residual=True,
        kind="vlq",
        edges=find_edges(torch.tensor(coarse), edges).numpy(),
        levels=np.sort(rng.uniform(0, 0.6, LEVELS)),
        feet=rng.uniform(0, 0.5, (cells, edges)),
    )


def make_rows(rows=200, *, seed=1):
    return torch.tensor(np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32))


def find_cells(x, codebook):
    return torch.cdist(x, torch.tensor(codebook.coarse)).argmin(1)


def test_edges_go_to_the_nearest_other_cells_nearest_first():
    coarse = make_rows(40)
    wanted = torch.cdist(coarse, coarse).fill_diagonal_(torch.inf).argsort(1)[:, :7]
    assert torch.equal(find_edges(coarse, 7), wanted)


def test_edges_found_in_chunks_equal_those_found_at_once(monkeypatch):
    coarse = make_rows(40)
    whole = find_edges(coarse, 7)
    monkeypatch.setattr(module, "_CHUNK_FLOATS", 100)
    assert torch.equal(find_edges(coarse, 7), whole)


@pytest.mark.parametrize("chunk", [50, 1 << 22])
def test_rows_are_placed_as_in_the_loop(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_FLOATS", chunk)
    codebook, x = make_codebook(), make_rows()
    cells = find_cells(x, codebook)
    placed = place_rows(x, cells, codebook)
    for row, cell, region, level, rest in zip(x, cells, *placed, strict=True):
        place, wanted, left = place_in_loops(
            row.tolist(), int(cell), codebook.coarse.tolist(), codebook.edges.tolist(), codebook.levels.tolist()
        )
        assert (int(region), int(level)) == (int(cell) * EDGES + place, wanted)
        np.testing.assert_allclose(rest, left, atol=1e-5)


def test_the_foot_is_the_nearest_point_of_all_lines_of_the_cell():
    codebook, x = make_codebook(), make_rows()
    cells = find_cells(x, codebook)
    edges, along = project(x, cells, codebook)
    coarse, ends = torch.tensor(codebook.coarse), torch.tensor(codebook.edges, dtype=torch.int64)[cells]
    own = coarse[cells]
    foot = torch.lerp(own, coarse[ends.gather(1, edges[:, None])[:, 0]], along[:, None])
    tried = torch.linspace(0, 1, 101)
    points = own[:, None, None] + tried[:, None] * (coarse[ends] - own[:, None])[:, :, None]
    nearest = (x[:, None, None] - points).square().sum(3).flatten(1).min(1).values
    assert ((x - foot).square().sum(1) <= nearest + 1e-5).all()
    # A row lies nearer to its own cell than to the one its line goes to.
    assert (along <= 0.5 + 1e-6).all() and (along > 0).float().mean() > 0.5


def test_points_of_regions_and_levels_lie_on_their_lines():
    codebook = make_codebook()
    regions, levels = torch.tensor([0, 7, CELLS * EDGES - 1]), torch.tensor([0, 100, LEVELS - 1])
    points = find_points(regions, levels, codebook, torch.zeros(1))
    for region, level, point in zip(regions.tolist(), levels.tolist(), points, strict=True):
        cell, place = divmod(region, EDGES)
        own, other = codebook.coarse[cell], codebook.coarse[codebook.edges[cell, place]]
        np.testing.assert_allclose(point, own + codebook.levels[level] * (other - own), atol=1e-6)


def test_levels_are_the_nearest_and_of_two_the_lower():
    levels = torch.tensor([0.0, 0.2, 0.3, 0.5])
    assert pick_level(torch.tensor([-1.0, 0.1, 0.11, 0.24, 0.26, 0.9]), levels).tolist() == [0, 0, 1, 1, 2, 3]


def test_centroids_in_one_place_have_a_line_without_length():
    codebook = make_codebook()
    coarse = codebook.coarse.copy()
    coarse[1] = coarse[0]
    twins = replace(codebook, coarse=coarse, edges=np.full((CELLS, 1), 1), feet=np.zeros((CELLS, 1)))
    edges, along = project(make_rows(10), torch.zeros(10, dtype=torch.int64), twins)
    assert not edges.any() and not along.any()


def test_no_rows_have_no_places():
    placed = place_rows(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), make_codebook())
    assert [len(part) for part in placed] == [0, 0, 0]
