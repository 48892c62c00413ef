"""Lloyd's iterations cut where a cluster needs them cut: statistics that add, and an update that sees only their sum.

`assign` looks at rows and centroids and gives `Stats`: how many rows each centroid won, their sum, and the squared
error. Statistics of disjoint rows add up to those of the whole, so any number of workers gives the same update. The
coordinator adds and updates; it never sees a row. G independent groups of centroids are handled side by side: one
group for coarse cells, one a sub-vector for product codes.
"""

# Shapes: N rows, G groups, K centroids in each, d dims in each

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsl_dist.codebook import FloatArray

_SPLIT = 1 / 1024
_CHUNK_FLOATS = 1 << 25


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


def find_nearest(x_GNd: Tensor, centroids_GKd: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row its nearest centroid in every group; ties go to the lowest index.

    Shapes: x_GNd (G, N, d), centroids_GKd (G, K, d) -> labels (G, N) int64, squared distances (G, N).
    """
    rows = max(1, _CHUNK_FLOATS // (centroids_GKd.shape[0] * centroids_GKd.shape[1]))
    parts = [_find_chunk(part, centroids_GKd) for part in x_GNd.split(rows, dim=1)]
    labels, distances = zip(*parts, strict=True)
    return torch.cat(labels, dim=1), torch.cat(distances, dim=1)


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
        sums_GKd[group].index_add_(0, labels_N, x_GNd[group].double())
    error = float(distances_GN.sum(dtype=torch.float64))
    return Stats(counts_GK.cpu().numpy(), sums_GKd.cpu().numpy(), error, rows)


def update_centroids(centroids_GKd: FloatArray, stats: Stats) -> FloatArray:
    """Move each centroid to the mean of its rows; one that won none takes half of the fullest centroid's place.

    Shapes: centroids_GKd (G, K, d) -> (G, K, d) float32.
    """
    counts = stats.counts_GK.copy()
    means = stats.sums_GKd / np.maximum(counts, 1)[..., None]
    moved = np.where(counts[..., None] > 0, means, centroids_GKd)
    for group in range(len(moved)):
        _revive_dead(moved[group], counts[group])
    return moved.astype(np.float32)


def seed_centroids(sample_GNd: FloatArray, words: int, rng: np.random.Generator) -> FloatArray:
    """Choose starting centroids among sample rows, far from one another (k-means++), in every group.

    A sample with fewer distinct rows than centroids gives some centroids twice; the update then splits them.

    Shapes: sample_GNd (G, N, d) -> (G, words, d) float32.
    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
    """
    return np.stack([_seed_group(sample, words, rng) for sample in sample_GNd]).astype(np.float32)


def _find_chunk(x_GNd: Tensor, centroids_GKd: Tensor) -> tuple[Tensor, Tensor]:
    norms_GK = centroids_GKd.square().sum(-1)
    # |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c): the row's own norm does not change who is nearest.
    partial_GNK = torch.baddbmm(norms_GK[:, None], x_GNd, centroids_GKd.transpose(1, 2), alpha=-2)
    nearest, labels = partial_GNK.min(dim=-1)
    return labels, (nearest + x_GNd.square().sum(-1)).clamp_min_(0)


def _revive_dead(centroids_Kd: NDArray[np.float64], counts_K: NDArray[np.float64]) -> None:
    for dead in np.flatnonzero(counts_K == 0):
        fullest = int(np.argmax(counts_K))
        if counts_K[fullest] < 2:
            return
        nudge = _SPLIT * np.where(np.arange(centroids_Kd.shape[1]) % 2 == 0, 1, -1)
        origin = centroids_Kd[fullest].copy()
        centroids_Kd[dead], centroids_Kd[fullest] = origin * (1 + nudge), origin * (1 - nudge)
        counts_K[dead] = counts_K[fullest] / 2
        counts_K[fullest] /= 2


def _seed_group(sample_Nd: FloatArray, words: int, rng: np.random.Generator) -> FloatArray:
    chosen = [int(rng.integers(len(sample_Nd)))]
    reach = ((sample_Nd - sample_Nd[chosen[0]]) ** 2).sum(1, dtype=np.float64)
    while len(chosen) < words:
        total = reach.sum()
        chance = reach / total if total > 0 else None
        chosen.append(int(rng.choice(len(sample_Nd), p=chance)))
        np.minimum(reach, ((sample_Nd - sample_Nd[chosen[-1]]) ** 2).sum(1, dtype=np.float64), out=reach)
    return sample_Nd[chosen]
