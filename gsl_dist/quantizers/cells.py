"""Which coarse cell a row belongs to, of a few or of hundreds of thousands.

A few cells are all looked at. Many are first gathered into super-cells, about 2 sqrt(C) of them, by Lloyd's iterations
over the centroids themselves. A row is then compared with the centroids of the super-cells nearest to it, and of those
alone: some 2 sqrt(C) + width sqrt(C) / 2 distances in place of C. How many super-cells are enough is measured on the
centroids, by asking where the nearest other centroid of some of them lies: few where rows form clusters, so many where
they fill all dimensions alike that nothing would be saved, and then all cells are looked at after all.

The partition follows from the centroids alone, so nothing of it travels or is stored: whoever has the codebook has it,
and a row's cell depends on the row and the codebook, not on the rows beside it.
"""

# Shapes: N rows, D dims, C cells, S super-cells, P pairs of a super-cell and a row to be looked at there, T tried cells

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.quantizers.kmeans import (
    MANY,
    Stats,
    Touched,
    find_nearest,
    measure_stats,
    pick_least,
    sum_by_label,
    sum_touched,
    update_centroids,
)

# Measured on clusters, SIFT, rows near a plane and uniform ones, 5,000 to 262,144 cells: with these, 99.5 of 100 rows
# or more are given their nearest cell, and the error grows by two thousandths at most.
_SUPERS_PER_ROOT, _CELLS_PER_SUPER, _SUPER_ITERATIONS = 2, 32, 6
_TRIED, _COVERED, _MARGIN, _LEAST_WIDTH = 512, 0.99, 1.5, 16
# A super-cell takes as long to look into as so many centroids besides its own, and one of these as long as two of all.
_VISIT = 100
_CHUNK_BYTES = 1 << 26
_CHUNK_FLOATS = 1 << 20


class CellSearch(Strict):
    """How the nearest of many cells is searched for."""

    two_level: bool | None = Field(
        default=None, description="by way of super-cells; None: above 4,096 cells, where that saves anything"
    )
    width: int | None = Field(
        default=None, ge=1, description="super-cells that are looked into for a row; None: as many as 99 of 100 need"
    )


AUTOMATIC = CellSearch()


@dataclass(frozen=True)
class Partition:
    """Cells gathered in super-cells, none of them empty; one entry of each tuple is one super-cell.

    Shapes: supers_SD (S, D); members: cells in ascending order, int64; offsets: their centroids from the centre of the
    super-cell, (cells, D); norms: the squared lengths of these.
    """

    supers_SD: Tensor
    members: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]


