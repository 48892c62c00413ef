"""What every quantizer offers, so that one coordinator can train any of them over any number of workers.

Training runs through named phases (coarse cells before the codewords of what they leave over). At the start of each,
workers `prepare` their rows: what earlier phases have settled is taken out once. Then, again and again, they call
`assign` on what they prepared, the sum of the statistics goes to `update`, and the new codebook goes back to them.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray, read_scales
from gsl_dist.config import Strict
from gsl_dist.quantizers.cells import AUTOMATIC, CellSearch, hold_cells
from gsl_dist.quantizers.kmeans import Stats, Touched
from gsl_dist.quantizers.lines import find_points, place_rows

# Shapes: N vectors, D dims, M choices, Q queries; G blocks of d dims in which codewords are chosen, k neighbours


class LloydConfig(Strict):
    """How a codebook is fitted."""

    iterations: int = Field(default=10, ge=1, description="Lloyd's iterations for each part of a new codebook")
    refresh_iterations: int = Field(default=5, ge=1, description="the same, when it starts from an older codebook")
    sample_rows: int = Field(
        default=262_144, ge=1, description="rows of the corpus that take part, at most; give 30 or more for each cell"
    )
    batch_share: float = Field(
        default=1.0, gt=0, le=1, description="rows that take part in one iteration of the cells: all, or 1/2, 1/3, ..."
    )
    cell_search: CellSearch = AUTOMATIC


Plan = tuple[tuple[str, int], ...]
"""Phases in their order, with the iterations of each."""


class Coder(Protocol):
    """How codebooks of one kind are used."""

    dim: int

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its list and its code, (N,) int64 and (N, choices) uint8."""

    def neighbours(self, rest_ND: Tensor, codebook: Codebook, k: int) -> Tensor:
        """Give what the k codes nearest to each row stand for, in blocks, nearest first.

        Shapes: rest_ND (N, D), as `leave_over` gives it -> (N, G, k, d); fewer than k where there are no more.
        """

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each item that look-up tables say, (Q, N) float32."""


class Quantizer(Coder, Protocol):
    """A family of codebooks and how one is trained and used."""

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training a new codebook, or of refining one; never empty."""

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero."""

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Any:
        """Give what `assign` and `seed` look at in a phase; it stays the same while the phase lasts."""

    def seed(self, codebook: Codebook, phase: str, sample: Any, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase, chosen from a prepared sample."""

    def assign(self, prepared: Any, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC) -> Stats | Touched:
        """Measure what `update` needs of these rows; in the phase of the cells, by the search that is asked for."""

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for, after a stride where means are what is sought."""


def find_cells(z_ND: Tensor, codebook: Codebook) -> Tensor:
    """Give each rotated vector its nearest cell; of many cells, the nearest of those that the search looks at.

    Shapes: z_ND (N, D) -> (N,) int64.
    """
    if codebook.cells == 1:
        return torch.zeros(len(z_ND), dtype=torch.int64, device=z_ND.device)
    return hold_cells(codebook, z_ND).find(z_ND)[0]


def rotate(x_ND: Tensor, codebook: Codebook) -> Tensor:
    """Give vectors as cells and codewords see them.

    Shapes: (N, D) -> (N, D).
    """
    return x_ND if codebook.rotation is None else x_ND @ as_tensor(codebook.rotation, x_ND).T


def leave_over(x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Give each vector's list, and what the codewords stand for: the rotated vector, or what its anchor leaves of it.

    The list is a cell and the anchor its centroid, or a region and the point on its line.

    Shapes: x_ND (N, D) -> lists (N,) int64, rest (N, D).
    """
    z_ND = rotate(x_ND, codebook)
    cells_N = find_cells(z_ND, codebook)
    if codebook.edges is not None:
        placed = place_rows(z_ND, cells_N, codebook)
        return placed.regions_N, placed.rest_ND
    return cells_N, z_ND - hold_cells(codebook, z_ND).coarse_CD[cells_N] if codebook.residual else z_ND


def decode(cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
    """Give the vectors that codes stand for.

    Shapes: cells_N (N,) lists, codes_NM (N, choices) -> (N, D) float32.
    """
    books_MKd = torch.tensor(codebook.books, device=codes_NM.device)
    words_NM = codes_NM[:, : codebook.sub_vectors].long()
    chosen_NMd = books_MKd[torch.arange(codebook.sub_vectors, device=codes_NM.device), words_NM]
    decoded_ND = chosen_NMd.sum(1) if codebook.additive else chosen_NMd.flatten(1)
    if codebook.kind == "rabitq":
        decoded_ND = decoded_ND * read_scales(read_factors(codes_NM, codebook), codebook.dim)[:, None]
    if codebook.residual:
        decoded_ND = decoded_ND + find_anchors(cells_N, codes_NM, codebook, decoded_ND)
    return decoded_ND if codebook.rotation is None else decoded_ND @ as_tensor(codebook.rotation, decoded_ND)


def read_factors(codes_NM: Tensor, codebook: Codebook) -> Tensor:
    """Give the factors that RaBitQ codes end in.

    Shapes: codes_NM (N, choices) -> (N, 2) or (N, 5) float32.
    """
    return codes_NM[:, codebook.sub_vectors :].to(torch.uint8).contiguous().view(torch.float32)


def find_anchors(lists_N: Tensor, codes_NM: Tensor, codebook: Codebook, like: Tensor) -> Tensor:
    """Give what residuals are residuals of, rotated: the centroid of the cell, or the point on the line.

    Shapes: lists_N (N,), codes_NM (N, choices) -> (N, D).
    """
    if codebook.edges is not None:
        return find_points(lists_N, codes_NM[:, -1], codebook, like)
    return hold_cells(codebook, like).coarse_CD[lists_N]


def as_tensor(array: FloatArray, like: Tensor) -> Tensor:
    """Give an array of a codebook where, and with the numbers, another tensor has."""
    # A codebook's arrays are read-only, which torch cannot share; they are small, so they are copied.
    return torch.tensor(array, dtype=like.dtype, device=like.device)
