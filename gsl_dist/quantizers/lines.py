"""Which line a row lies at, and how far along it: the geometry of vector and line quantization.

Every cell has `edges` to the centroids nearest to its own. A row of the cell is given the edge whose line it lies
nearest to, and its foot on it, y = (1 - l) c + l s, between the centroid c and the neighbouring one s. With e = s - c
and z = x - c:

    l* = <z, e> / |e|^2,   l = l* kept between 0 and 1,   |x - y|^2 = |z|^2 - l (2 l* - l) |e|^2

l is written as the nearest of a few levels, the same for all edges. The region of a row is its cell and its edge, one
number: cell x edges + edge.

Source: Chen, Wang, Wang, et al., Vector and line quantization for billion-scale similarity search on GPUs, FGCS 2019
(arXiv 1901.00275), whose abstract could be read; the formulas are geometry. Keeping l between 0 and 1 when the edge is
chosen is ours.
"""

# Shapes: N rows, D dims, C cells, E edges of each cell, L levels

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers.cells import hold_cells
from gsl_dist.quantizers.kmeans import pick_least

_CHUNK_FLOATS = 1 << 22


class Placed(NamedTuple):
    """Rows on their lines.

    Shapes: regions (N,) int64; levels (N,) int64; rest (N, D), what the point on the line leaves over.
    """

    regions_N: Tensor
    levels_N: Tensor
    rest_ND: Tensor


def find_edges(coarse_CD: Tensor, edges: int) -> Tensor:
    """Give the centroids nearest to each one, itself apart, nearest first.

    Shapes: (C, D) -> (C, E) int64.
    """
    norms_C, found = coarse_CD.square().sum(1), []
    own_C = torch.arange(len(coarse_CD), device=coarse_CD.device)
    for some in own_C.split(max(1, _CHUNK_FLOATS // len(coarse_CD))):
        scores = torch.addmm(norms_C, coarse_CD[some], coarse_CD.T, alpha=-2)
        scores.scatter_(1, some[:, None], torch.inf)
        found.append(scores.topk(edges, dim=1, largest=False).indices)
    return torch.cat(found)


def project(z_ND: Tensor, cells_N: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Give each row of a cell its edge, and where on it the foot lies; of edges equally near, the first.

    Shapes: z_ND (N, D), cells_N (N,) -> (N,) int64, (N,) from 0 to 1.
    """
    coarse_CD, edges_CE = hold_cells(codebook, z_ND).coarse_CD, read_edges(codebook, z_ND)
    rows = max(1, _CHUNK_FLOATS // (edges_CE.shape[1] * z_ND.shape[1]))
    found = [(cells_N[:0], z_ND[:0, 0])]
    for part_nD, cells_n in zip(z_ND.split(rows), cells_N.split(rows), strict=True):
        own_nD = coarse_CD[cells_n]
        lines_nED = coarse_CD[edges_CE[cells_n]] - own_nD[:, None]
        squares_nE = lines_nED.square().sum(2)
        # Of two centroids in the same place the line has no length, and every row its foot at the beginning.
        along_nE = (lines_nED @ (part_nD - own_nD)[..., None])[..., 0] / squares_nE.clamp_min(1e-30)
        kept_nE = along_nE.clamp(0, 1)
        edges_n = pick_least(-kept_nE * (2 * along_nE - kept_nE) * squares_nE)[1]
        found.append((edges_n, kept_nE.gather(1, edges_n[:, None])[:, 0]))
    edges, along = zip(*found, strict=True)
    return torch.cat(edges), torch.cat(along)


def place_rows(z_ND: Tensor, cells_N: Tensor, codebook: Codebook) -> Placed:
    """Give each row of a cell its region and level, and what these leave over.

    Shapes: z_ND (N, D), cells_N (N,).
    """
    edges_N, along_N = project(z_ND, cells_N, codebook)
    levels_N = pick_level(along_N, read_levels(codebook, z_ND))
    regions_N = cells_N * codebook.edge_count + edges_N
    return Placed(regions_N, levels_N, z_ND - find_points(regions_N, levels_N, codebook, z_ND))


def find_points(regions_N: Tensor, levels_N: Tensor, codebook: Codebook, like: Tensor) -> Tensor:
    """Give the points on the lines that regions and levels stand for.

    Shapes: regions_N, levels_N (N,) integers -> (N, D).
    """
    coarse_CD = hold_cells(codebook, like).coarse_CD
    own_ND = coarse_CD[regions_N // codebook.edge_count]
    other_ND = coarse_CD[read_edges(codebook, like).flatten()[regions_N]]
    return torch.lerp(own_ND, other_ND, read_levels(codebook, like)[levels_N.long()][:, None])


def pick_level(along_N: Tensor, levels_L: Tensor) -> Tensor:
    """Give the nearest level; levels ascend, and of two equally near the lower is taken.

    Shapes: (N,), (L,) -> (N,) int64.
    """
    return torch.bucketize(along_N.contiguous(), (levels_L[1:] + levels_L[:-1]) / 2)


def read_edges(codebook: Codebook, like: Tensor) -> Tensor:
    """Give the ends of the lines where another tensor is: (C, E) int64."""
    assert codebook.edges is not None, codebook.kind
    return torch.tensor(codebook.edges, dtype=torch.int64, device=like.device)


def read_levels(codebook: Codebook, like: Tensor) -> Tensor:
    """Give the levels where, and with the numbers, another tensor has: (L,)."""
    assert codebook.levels is not None, codebook.kind
    return torch.tensor(codebook.levels, dtype=like.dtype, device=like.device)
