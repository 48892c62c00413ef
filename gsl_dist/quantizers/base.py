"""What every quantizer offers, so that one coordinator can train any of them over any number of workers.

Training runs through named phases (coarse cells before the codewords of what they leave over). In each, workers call
`assign` on their rows, the sum of the statistics goes to `update`, and the new codebook goes back to the workers.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray
from gsl_dist.quantizers.kmeans import Stats

# Shapes: N vectors, D dims, M sub-vectors, Q queries


class Quantizer(Protocol):
    """A family of codebooks and how one is trained and used."""

    dim: int

    @property
    def phases(self) -> tuple[str, ...]:
        """Name the parts of a codebook in the order they are trained."""

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero."""

    def seed(self, codebook: Codebook, phase: str, sample_ND: FloatArray, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase, chosen from a sample."""

    def assign(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Stats:
        """Measure what `update` needs of these rows."""

    def update(self, codebook: Codebook, phase: str, stats: Stats) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and its code, (N,) int64 and (N, M) uint8."""

    def decode(self, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the vectors that codes stand for, (N, D) float32."""

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each decoded item by look-up tables, (Q, N) float32."""
