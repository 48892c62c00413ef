"""Product quantization with coarse cells: the quantizer of IVF-PQ, trained by statistics that add.

A vector goes to its nearest cell; the code describes the vector, or with `residual` what the cell's centroid leaves
over, by one of K codewords in each of M sub-vectors. The optimized one (`opq`) turns vectors first, so that the
sub-vectors carry alike much and depend little on one another.

Source: Jegou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, TPAMI 2011; Ge, He, Ke, Sun, Optimized
Product Quantization, TPAMI 2014 (its non-parametric solution, begun from the parametric one).
"""

# Shapes: N vectors, D dims, C cells, M sub-vectors, K codewords, d = D // M, Q queries, k neighbours

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray
from gsl_dist.config import Strict
from gsl_dist.errors import ConfigError
from gsl_dist.quantizers.base import LloydConfig, Plan, as_tensor, leave_over, rotate
from gsl_dist.quantizers.cells import AUTOMATIC, CellSearch, measure_cells
from gsl_dist.quantizers.kmeans import (
    Stats,
    Touched,
    find_nearest,
    measure_stats,
    seed_centroids,
    sum_by_label,
    update_centroids,
)

_STRIDE = 1.8
_TRIAL_ITERATIONS = 4


class ProductConfig(Strict):
    """A product quantizer: `sub_vectors` x `bits` bits an item, and the cell."""

    kind: Literal["pq"] = "pq"
    sub_vectors: int = Field(default=8, ge=1, description="M, parts that a vector is cut into")
    bits: int = Field(default=8, ge=1, le=8, description="log2 K, bits for each part")
    cells: int = Field(default=1, ge=1, description="C, lists of the coarse partition")
    residual: bool = Field(default=True, description="code what the cell's centroid leaves over")


class OptimizedConfig(ProductConfig):
    """A product quantizer behind a learned rotation."""

    kind: Literal["opq"] = "opq"  # type: ignore[assignment]
    start: Literal["auto", "axes", "identity"] = Field(
        default="auto",
        description="share out principal axes, keep dimensions as they are, or whichever is nearer on a sample",
    )
    rotation_iterations: int = Field(
        default=40, ge=1, description="turns of rotation and codewords, for a new codebook"
    )


