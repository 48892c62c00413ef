"""Product quantization with coarse cells: the quantizer of IVF-PQ, trained by statistics that add.

A vector goes to its nearest cell; the code describes the vector, or with `residual` what the cell's centroid leaves
over, by one of K codewords in each of M sub-vectors.

Source: Jegou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, TPAMI 2011.
"""

# Shapes: N vectors, D dims, C cells, M sub-vectors, K codewords, d = D // M, Q queries

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
from gsl_dist.quantizers.kmeans import Stats, find_nearest, measure_stats, seed_centroids, update_centroids


class ProductConfig(Strict):
    """A product quantizer: `sub_vectors` x `bits` bits an item, and the cell."""

    kind: Literal["pq"] = "pq"
    sub_vectors: int = Field(default=8, ge=1, description="M, parts that a vector is cut into")
    bits: int = Field(default=8, ge=1, le=8, description="log2 K, bits for each part")
    cells: int = Field(default=1, ge=1, description="C, lists of the coarse partition")
    residual: bool = Field(default=True, description="code what the cell's centroid leaves over")


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

    @property
    def phases(self) -> tuple[str, ...]:
        """Name the parts of a codebook in the order they are trained."""
        return ("cells", "books") if self.config.cells > 1 else ("books",)

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

    def seed(self, codebook: Codebook, phase: str, sample_ND: FloatArray, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase, chosen from a sample.

        Raises:
            DataError: the sample has fewer rows than the codebook has centroids.
        """
        if phase == "cells":
            return replace(codebook, coarse=seed_centroids(sample_ND[None], codebook.cells, rng)[0])
        rests = self._view(torch.tensor(sample_ND), codebook).numpy()
        return replace(codebook, books=seed_centroids(rests, codebook.codewords, rng))

    def assign(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Stats:
        """Measure what `update` needs of these rows."""
        if phase == "cells":
            return measure_stats(x_ND[None], _tensor(codebook.coarse, x_ND)[None])
        return measure_stats(self._view(x_ND, codebook), _tensor(codebook.books, x_ND))

    def update(self, codebook: Codebook, phase: str, stats: Stats) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""
        if phase == "cells":
            return replace(codebook, coarse=update_centroids(codebook.coarse[None], stats)[0])
        return replace(codebook, books=update_centroids(codebook.books, stats))

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and the index of its nearest codeword in every sub-vector.

        Distances are squared L2; ties go to the lowest index.

        Shapes: x_ND (N, D) float32 -> cells (N,) int64, codes (N, M) uint8.
        """
        cells_N = find_cells(x_ND, codebook)
        codes_MN, _ = find_nearest(self._view(x_ND, codebook, cells_N), _tensor(codebook.books, x_ND))
        return cells_N, codes_MN.T.to(torch.uint8)

    def decode(self, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the vectors that codes stand for.

        Shapes: cells_N (N,), codes_NM (N, M) -> (N, D) float32.
        """
        books_MKd = torch.tensor(codebook.books, device=codes_NM.device)
        parts = torch.arange(codebook.sub_vectors, device=codes_NM.device)
        decoded_ND = books_MKd[parts, codes_NM.long()].flatten(1)
        return decoded_ND + _tensor(codebook.coarse, decoded_ND)[cells_N] if codebook.residual else decoded_ND

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each decoded item, a look-up for every sub-vector.

        With an anchor a (the cell's centroid, or zero) and codewords r_m:
        |q - a - r|^2 = |q - a|^2 + sum_m (|r_m|^2 + 2 a_m.r_m) - 2 sum_m q_m.r_m; only the last sum mixes the query
        with the code, and it is read from a table.

        Shapes: queries_QD (Q, D), cells_N (N,), codes_NM (N, M) -> (Q, N) float32.
        """
        books_MKd = _tensor(codebook.books, queries_QD)
        anchors_CD = _tensor(codebook.coarse, queries_QD) * float(codebook.residual)
        split_QMd = queries_QD.unflatten(1, books_MKd.shape[::2])
        dots_QMK = torch.einsum("qmd,mkd->qmk", split_QMd, books_MKd)
        cross_CMK = torch.einsum("cmd,mkd->cmk", anchors_CD.unflatten(1, books_MKd.shape[::2]), books_MKd)
        constant_CMK = books_MKd.square().sum(-1) + 2 * cross_CMK
        distances_QN = torch.cdist(queries_QD, anchors_CD).square()[:, cells_N]
        for part, code_N in enumerate(codes_NM.T.long()):
            distances_QN += constant_CMK[cells_N, part, code_N] - 2 * dots_QMK[:, part, code_N]
        return distances_QN

    def _view(self, x_ND: Tensor, codebook: Codebook, cells_N: Tensor | None = None) -> Tensor:
        """Cut rows, or what the cells leave over of them, into sub-vectors: (N, D) -> (M, N, d)."""
        if codebook.residual:
            cells_N = find_cells(x_ND, codebook) if cells_N is None else cells_N
            x_ND = x_ND - _tensor(codebook.coarse, x_ND)[cells_N]
        return x_ND.unflatten(1, (self.config.sub_vectors, -1)).transpose(0, 1)


def find_cells(x_ND: Tensor, codebook: Codebook) -> Tensor:
    """Give each vector its nearest cell.

    Shapes: x_ND (N, D) -> (N,) int64.
    """
    if codebook.cells == 1:
        return torch.zeros(len(x_ND), dtype=torch.int64, device=x_ND.device)
    return find_nearest(x_ND[None], _tensor(codebook.coarse, x_ND)[None])[0][0]


def _tensor(array: FloatArray, like: Tensor) -> Tensor:
    # A codebook's arrays are read-only, which torch cannot share; they are small, so they are copied.
    return torch.tensor(array, dtype=like.dtype, device=like.device)
