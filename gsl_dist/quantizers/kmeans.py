"""Lloyd's iterations cut where a cluster needs them cut: statistics that add, and an update that sees only their sum.

`assign` looks at rows and centroids and gives `Stats`: how many rows each centroid won, their sum, and the squared
error. Statistics of disjoint rows add up to those of the whole, so any number of workers gives the same update. The
coordinator adds and updates; it never sees a row. G independent groups of centroids are handled side by side: one
group for coarse cells, one a sub-vector for product codes.

Up to `MANY` centroids are handled the plain way. Of more, only those travel that won rows (`Touched`), and they begin
as rows drawn at random: k-means++ compares the whole sample with every centroid.
"""

# Shapes: N rows, G groups, K centroids in each, d dims in each, T centroids that won rows, F full and R dead ones

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import DataError

MANY = 4096
"""Centroids of one group that are still seeded, searched and sent the plain way."""

_SPLIT = 1 / 1024
# As many distances as fit the cache, and of a block of centroids, so that they are of many rows: twice as fast or more.
_CHUNK_FLOATS, _CHUNK_WORDS = 1 << 20, 1 << 12
_SUM_ROWS = 1 << 12
_SEED_ROWS, _ROUNDING = 64, 4e-6


@dataclass(frozen=True)
class Stats:
    """What an update needs to know of any number of rows; `a + b` stands for the rows of both.

    Shapes: counts_GK (G, K) float64; sums_GKd (G, K, d) float64; error: total squared distance; rows: N.
    """

    counts_GK: NDArray[np.float64]
    sums_GKd: NDArray[np.float64]
    error: float
    rows: int

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.counts_GK + other.counts_GK,
            self.sums_GKd + other.sums_GKd,
            self.error + other.error,
            self.rows + other.rows,
        )

    @property
    def mean_error(self) -> float:
        """Give the mean squared distance of a row to what stands for it."""
        return self.error / max(1, self.rows)


@dataclass(frozen=True)
class Touched:
    """The statistics of one group of many centroids, without those that won no row; `add_stats` puts them together.

    Shapes: touched_T (T,) int64, ascending; counts_T (T,) int64; sums_Td (T, d) float64; words: K.
    """

    touched_T: IdArray
    counts_T: IdArray
    sums_Td: NDArray[np.float64]
    words: int
    error: float
    rows: int


def add_stats(parts: Sequence[Stats | Touched]) -> Stats:
    """Give the statistics of the rows of all parts, which are of one kind."""
    touched = [part for part in parts if isinstance(part, Touched)]
    if not touched:
        return functools.reduce(operator.add, [part for part in parts if isinstance(part, Stats)])
    counts_K, sums_Kd = np.zeros(touched[0].words), np.zeros((touched[0].words, touched[0].sums_Td.shape[1]))
    for part in touched:
        counts_K[part.touched_T] += part.counts_T
        sums_Kd[part.touched_T] += part.sums_Td
    return Stats(counts_K[None], sums_Kd[None], sum(part.error for part in parts), sum(part.rows for part in parts))


def join_stats(parts: Sequence[Stats | Touched]) -> Stats | Touched:
    """Give the statistics of the rows of all parts as one of their kind: adding it is adding them."""
    touched = [part for part in parts if isinstance(part, Touched)]
    if not touched:
        return add_stats(parts)
    touched_T, places = np.unique(np.concatenate([part.touched_T for part in touched]), return_inverse=True)
    counts_T, sums_Td = np.zeros(len(touched_T), np.int64), np.zeros((len(touched_T), touched[0].sums_Td.shape[1]))
    ends = np.cumsum([len(part.touched_T) for part in touched])[:-1]
    for part, places_t in zip(touched, np.split(places, ends), strict=True):
        counts_T[places_t] += part.counts_T
        sums_Td[places_t] += part.sums_Td
    error, rows = sum(part.error for part in touched), sum(part.rows for part in touched)
    return Touched(touched_T, counts_T, sums_Td, touched[0].words, error, rows)