class ProductQuantizer:
    """Trains and applies product codebooks of one shape.

    Args:
        config: the numbers of cells, sub-vectors and bits.
        dim: D, the length of the vectors.

    Raises:
        ConfigError: D does not divide into the sub-vectors.
    """

    def __init__(self, config: ProductConfig, dim: int) -> None:
        if dim % config.sub_vectors:
            fits = [m for m in range(1, dim + 1) if dim % m == 0]
            raise ConfigError(
                "quantizer.sub_vectors", config.sub_vectors, f"it must divide the dimension {dim}: {fits}"
            )
        self.config, self.dim = config, dim

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training: the cells if there are several, then the codewords."""
        iterations = lloyd.refresh_iterations if refine else lloyd.iterations
        return (*self._plan_cells(iterations), ("books", iterations))

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""
        return max(1 << self.config.bits, self.config.cells)

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero."""
        config = self.config
        return Codebook(
            coarse=np.zeros((config.cells, self.dim), np.float32),
            books=np.zeros((config.sub_vectors, 1 << config.bits, self.dim // config.sub_vectors), np.float32),
            residual=config.residual and config.cells > 1,
        )

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Tensor:
        """Give rotated rows (1, N, D) to train cells on, or sub-vectors (M, N, d) of what the cells leave over."""
        if phase == "cells":
            return rotate(x_ND, codebook)[None]
        return self._cut(leave_over(x_ND, codebook)[1])

    def seed(self, codebook: Codebook, phase: str, sample: Tensor, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase, chosen from a prepared sample."""
        if phase == "cells":
            return replace(codebook, coarse=seed_centroids(sample.numpy(), codebook.cells, rng)[0])
        return replace(codebook, books=seed_centroids(sample.numpy(), codebook.codewords, rng))

    def assign(
        self, prepared: Tensor, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC
    ) -> Stats | Touched:
        """Measure what `update` needs of these rows."""
        if phase == "cells":
            return measure_cells(prepared[0], codebook, search)
        return measure_stats(prepared, as_tensor(codebook.books, prepared))

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""
        if phase == "cells":
            return replace(codebook, coarse=update_centroids(codebook.coarse[None], stats, stride)[0])
        return replace(codebook, books=update_centroids(codebook.books, stats, stride))

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and the index of its nearest codeword in every sub-vector.

        Distances are squared L2; ties go to the lowest index.

        Shapes: x_ND (N, D) float32 -> cells (N,) int64, codes (N, M) uint8.
        """
        cells_N, rest_ND = leave_over(x_ND, codebook)
        codes_MN, _ = find_nearest(self._cut(rest_ND), as_tensor(codebook.landed.books, x_ND))
        return cells_N, codes_MN.T.to(torch.uint8)

    def neighbours(self, rest_ND: Tensor, codebook: Codebook, k: int) -> Tensor:
        """Give the k codewords nearest to every sub-vector, nearest first.

        Shapes: rest_ND (N, D) -> (N, M, k, d).
        """
        return find_codewords(self._cut(rest_ND).transpose(0, 1), as_tensor(codebook.books, rest_ND), k)

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each decoded item, a look-up for every sub-vector.

        With an anchor a (the cell's centroid, or zero) and codewords r_m:
        |q - a - r|^2 = |q - a|^2 + sum_m (|r_m|^2 + 2 a_m.r_m) - 2 sum_m q_m.r_m; only the last sum mixes the query
        with the code, and it is read from a table.

        Shapes: queries_QD (Q, D), cells_N (N,), codes_NM (N, M) -> (Q, N) float32.
        """
        queries_QD = rotate(queries_QD, codebook)
        books_MKd = as_tensor(codebook.books, queries_QD)
        anchors_CD = as_tensor(codebook.coarse, queries_QD) * float(codebook.residual)
        split_QMd = queries_QD.unflatten(1, books_MKd.shape[::2])
        dots_QMK = torch.einsum("qmd,mkd->qmk", split_QMd, books_MKd)
        cross_CMK = torch.einsum("cmd,mkd->cmk", anchors_CD.unflatten(1, books_MKd.shape[::2]), books_MKd)
        constant_CMK = books_MKd.square().sum(-1) + 2 * cross_CMK
        distances_QN = torch.cdist(queries_QD, anchors_CD).square()[:, cells_N]
        for part, code_N in enumerate(codes_NM.T.long()):
            distances_QN += constant_CMK[cells_N, part, code_N] - 2 * dots_QMK[:, part, code_N]
        return distances_QN

    def _plan_cells(self, iterations: int) -> Plan:
        return (("cells", iterations),) if self.config.cells > 1 else ()

    def _cut(self, rest_ND: Tensor) -> Tensor:
        return rest_ND.unflatten(1, (self.config.sub_vectors, -1)).transpose(0, 1)


class OptimizedProductQuantizer(ProductQuantizer):
    """Learns a rotation with the codewords.

    Cells come first, on vectors as they are. Then the rotation of what they leave over is begun by sharing out the
    principal axes (`balance`), unless a sample says that dimensions as they are lie nearer to codewords: those of raw
    descriptors come in groups that belong together. Rotation and codewords take turns (`rotation`); the cells turn
    with it. The books then get their Lloyd's iterations in the final rotation.
    """

    config: OptimizedConfig

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training; a refined codebook keeps its rotation as the start."""
        iterations = lloyd.refresh_iterations if refine else lloyd.iterations
        turns: Plan = (("rotation", iterations if refine else self.config.rotation_iterations),)
        if not refine and self.config.start != "identity":
            turns = (("balance", 1), *turns)
        return (*self._plan_cells(iterations), *turns, ("books", iterations))

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero, that turns nothing."""
        return replace(super().blank(), rotation=np.eye(self.dim, dtype=np.float32))

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Tensor:
        """Give what the cells leave over, turned back (N, D), to learn the rotation on; else as product codes do."""
        if phase not in ("balance", "rotation"):
            return super().prepare(x_ND, codebook, phase)
        return leave_over(x_ND, codebook)[1] @ as_tensor(_rotation(codebook), x_ND)

    def seed(self, codebook: Codebook, phase: str, sample: Tensor, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values; `books` goes on with the codewords of the `rotation` phase."""
        if phase == "cells":
            return super().seed(codebook, phase, sample, rng)
        if phase != "rotation":
            return codebook
        starts = [codebook]
        if self.config.start == "auto":
            starts.append(_turn(codebook, np.eye(self.dim, dtype=np.float32)))
        tried = [self._try(start, sample, rng) for start in starts]
        return min(tried, key=lambda trial: trial[1])[0]

    def assign(
        self, prepared: Tensor, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC
    ) -> Stats | Touched:
        """Measure what `update` needs of these rows.

        To turn vectors that is their second moments, or the sum over their whole length for every codeword.
        """
        if phase == "balance":
            moments_DD = (prepared.T.double() @ prepared.double())[None]
            return Stats(np.ones((1, 1)), moments_DD.cpu().numpy(), 0.0, len(prepared))
        if phase != "rotation":
            return super().assign(prepared, codebook, phase, search)
        cut_MNd, books_MKd = self._cut(rotate(prepared, codebook)), as_tensor(codebook.books, prepared)
        labels_MN, distances_MN = find_nearest(cut_MNd, books_MKd)
        return sum_by_label(prepared.expand(len(labels_MN), -1, -1), labels_MN, distances_MN, codebook.codewords)

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""
        if phase == "balance":
            return _turn(codebook, _share_axes(stats.sums_GKd[0] / stats.rows, codebook.sub_vectors))
        if phase != "rotation":
            return super().update(codebook, phase, stats, stride)
        turned_MKD = stats.sums_GKd @ _rotation(codebook).T.astype(np.float64)
        width = self.dim // codebook.sub_vectors
        own = np.stack([turned_KD[:, m * width : (m + 1) * width] for m, turned_KD in enumerate(turned_MKD)])
        books = update_centroids(codebook.books, replace(stats, sums_GKd=own))
        # Orthogonal Procrustes: the rotation that brings the rows nearest to their new codewords.
        nearest_DD = _make_orthogonal(np.concatenate(np.einsum("mke,mkd->mde", stats.sums_GKd, books)))
        # The codewords hold the rotation back, and it creeps: it goes further the same way, by less than twice.
        ahead_DD = _STRIDE * nearest_DD + (1 - _STRIDE) * _rotation(codebook)
        return _turn(replace(codebook, books=books), _make_orthogonal(ahead_DD))

    def _try(self, start: Codebook, sample: Tensor, rng: np.random.Generator) -> tuple[Codebook, float]:
        """Train codewords on the sample for a moment, without turning; give them and the squared error before the last.

        Shapes: sample (N, D).
        """
        cut_MNd = self._cut(rotate(sample, start))
        codebook = super().seed(start, "books", cut_MNd, rng)
        for _ in range(_TRIAL_ITERATIONS):
            stats = measure_stats(cut_MNd, as_tensor(codebook.books, cut_MNd))
            codebook = replace(codebook, books=update_centroids(codebook.books, stats))
        return codebook, stats.error


def find_codewords(y_NMd: Tensor, books_MKd: Tensor, k: int) -> Tensor:
    """Give the k nearest codewords of every sub-vector, nearest first; all of them where there are fewer.

    Shapes: y_NMd (N, M, d), books_MKd (M, K, d) -> (N, M, k, d).
    """
    norms_MK = books_MKd.square().sum(-1)
    distances_MNK = torch.baddbmm(norms_MK[:, None], y_NMd.transpose(0, 1), books_MKd.transpose(1, 2), alpha=-2)
    near_MNk = distances_MNK.topk(min(k, books_MKd.shape[1]), dim=-1, largest=False).indices
    parts = torch.arange(len(books_MKd), device=near_MNk.device)[:, None, None]
    return books_MKd[parts, near_MNk].transpose(0, 1)


def _rotation(codebook: Codebook) -> FloatArray:
    assert codebook.rotation is not None
    return codebook.rotation


def _make_orthogonal(matrix_DD: np.ndarray) -> np.ndarray:
    """Give the orthogonal matrix that is nearest."""
    left, _, right = np.linalg.svd(matrix_DD)
    return left @ right


def _turn(codebook: Codebook, rotation_DD: np.ndarray) -> Codebook:
    """Give the codebook with another rotation; the cells stay where they were among the vectors."""
    coarse = codebook.coarse @ _rotation(codebook) @ rotation_DD.T
    return replace(codebook, coarse=coarse, rotation=rotation_DD)


def _share_axes(moments_DD: np.ndarray, parts: int) -> np.ndarray:
    """Deal the principal axes to the sub-vectors, largest first, each to the one whose variances multiply to least."""
    values, axes = np.linalg.eigh(moments_DD)
    # In units of the smallest, so that no factor is below 1: one that is would draw the next axes to the same part.
    values = np.maximum(values, max(1e-12 * values[-1], 1e-300))
    factors = np.log(values / values.min())
    dealt: list[list[int]] = [[] for _ in range(parts)]
    weight, width = np.zeros(parts), len(values) // parts
    for axis in np.argsort(-values):
        open_parts = [part for part in range(parts) if len(dealt[part]) < width]
        part = min(open_parts, key=lambda part: (weight[part], part))
        dealt[part].append(int(axis))
        weight[part] += factors[axis]
    return axes.T[np.concatenate(dealt)]
