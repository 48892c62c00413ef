"""What a search is asked for and what it answers, and how answers of several shards become one.

`Effort` is how many hits are wanted, which, and how hard to look for them; it travels with the query. `Hits` is the one
result of the local searcher, the router and the client. It says how many shards answered, so that a partial answer
shows that it is partial.
"""

# Shapes: Q queries, k neighbours, S answers to merge

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NO_ID = -1
FAR = np.float32(np.finfo(np.float32).max)
"""The distance that stands beside id -1, where a query found fewer than k: the same that faiss gives."""


class Effort(NamedTuple):
    """What a query wants, and how hard to look for it; None stands for what is usual for the version.

    Args:
        k: neighbours wanted.
        probes: lists to look into.
        refine: candidates for each hit, ranked again by the vectors that the version keeps; 1: codes alone.
        recall: share of the true neighbours to find; it stands for probes and refine that `gsl tune` measured.
        where: which items may be hits (`gsl_dist.filters`).
        within: how far off a hit may be, as users see distances: at most, or at least where larger is nearer.
    """

    k: int = 10
    probes: int | None = None
    refine: int | None = None
    recall: float | None = None
    where: Mapping[str, Any] | None = None
    within: float | None = None


@dataclass(frozen=True)
class Hits:
    """The nearest items of each query, nearest first.

    It unpacks like the pair that faiss returns: `distances, ids = hits`.

    Args:
        ids: int64, -1 where there is no further hit.
        distances: squared L2, smaller is nearer, and the largest float32 where the id is -1; what leaves the system is
            turned by `show_distances` where the metric is another.
        shards_answered: how many shards took part.
        shards_total: how many the version has.
        version: the version that answered.
        missing: the names of the shards that did not take part.
        payload: the columns asked for, a row for each hit in the order of `ids`; None where none were.

    Shapes: ids (Q, k) int64; distances (Q, k) float32.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.float32]
    shards_answered: int
    shards_total: int
    version: str = ""
    missing: tuple[str, ...] = ()
    payload: pa.Table | None = None

    def __iter__(self) -> Iterator[NDArray[np.generic]]:
        yield self.distances
        yield self.ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_partial(self) -> bool:
        """Tell whether some shards are missing from the answer."""
        return self.shards_answered < self.shards_total

    def rows(self) -> list[list[dict[str, Any]]]:
        """Give each query's hits as objects: `id`, `distance` and the columns asked for."""
        columns = iter(self.payload.to_pylist()) if self.payload is not None else itertools.repeat({})
        return [
            [
                {"id": int(item), "distance": float(far)} | row
                for item, far, row in zip(ids_k, far_k, columns, strict=False)
                if item != NO_ID
            ]
            for ids_k, far_k in zip(self.ids, self.distances, strict=True)
        ]


def merge_topk(answers: Sequence[Hits], k: int) -> Hits:
    """Merge answers over disjoint sets of items into the k nearest of all.

    Equal distances are ordered by id, so the result does not depend on which shard held what.

    Shapes: S answers of (Q, any) -> (Q, k).
    """
    if len(answers) == 1:
        ids, distances = answers[0].ids, answers[0].distances
    else:
        ids = np.concatenate([answer.ids for answer in answers], axis=1)
        distances = np.concatenate([answer.distances for answer in answers], axis=1)
    if len(answers) > 1 or not (distances[:, 1:] > distances[:, :-1]).all():
        ids, distances = _take_nearest(ids, distances, min(k, ids.shape[1]))
    else:
        ids, distances = ids[:, :k], distances[:, :k]
    if ids.shape[1] < k:
        gap = ((0, 0), (0, k - ids.shape[1]))
        ids = np.pad(ids, gap, constant_values=NO_ID)
        distances = np.pad(distances, gap, constant_values=FAR)
    answered = sum(answer.shards_answered for answer in answers)
    total = max(answered, max(answer.shards_total for answer in answers))
    return Hits(ids, distances, answered, total, answers[0].version)


def show_distances(hits: Hits, metric: str) -> Hits:
    """Give hits as users see them: with inner products or cosines, larger is nearer, where that is the metric.

    Inside, smaller is nearer everywhere: an inner product is negative, a cosine a squared distance of unit vectors.
    """
    if metric == "l2":
        return hits
    shown = -hits.distances if metric == "ip" else 1 - hits.distances / 2
    return replace(hits, distances=np.where(hits.ids == NO_ID, -FAR, shown).astype(np.float32))


def cut_within(hits: Hits, within: float | None, metric: str) -> Hits:
    """Leave out hits that are farther off than they may be; distances are as users see them."""
    if within is None:
        return hits
    is_far = hits.distances > within if metric == "l2" else hits.distances < within
    distances = np.where(is_far, FAR if metric == "l2" else -FAR, hits.distances).astype(np.float32)
    return replace(hits, ids=np.where(is_far, NO_ID, hits.ids), distances=distances)


def _take_nearest(
    ids: NDArray[np.int64], distances: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    # Ids are compared unsigned, so that -1 (nothing found) sorts behind every real hit of the same distance.
    order = np.lexsort((ids.view(np.uint64), distances), axis=1)[:, :k]
    rows = np.arange(len(order))[:, None]
    return ids[rows, order], distances[rows, order]