def find_nearest(x_GNd: Tensor, centroids_GKd: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row its nearest centroid in every group; ties go to the lowest index.

    Shapes: x_GNd (G, N, d), centroids_GKd (G, K, d) -> labels (G, N) int64, squared distances (G, N).
    """
    rows = max(1, _CHUNK_FLOATS // (centroids_GKd.shape[0] * min(centroids_GKd.shape[1], _CHUNK_WORDS)))
    # Small results that outlive large ones would scatter the memory of these, and it would grow with the rows.
    labels_GN = torch.empty(x_GNd.shape[:2], dtype=torch.int64, device=x_GNd.device)
    distances_GN = x_GNd.new_empty(x_GNd.shape[:2])
    for start in range(0, x_GNd.shape[1], rows):
        some = slice(start, start + rows)
        labels_GN[:, some], distances_GN[:, some] = _find_chunk(x_GNd[:, some], centroids_GKd)
    return labels_GN, distances_GN


def pick_least(scores_xK: Tensor) -> tuple[Tensor, Tensor]:
    """Give the least value along the last axis and where it stands; of equal ones, the first.

    Shapes: (..., K) -> (...,), (...,) int64.
    """
    # On a CPU numpy finds it ten times as fast as torch.
    on_cpu = scores_xK.device.type == "cpu"
    places_x = torch.from_numpy(scores_xK.detach().numpy().argmin(axis=-1)) if on_cpu else scores_xK.argmin(-1)
    return scores_xK.gather(-1, places_x[..., None])[..., 0], places_x


def measure_stats(x_GNd: Tensor, centroids_GKd: Tensor) -> Stats:
    """Assign rows and sum up what an update needs, in float64 so that the order of adding does not show."""
    labels_GN, distances_GN = find_nearest(x_GNd, centroids_GKd)
    return sum_by_label(x_GNd, labels_GN, distances_GN, centroids_GKd.shape[1])


def sum_by_label(x_GNd: Tensor, labels_GN: Tensor, distances_GN: Tensor, words: int) -> Stats:
    """Sum up rows by the centroid that they were given.

    Shapes: x_GNd (G, N, d); labels (G, N) int64 below `words`; squared distances (G, N).
    """
    groups, rows, dims = x_GNd.shape
    counts_GK = torch.zeros(groups, words, dtype=torch.float64, device=x_GNd.device)
    sums_GKd = torch.zeros(groups, words, dims, dtype=torch.float64, device=x_GNd.device)
    counts_GK.scatter_add_(1, labels_GN, torch.ones_like(labels_GN, dtype=torch.float64))
    for group, labels_N in enumerate(labels_GN):
        _add_rows(sums_GKd[group], x_GNd[group], labels_N)
    error = float(distances_GN.sum(dtype=torch.float64))
    return Stats(counts_GK.cpu().numpy(), sums_GKd.cpu().numpy(), error, rows)


def sum_touched(x_Nd: Tensor, labels_N: Tensor, distances_N: Tensor, words: int) -> Touched:
    """Sum up rows by the centroid that they were given, for those that were given any.

    Shapes: x_Nd (N, d); labels (N,) int64 below `words`; squared distances (N,).
    """
    touched_T, places_N, counts_T = labels_N.unique(return_inverse=True, return_counts=True)
    sums_Td = torch.zeros(len(touched_T), x_Nd.shape[1], dtype=torch.float64, device=x_Nd.device)
    _add_rows(sums_Td, x_Nd, places_N)
    arrays = touched_T.cpu().numpy(), counts_T.cpu().numpy(), sums_Td.cpu().numpy()
    return Touched(*arrays, words, float(distances_N.sum(dtype=torch.float64)), len(x_Nd))


def update_centroids(centroids_GKd: FloatArray, stats: Stats, stride: float = 1.0) -> FloatArray:
    """Move each centroid to the mean of its rows; one that won none takes half of the fullest centroid's place.

    With a `stride`, those that won rows go so many times as far. With the rows where they are, the error grows with the
    squared distance to their mean: short of twice as far it is lower than it was, so that an iteration never raises it,
    as one of Lloyd's does not. With 1.8 it takes about half as many iterations (docs/results/tried.md).

    Shapes: centroids_GKd (G, K, d) -> (G, K, d) float32.
    """
    alive = revive_dead(stats)
    won_GK1 = (alive.counts_GK > 0)[..., None]
    means = alive.sums_GKd / np.where(won_GK1, alive.counts_GK[..., None], 1)
    updated_GKd = np.where(won_GK1, means, centroids_GKd).astype(np.float32)
    if stride == 1:
        return updated_GKd
    ahead_GKd = centroids_GKd + np.float32(stride) * (updated_GKd - centroids_GKd)
    return np.where(stats.counts_GK[..., None] > 0, ahead_GKd, updated_GKd)


def revive_dead(stats: Stats) -> Stats:
    """Give statistics in which centroids that won no row have taken over half the rows of the fullest ones.

    Both halves lie a nudge from where the full one was, each to another side. One that won fewer than two rows is not
    halved; where that leaves dead centroids, they stay dead.
    """
    if (stats.counts_GK > 0).all():
        return stats
    counts_GK, sums_GKd = stats.counts_GK.copy(), stats.sums_GKd.copy()
    for counts_K, sums_Kd in zip(counts_GK, sums_GKd, strict=True):
        _halve_fullest(counts_K, sums_Kd)
    return Stats(counts_GK, sums_GKd, stats.error, stats.rows)


def seed_centroids(sample_GNd: FloatArray, words: int, rng: np.random.Generator) -> FloatArray:
    """Choose starting centroids among sample rows, in every group.

    Up to `MANY` lie far from one another (k-means++, many at a time); a sample with fewer distinct rows than centroids
    gives some of them twice, and the update then splits them. More are distinct rows drawn at random.

    Shapes: sample_GNd (G, N, d) -> (G, words, d) float32.
    Raises:
        DataError: more than `MANY` centroids, and fewer distinct rows.
    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
    """
    choose = _seed_group if words <= MANY else _draw_distinct
    return np.stack([choose(sample, words, rng) for sample in sample_GNd]).astype(np.float32)


def _find_chunk(x_GNd: Tensor, centroids_GKd: Tensor) -> tuple[Tensor, Tensor]:
    nearest_GN = torch.full_like(x_GNd[..., 0], torch.inf)
    labels_GN = torch.zeros(nearest_GN.shape, dtype=torch.int64, device=x_GNd.device)
    for block, words_GWd in enumerate(centroids_GKd.split(_CHUNK_WORDS, dim=1)):
        norms_GW = words_GWd.square().sum(-1)
        # |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c): the row's own norm does not change who is nearest.
        partial_GNW = torch.baddbmm(norms_GW[:, None], x_GNd, words_GWd.transpose(1, 2), alpha=-2)
        found_GN, places_GN = pick_least(partial_GNW)
        labels_GN = torch.where(found_GN < nearest_GN, places_GN + block * _CHUNK_WORDS, labels_GN)
        nearest_GN = torch.minimum(found_GN, nearest_GN)
    return labels_GN, (nearest_GN + x_GNd.square().sum(-1)).clamp_min_(0)


def _add_rows(sums_Kd: Tensor, x_Nd: Tensor, labels_N: Tensor) -> None:
    # Only so many rows at a time are held in float64.
    for x, labels in zip(x_Nd.split(_SUM_ROWS), labels_N.split(_SUM_ROWS), strict=True):
        sums_Kd.index_add_(0, labels, x.double())


def _halve_fullest(counts_K: NDArray[np.float64], sums_Kd: NDArray[np.float64]) -> None:
    """Halve the fullest centroid for the first dead one, the fullest then left for the next, and so on, in place."""
    dead_R, halvings_K = np.flatnonzero(counts_K == 0), np.zeros(len(counts_K), dtype=np.int64)
    nudges = _draw_nudges(sums_Kd.shape[1])
    while len(dead_R):
        # Whoever has more than half of the fullest one's rows comes before any half of it: they are halved at once.
        full_F = np.flatnonzero((counts_K >= 2) & (counts_K > counts_K.max() / 2))
        if not len(full_F):
            return
        full_F = full_F[np.argsort(-counts_K[full_F], kind="stable")][: len(dead_R)]
        new_F, dead_R = dead_R[: len(full_F)], dead_R[len(full_F) :]
        nudge_Fd = _SPLIT * nudges[halvings_K[full_F]]
        halves_Fd = sums_Kd[full_F] / 2
        sums_Kd[new_F], sums_Kd[full_F] = halves_Fd * (1 + nudge_Fd), halves_Fd * (1 - nudge_Fd)
        counts_K[full_F] /= 2
        halvings_K[full_F] += 1
        counts_K[new_F], halvings_K[new_F] = counts_K[full_F], halvings_K[full_F]


def _draw_nudges(dims: int) -> NDArray[np.float64]:
    # A half that is halved again is nudged another way, or its halves would meet those of the other half.
    nudges = np.random.default_rng(0).uniform(-1, 1, (64, dims))
    nudges[0] = np.where(np.arange(dims) % 2 == 0, 1, -1)
    return nudges


def _draw_distinct(sample_Nd: FloatArray, words: int, rng: np.random.Generator) -> FloatArray:
    distinct = np.sort(np.unique(_hash_rows(sample_Nd), return_index=True)[1])
    if len(distinct) < words:
        found = f"{len(distinct)} distinct among {len(sample_Nd)} sampled"
        raise DataError("training rows", found, f"{words} cells need at least as many that differ")
    return sample_Nd[np.sort(rng.choice(distinct, words, replace=False))]


def _hash_rows(x_Nd: FloatArray) -> IdArray:
    """Give each row a number that equal rows share: a random product of its bits, modulo 2^64."""
    factors_d = np.random.default_rng(0).integers(1 << 62, size=x_Nd.shape[1]) | 1
    hashes_N = np.empty(len(x_Nd), dtype=np.int64)
    for start in range(0, len(x_Nd), _SUM_ROWS):
        # Equal numbers have equal bits once -0.0 is 0.0.
        bits_nd = np.ascontiguousarray(x_Nd[start : start + _SUM_ROWS] + 0, dtype=np.float32).view(np.int32)
        hashes_N[start : start + _SUM_ROWS] = bits_nd.astype(np.int64) @ factors_d
    return hashes_N


def _seed_group(sample_Nd: FloatArray, words: int, rng: np.random.Generator) -> FloatArray:
    """Choose rows, an eighth as many as there are at a time: far from all before, though not from each other."""
    centred_Nd = sample_Nd - sample_Nd.mean(axis=0)
    norms_N = (centred_Nd**2).sum(1)
    chosen, new = list[int](), [int(rng.integers(len(sample_Nd)))]
    reach_N = np.full(len(sample_Nd), np.inf)
    while True:
        chosen += new
        if len(chosen) == words:
            return sample_Nd[chosen]
        apart_NB = norms_N[:, None] + (norms_N[new] - 2 * (centred_Nd @ centred_Nd[new].T))
        # Nearer than rounding errors are, rows count as equal.
        apart_NB[apart_NB <= _ROUNDING * (norms_N[:, None] + norms_N[new])] = 0
        np.minimum(reach_N, apart_NB.min(axis=1), out=reach_N)
        new = _draw_far(reach_N, min(words - len(chosen), 1 + len(chosen) // 8, _SEED_ROWS), rng)


def _draw_far(reach_N: NDArray[np.float64], count: int, rng: np.random.Generator) -> list[int]:
    """Draw up to `count` rows, with a chance as large as their reach, at equal steps: none twice but the farthest."""
    heap_N = np.cumsum(reach_N)
    if heap_N[-1] <= 0:
        return [int(row) for row in rng.integers(len(reach_N), size=count)]
    steps = (np.arange(count) + rng.random()) / count * heap_N[-1]
    rows = np.unique(np.searchsorted(heap_N, steps, side="right"))
    return [int(row) for row in rows if row < len(reach_N)]
