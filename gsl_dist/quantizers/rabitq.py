"""RaBitQ: a bit a dimension behind a random rotation, and factors that make the estimated distance right on average.

With c the centroid of a row's cell and r what it leaves over, rotated, a choice for every dimension gives u: its sign,
or with several bits one of 2^bits evenly spaced numbers, at the scale where u points most nearly as r does. Errors of
coordinates even out over a random rotation, so that nothing is trained but the cells, and what is estimated is right on
average whatever the rows are:

    r^ = u |r|^2 / <u, r>        |q - c - r|^2  ~  |q - c|^2 + |r|^2 - 2 <q - c, r^>

A code ends in the factors that faiss keeps of each row, as float32: |r|^2 and sqrt(D) |r|^2 / |r|_1, and with several
bits the error that is allowed for the estimate by signs alone, before the other bits are looked at, |r|^2 again and
-2 |r|^2 / <u, r>. What a code stands for is c + r^: right on average in every direction, and so longer than the nearest
multiple of u. There are no codewords that a network could land on.

Source: Gao, Long, RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for Approximate Nearest
Neighbor Search, SIGMOD 2024; for several bits Gao et al., Practical and Asymptotically Optimal Quantization of
High-Dimensional Vectors in Euclidean Space for Approximate Nearest Neighbor Search, SIGMOD 2025.
"""

# Shapes: N vectors, D dims, C cells, L magnitudes that a number may have, F factors, Q queries

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook, read_scales, space_evenly
from gsl_dist.config import Strict
from gsl_dist.quantizers.base import LloydConfig, Plan, as_tensor, leave_over, read_factors, rotate
from gsl_dist.quantizers.cells import AUTOMATIC, CellSearch, measure_cells
from gsl_dist.quantizers.kmeans import Stats, Touched, seed_centroids, update_centroids

# How many standard deviations of the estimate by signs are allowed for: as in the paper.
_CONFIDENCE = 1.9
_CHUNK_FLOATS = 1 << 20


class RabitConfig(Strict):
    """RaBitQ: `bits` for every dimension, 8 bytes of factors, 20 where there are several bits, and the cell."""

    kind: Literal["rabitq"]
    bits: int = Field(default=1, ge=1, le=4, description="bits for each dimension")
    cells: int = Field(default=1, ge=1, description="C, lists of the coarse partition")
    residual: Literal[True] = Field(default=True, description="codes always stand for what is left over")