class Cells:
    """The cells of a codebook where they are searched, with what the search needs to know of them."""

    def __init__(self, coarse_CD: Tensor) -> None:
        self.coarse_CD = coarse_CD

    @cached_property
    def partition(self) -> Partition:
        """Give the super-cells."""
        return divide_cells(self.coarse_CD)

    @cached_property
    def width(self) -> int:
        """Give the number of super-cells that are enough for 99 of 100 rows."""
        return measure_width(self.coarse_CD, self.partition)

    def suits(self, other: Tensor) -> bool:
        """Tell whether a tensor lies on the same device and has the same kind of numbers."""
        return (self.coarse_CD.device, self.coarse_CD.dtype) == (other.device, other.dtype)

    @torch.no_grad()
    def find(self, z_ND: Tensor, search: CellSearch = AUTOMATIC) -> tuple[Tensor, Tensor]:
        """Give each rotated row its cell and the squared distance to the centroid.

        Shapes: z_ND (N, D) -> (N,) int64, (N,).
        """
        width = self.pick_width(search)
        if width is None:
            labels_1N, distances_1N = find_nearest(z_ND[None], self.coarse_CD[None])
            return labels_1N[0], distances_1N[0]
        return search_partition(z_ND, self.partition, width)

    @torch.no_grad()
    def pick_width(self, search: CellSearch = AUTOMATIC) -> int | None:
        """Give the number of super-cells to look into for a row; None: all cells are looked at."""
        two_level = len(self.coarse_CD) > MANY if search.two_level is None else search.two_level
        if not two_level:
            return None
        width = search.width or self.width
        if search.two_level is None and self._costs_more(width):
            return None
        return width

    def _costs_more(self, width: int) -> bool:
        cells = len(self.coarse_CD)
        return width * (_VISIT + cells // len(self.partition.members)) > cells / 2


_held: tuple[weakref.ref[Codebook], Cells] | None = None


def hold_cells(codebook: Codebook, like: Tensor) -> Cells:
    """Give the cells of a codebook where, and with the numbers, a tensor has; those asked for last are kept."""
    global _held
    holder, cells = _held or (None, None)
    if cells and holder and holder() is codebook and cells.suits(like):
        return cells
    with torch.inference_mode(False):  # what is kept may later meet gradients
        cells = Cells(torch.tensor(codebook.coarse, dtype=like.dtype, device=like.device))
    _held = weakref.ref(codebook), cells
    return cells


def measure_cells(z_ND: Tensor, codebook: Codebook, search: CellSearch = AUTOMATIC) -> Stats | Touched:
    """Assign rotated rows to cells and sum up what an update needs.

    Of up to `MANY` cells all statistics are given, C (D + 1) numbers; of more, those of the cells that rows fell into,
    which are never more than there are rows: at most N (D + 2) numbers of 8 bytes leave a worker with N rows.

    Shapes: z_ND (N, D).
    """
    labels_N, distances_N = hold_cells(codebook, z_ND).find(z_ND, search)
    if codebook.cells > MANY:
        return sum_touched(z_ND, labels_N, distances_N, codebook.cells)
    return sum_by_label(z_ND[None], labels_N[None], distances_N[None], codebook.cells)


def divide_cells(coarse_CD: Tensor) -> Partition:
    """Gather cells in super-cells.

    Shapes: coarse_CD (C, D).
    """
    supers_SD = _find_supers(coarse_CD)
    owners_C = find_nearest(coarse_CD[None], supers_SD[None])[0][0]
    order_C = owners_C.argsort(stable=True)
    sizes_S = torch.bincount(owners_C, minlength=len(supers_SD))
    offsets_CD = (coarse_CD - supers_SD[owners_C])[order_C]
    sizes = sizes_S[sizes_S > 0].tolist()
    norms = offsets_CD.square().sum(1).split(sizes)
    return Partition(supers_SD[sizes_S > 0], order_C.split(sizes), offsets_CD.split(sizes), norms)


def measure_width(coarse_CD: Tensor, partition: Partition) -> int:
    """Give the number of super-cells after which 99 of 100 centroids have met the nearest other one.

    Rows lie nearer to their centroid than centroids to each other, so that for rows it is rather more.
    """
    tried_T = _space_out(len(coarse_CD), _TRIED, coarse_CD)
    owners_C = torch.empty(len(coarse_CD), dtype=torch.int64, device=coarse_CD.device)
    for owner, cells in enumerate(partition.members):
        owners_C[cells] = owner
    reach_TS = torch.cdist(coarse_CD[tried_T], partition.supers_SD)
    owned_T1 = owners_C[_find_others(coarse_CD, tried_T)][:, None]
    ranks_T = (reach_TS <= reach_TS.gather(1, owned_T1)).sum(1)
    # A margin, since few are tried; and the less cells overlap, the dearer is a miss.
    return max(_LEAST_WIDTH, round(_MARGIN * int(ranks_T.sort().values[int(_COVERED * (len(ranks_T) - 1))])))


def search_partition(z_ND: Tensor, partition: Partition, width: int) -> tuple[Tensor, Tensor]:
    """Give each row the nearest of the cells in its `width` nearest super-cells; ties go to the lowest index.

    What is held at a time does not grow with the number of rows.

    Shapes: z_ND (N, D) -> labels (N,) int64, squared distances (N,).
    """
    width = min(width, len(partition.members))
    rows = max(1, _CHUNK_BYTES // (len(partition.members) + 32 * width))
    parts = [_search_chunk(part, partition, width) for part in z_ND.split(rows)]
    labels, distances = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(distances).clamp_min_(0)


def _find_supers(coarse_CD: Tensor) -> Tensor:
    """Cluster some of the centroids, evenly spaced, beginning with evenly spaced ones."""
    supers = min(len(coarse_CD), round(_SUPERS_PER_ROOT * len(coarse_CD) ** 0.5))
    some_CD = coarse_CD[_space_out(len(coarse_CD), _CELLS_PER_SUPER * supers, coarse_CD)]
    supers_SD = some_CD[_space_out(len(some_CD), supers, coarse_CD)]
    for _ in range(_SUPER_ITERATIONS):
        stats = measure_stats(some_CD[None], supers_SD[None])
        supers_SD = torch.tensor(update_centroids(supers_SD.cpu().numpy()[None], stats)[0]).to(coarse_CD)
    return supers_SD


def _space_out(total: int, count: int, like: Tensor) -> Tensor:
    return torch.linspace(0, total - 1, min(total, count), dtype=torch.float64, device=like.device).long()


def _find_others(coarse_CD: Tensor, tried_T: Tensor) -> Tensor:
    """Give the centroid nearest to each tried one, itself apart."""
    norms_C = coarse_CD.square().sum(1)
    found = []
    for some in tried_T.split(max(1, _CHUNK_FLOATS // len(coarse_CD))):
        scores = torch.addmm(norms_C, coarse_CD[some], coarse_CD.T, alpha=-2)
        scores.scatter_(1, some[:, None], torch.inf)
        found.append(pick_least(scores)[1])
    return torch.cat(found)


def _search_chunk(z_ND: Tensor, partition: Partition, width: int) -> tuple[Tensor, Tensor]:
    supers_P, rows_P = _pick_supers(z_ND, partition.supers_SD, width).nonzero().unbind(1)
    counts = torch.bincount(supers_P, minlength=len(partition.members)).tolist()
    found = [(rows_P[:0], z_ND[:0, 0])]
    for owner, rows in enumerate(rows_P.split(counts)):
        for some in rows.split(max(1, _CHUNK_FLOATS // len(partition.members[owner]))) if len(rows) else ():
            found.append(_look_into(z_ND[some], partition, owner))
    labels_P, distances_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    distances_N = torch.full_like(z_ND[:, 0], torch.inf).scatter_reduce_(0, rows_P, distances_P, "amin")
    best_P = distances_P == distances_N[rows_P]
    labels_N = torch.full((len(z_ND),), 1 << 62, device=z_ND.device)
    return labels_N.scatter_reduce_(0, rows_P[best_P], labels_P[best_P], "amin"), distances_N


def _pick_supers(z_ND: Tensor, supers_SD: Tensor, width: int) -> Tensor:
    """Mark the nearest super-cells of each row; of some at the same distance, all.

    Shapes: (N, D), (S, D) -> (S, N) bool.
    """
    norms_S, picked = supers_SD.square().sum(1), []
    for part in z_ND.split(max(1, _CHUNK_FLOATS // len(supers_SD))):
        reach_nS = torch.addmm(norms_S, part, supers_SD.T, alpha=-2)
        if reach_nS.is_cpu:
            limit_n = torch.from_numpy(np.partition(reach_nS.numpy(), width - 1, axis=1)[:, width - 1])
        else:
            limit_n = reach_nS.kthvalue(width, dim=1).values
        picked.append((reach_nS <= limit_n[:, None]).T)
    return torch.cat(picked, dim=1)


def _look_into(z_nD: Tensor, partition: Partition, owner: int) -> tuple[Tensor, Tensor]:
    # |x - c|^2 = |x'|^2 + (|c'|^2 - 2 x'.c') with both from the centre of the super-cell, where numbers are small.
    own_nD = z_nD - partition.supers_SD[owner]
    scores = torch.addmm(partition.norms[owner], own_nD, partition.offsets[owner].T, alpha=-2)
    nearest_n, places_n = pick_least(scores)
    return partition.members[owner][places_n], nearest_n + own_nD.square().sum(1)
