"""Vector and line quantization: cells are cut into regions by lines to their neighbours, at one byte a vector.

Cells come first. Each is joined to the `edges` centroids nearest to its own; a vector is given the line that it lies
nearest to and a level along it (`gsl_dist.quantizers.lines`), and product codewords describe what the point on the line
leaves over. A code is the choices of the codewords and then the level; the list it lies in is its region.

With the point y, its cell's centroid c, the neighbouring one s, the level l and the codewords r:

    |q - y - r|^2 = |q|^2 + |y + r|^2 - 2 (1 - l) <q, c> - 2 l <q, s> - 2 sum_m <q_m, r_m>

All but |y + r|^2 is known once for a query and a region or a codeword, and |y + r|^2 does not depend on the query: a
code costs M look-ups, one product and one addition.

Source: as in `lines`; that the squared length is kept with the code, in place of a second table of cells and codewords,
is ours.
"""

# Shapes: N vectors, D dims, C cells, E edges of each, L levels, M sub-vectors, K codewords, Q queries

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from gsl_dist.codebook import LEVELS, Codebook
from gsl_dist.quantizers.base import LloydConfig, Plan, as_tensor, decode, find_cells, rotate
from gsl_dist.quantizers.cells import AUTOMATIC, CellSearch
from gsl_dist.quantizers.kmeans import Stats, Touched, find_nearest, measure_stats, sum_touched, update_centroids
from gsl_dist.quantizers.lines import find_edges, place_rows, project, read_edges, read_levels
from gsl_dist.quantizers.product import ProductConfig, ProductQuantizer


class LineConfig(ProductConfig):
    """A product quantizer of what lines between cells leave over: `sub_vectors` x `bits` bits, a byte, a region."""

    kind: Literal["vlq"]  # type: ignore[assignment]
    cells: int = Field(default=1024, ge=2, description="C, centroids that lines go out from")
    edges: int = Field(default=32, ge=1, le=256, description="E, lines of each cell, to its nearest others")
    residual: Literal[True] = Field(default=True, description="codes always stand for what is left over")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _edges_end_somewhere(self) -> LineConfig:
        if self.edges >= self.cells:
            raise ValueError(f"edges ({self.edges}) go to other cells: there are {self.cells - 1} of them")
        return self


class LineQuantizer(ProductQuantizer):
    """Trains and applies codebooks of cells, lines and product codewords."""

    config: LineConfig

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""
        return max(super().min_rows, LEVELS)

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training: cells, the lines between them, where on these rows lie, the codewords."""
        iterations = lloyd.refresh_iterations if refine else lloyd.iterations
        return (("cells", iterations), ("edges", 1), ("levels", iterations), ("feet", 1), ("books", iterations))

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero."""
        edges = np.zeros((self.config.cells, self.config.edges), np.int32)
        levels, feet = np.zeros(LEVELS, np.float32), np.zeros(edges.shape, np.float32)
        return replace(super().blank(), kind="vlq", edges=edges, levels=levels, feet=feet)

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Any:
        """Give rotated rows (1, N, D), the region of each and how far along it lies, or sub-vectors (M, N, d)."""
        if phase in ("cells", "edges"):
            return rotate(x_ND, codebook)[None]
        z_ND = rotate(x_ND, codebook)
        cells_N = find_cells(z_ND, codebook)
        if phase == "books":
            return self._cut(place_rows(z_ND, cells_N, codebook).rest_ND)
        edges_N, along_N = project(z_ND, cells_N, codebook)
        return cells_N * codebook.edge_count + edges_N, along_N

    def seed(self, codebook: Codebook, phase: str, sample: Any, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase; levels begin with as many rows each."""
        if phase in ("edges", "feet"):
            return codebook
        if phase == "levels":
            shares_L = (np.arange(LEVELS) + 0.5) / LEVELS
            return replace(codebook, levels=np.quantile(sample[1].numpy(), shares_L))
        return super().seed(codebook, phase, sample, rng)

    def assign(self, prepared: Any, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC) -> Stats | Touched:
        """Measure what `update` needs of these rows; where lines go follows from the cells alone."""
        if phase == "edges":
            return Stats(np.zeros((1, 1)), np.zeros((1, 1, 1)), 0.0, prepared.shape[1])
        if phase == "levels":
            along_N = prepared[1]
            return measure_stats(along_N[None, :, None], read_levels(codebook, along_N)[None, :, None])
        if phase == "feet":
            regions_N, along_N = prepared
            return sum_touched(along_N[:, None], regions_N, torch.zeros_like(along_N), codebook.lists)
        return super().assign(prepared, codebook, phase, search)

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""
        if phase == "edges":
            edges_CE = find_edges(torch.tensor(codebook.coarse), self.config.edges)
            return replace(codebook, edges=edges_CE.numpy())
        if phase == "levels":
            levels_L = update_centroids(np.asarray(codebook.levels)[None, :, None], stats)
            return replace(codebook, levels=np.sort(levels_L.ravel()))
        if phase == "feet":
            counts_R, sums_R = stats.counts_GK[0], stats.sums_GKd[0, :, 0]
            # Where a line won no row of the sample, the mean of all is as good as anything.
            feet_R = np.where(counts_R > 0, sums_R, sums_R.sum()) / np.where(counts_R > 0, counts_R, counts_R.sum())
            return replace(codebook, feet=feet_R.reshape(codebook.cells, -1))
        return super().update(codebook, phase, stats, stride)

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its region, and its code: the nearest codeword of every sub-vector, and the level.

        Shapes: x_ND (N, D) float32 -> regions (N,) int64, codes (N, M + 1) uint8.
        """
        z_ND = rotate(x_ND, codebook)
        placed = place_rows(z_ND, find_cells(z_ND, codebook), codebook)
        codes_MN, _ = find_nearest(self._cut(placed.rest_ND), as_tensor(codebook.landed.books, x_ND))
        return placed.regions_N, torch.cat([codes_MN, placed.levels_N[None]]).T.to(torch.uint8)

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each decoded item, by the look-ups above.

        Shapes: queries_QD (Q, D), cells_N (N,) regions, codes_NM (N, M + 1) -> (Q, N) float32.
        """
        norms_N = decode(cells_N, codes_NM, codebook).square().sum(1)
        turned_QD, choices_NM, levels_N = rotate(queries_QD, codebook), codes_NM[:, :-1].long(), codes_NM[:, -1].long()
        dots_QC = turned_QD @ as_tensor(codebook.coarse, turned_QD).T
        own_QN = dots_QC[:, cells_N // codebook.edge_count]
        other_QN = dots_QC[:, read_edges(codebook, turned_QD).flatten()[cells_N]]
        found_QN = torch.lerp(own_QN, other_QN, read_levels(codebook, turned_QD)[levels_N])
        books_MKd = as_tensor(codebook.books, turned_QD)
        dots_QMK = torch.einsum("qmd,mkd->qmk", turned_QD.unflatten(1, books_MKd.shape[::2]), books_MKd)
        for part, choice_N in enumerate(choices_NM.T):
            found_QN += dots_QMK[:, part, choice_N]
        return queries_QD.square().sum(1, keepdim=True) + norms_N - 2 * found_QN