class RabitQuantizer:
    """Trains the cells of RaBitQ codebooks, draws their rotation and applies them.

    Args:
        config: the numbers of cells and bits.
        dim: D, the length of the vectors.
    """

    def __init__(self, config: RabitConfig, dim: int) -> None:
        self.config, self.dim = config, dim

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""
        return self.config.cells

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training: the cells, or the mean where there is one, and the rotation."""
        iterations = lloyd.refresh_iterations if refine else lloyd.iterations
        return (("cells", iterations if self.config.cells > 1 else 1), ("rotation", 1))

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, its centroids zero, that turns nothing."""
        return Codebook(
            coarse=np.zeros((self.config.cells, self.dim), np.float32),
            books=space_evenly(self.dim, self.config.bits),
            residual=True,
            kind="rabitq",
            rotation=np.eye(self.dim, dtype=np.float32),
        )

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Tensor:
        """Give rotated rows (1, N, D) to train cells on, or what the cells leave over (N, D)."""
        return rotate(x_ND, codebook)[None] if phase == "cells" else leave_over(x_ND, codebook)[1]

    def seed(self, codebook: Codebook, phase: str, sample: Tensor, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for the cells, or with its rotation, drawn at random."""
        if phase == "cells":
            return replace(codebook, coarse=seed_centroids(sample.numpy(), codebook.cells, rng)[0])
        turn_DD = draw_rotation(self.dim, rng)
        return replace(codebook, coarse=codebook.coarse @ turn_DD.T, rotation=turn_DD)

    def assign(
        self, prepared: Tensor, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC
    ) -> Stats | Touched:
        """Measure what `update` needs of these rows; of the rotation no more than how far off codes are."""
        if phase == "cells":
            return measure_cells(prepared[0], codebook, search)
        codes_NM = code_rests(prepared, self.config.bits)
        error = (prepared - _decode_rests(codes_NM, codebook, prepared)).double().square().sum()
        return Stats(np.zeros((1, 1)), np.zeros((1, 1, 1)), float(error), len(prepared))

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for; the rotation stays as it was drawn."""
        if phase == "cells":
            return replace(codebook, coarse=update_centroids(codebook.coarse[None], stats, stride)[0])
        return codebook

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and its code: a number for each dimension, and the factors.

        Shapes: x_ND (N, D) float32 -> cells (N,) int64, codes (N, D + 4 F) uint8.
        """
        cells_N, rest_ND = leave_over(x_ND, codebook)
        return cells_N, code_rests(rest_ND, codebook.bits)

    def neighbours(self, rest_ND: Tensor, codebook: Codebook, k: int) -> Tensor:
        """Give what the code of each row stands for: a row has one, and none that is next to it.

        Shapes: rest_ND (N, D) -> (N, 1, 1, D).
        """
        return _decode_rests(code_rests(rest_ND, codebook.bits), codebook, rest_ND)[:, None, None]

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the estimate of the squared distance of each query to each item, by the formula above.

        Shapes: queries_QD (Q, D), cells_N (N,), codes_NM (N, D + 4 F) -> (Q, N) float32.
        """
        turned_QD = rotate(queries_QD, codebook)
        coarse_CD = as_tensor(codebook.coarse, turned_QD)
        rests_ND = _decode_rests(codes_NM, codebook, turned_QD)
        along_N = (coarse_CD[cells_N] * rests_ND).sum(1)
        lengths_N = read_factors(codes_NM, codebook)[:, 0].to(turned_QD)
        reach_QN = torch.cdist(turned_QD, coarse_CD).square()[:, cells_N]
        return reach_QN + lengths_N - 2 * (turned_QD @ rests_ND.T - along_N)


def draw_rotation(dim: int, rng: np.random.Generator) -> np.ndarray:
    """Give a random rotation or reflection, all alike likely.

    Shapes: -> (D, D) float64.
    """
    turn_DD, upper_DD = np.linalg.qr(rng.standard_normal((dim, dim)))
    # QR has a say in the signs; without it they are those of the normal numbers.
    return turn_DD * np.sign(np.diag(upper_DD))


def code_rests(rest_ND: Tensor, bits: int) -> Tensor:
    """Give the codes of what cells left over: the numbers, and the factors.

    Shapes: rest_ND (N, D) -> (N, D + 4 F) uint8.
    """
    half = 1 << (bits - 1)
    sizes_ND = _pick_sizes(rest_ND.abs(), half)
    words_ND = torch.where(rest_ND > 0, half + sizes_ND, half - 1 - sizes_ND).to(torch.uint8)
    squares_N, sums_N = rest_ND.square().sum(1), rest_ND.abs().sum(1)
    plain_N = _divide(squares_N * rest_ND.shape[1] ** 0.5, sums_N)
    factors = [squares_N, plain_N]
    if bits > 1:
        # 1 / cos^2 of the angle between r and its signs, less one.
        slant_N = (_divide(squares_N * rest_ND.shape[1], sums_N.square()) - 1).clamp_min(0)
        allowed_N = 2 * _CONFIDENCE * (squares_N * slant_N / max(1, rest_ND.shape[1] - 1)).sqrt()
        along_N = ((sizes_ND + 0.5) * rest_ND.abs()).sum(1)
        factors += [allowed_N, squares_N, -2 * _divide(squares_N, along_N)]
    return torch.cat([words_ND, torch.stack(factors, 1).float().contiguous().view(torch.uint8)], 1)


def _pick_sizes(size_ND: Tensor, half: int) -> Tensor:
    """Give the whole numbers l, less than `half`, for which l + 1/2 points as nearly as can be where the sizes do.

    As a scale grows from 0, one l after another steps up, and after each step the angle is known from sums.

    Shapes: (N, D) -> (N, D) int64.
    """
    if half == 1:
        return torch.zeros_like(size_ND, dtype=torch.int64)
    rows = max(1, _CHUNK_FLOATS // (size_ND.shape[1] * half))
    return torch.cat([_step_up(part, half) for part in size_ND.split(rows)])


def _step_up(size_ND: Tensor, half: int) -> Tensor:
    steps_L = torch.arange(1, half, device=size_ND.device)
    scales_NDL = steps_L / size_ND[:, :, None]
    scales_NS, order_NS = scales_NDL.flatten(1).sort(dim=1)
    along_NS = size_ND.double().gather(1, order_NS // len(steps_L)).cumsum(1) + size_ND.double().sum(1, True) / 2
    squares_NS = size_ND.shape[1] / 4 + (2 * steps_L[order_NS % len(steps_L)]).cumsum(1)
    best_N1 = (along_NS / squares_NS.sqrt()).argmax(1, keepdim=True)
    return (scales_NDL <= scales_NS.gather(1, best_N1)[:, :, None]).sum(2)


def _decode_rests(codes_NM: Tensor, codebook: Codebook, like: Tensor) -> Tensor:
    """Give r^ of each code: (N, choices) -> (N, D)."""
    words_ND = codes_NM[:, : codebook.dim].to(like) + (0.5 - codebook.codewords / 2)
    return words_ND * read_scales(read_factors(codes_NM, codebook), codebook.dim)[:, None].to(like)


def _divide(above_N: Tensor, below_N: Tensor) -> Tensor:
    """Divide, and give 0 where a row lies on its centroid."""
    return torch.where(below_N > 0, above_N / below_N.clamp_min(1e-38), 0)
