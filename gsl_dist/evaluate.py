"""How good a ranking is: exact neighbours, mean average precision, recall and quantization error.

Codes put many items at the same distance, and items at the same distance have no order. So average precision is taken
as its expected value over every order of the ties, in closed form: shuffling the database changes nothing. Squared L2
everywhere, smaller is nearer. This module knows neither how vectors were coded nor who searched.
"""

# Shapes: Q queries, N items, D dims, k neighbours, R the first answers looked at

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from gsl_dist.errors import BadInput, DataError
from gsl_dist.hits import NO_ID, Hits

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]
BoolArray = NDArray[np.bool_]


def rank_exact(queries_QD: FloatArray, items_ND: FloatArray, k: int, metric: str = "l2") -> Hits:
    """Rank the k nearest items of each query in float32; an id is a row number of `items_ND`.

    By squared L2, which for vectors of length 1 is by cosine; with metric `ip` by negative inner products.

    Distances come from a matrix product, so they carry its rounding (about 1e-7 of the squared norms).

    Shapes: queries_QD (Q, D), items_ND (N, D) -> ids (Q, k) int64, distances (Q, k) float32.

    Raises:
        BadInput: k is not between 1 and N.
        DataError: the arrays are not two tables of the same width.
    """
    _check_table("items", items_ND)
    _check_table("queries", queries_QD, width=items_ND.shape[1])
    if not 1 <= k <= len(items_ND):
        raise BadInput("k", k, f"it must lie between 1 and the number of items, {len(items_ND)}")
    queries, items = (np.ascontiguousarray(table, dtype=np.float32) for table in (queries_QD, items_ND))
    if metric == "ip":
        products, ids = faiss.knn(queries, items, k, faiss.METRIC_INNER_PRODUCT)
        return Hits(ids, -products, shards_answered=1, shards_total=1)
    distances, ids = faiss.knn(queries, items, k)
    return Hits(ids, distances, shards_answered=1, shards_total=1)


def average_precision(distances_N: FloatArray, relevant_N: BoolArray, *, top: int | None = None) -> float:
    r"""Give the average precision of one ranking, expected over all orders of items at the same distance.

    For a fixed order, AP = (1/H) \sum_{i <= R} rel_i P_i: P_i is the share of relevant items among the first i, and H
    the relevant items among the first R (0 if H = 0). R is `top`, or N.

    Take t tied items, m of them relevant, that follow s items, b of them relevant. In a random order, the j-th of them
    is relevant with chance m/t; given that, each of the j-1 before it is relevant with chance (m-1)/(t-1). So place s+j
    adds, in expectation,

        (m/t) (b + 1 + (j-1)(m-1)/(t-1)) / (s+j).

    If R cuts the ties, c = R - s of them stay, and how many of those are relevant is a random x; so is H = b + x. x is
    hypergeometric: C(m,x) C(t-m,c-x) / C(t,c). Given x, the c that stay are again in random order, so the term above
    holds with x for m and c for t, and AP is the mean over x of (sum so far + sum of those terms) / (b + x).

    Shapes: distances_N (N,), relevant_N (N,) bool, in any order -> a number in [0, 1].

    Raises:
        BadInput: `top` is below 1.
        DataError: the lengths differ, or a distance is NaN.

    Source: McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the presence
    of tied scores", for ties; the hashing literature (MAP@R) for dividing by H; the cut by `top` is derived here.
    """
    _check_ranking(distances_N, relevant_N, top)
    if not np.any(relevant_N):
        return 0.0
    order = np.argsort(distances_N, kind="stable")
    distances, relevant = distances_N[order], np.asarray(relevant_N, dtype=np.int64)[order]
    starts = np.flatnonzero(np.append(True, distances[1:] != distances[:-1]))
    sizes = np.diff(np.append(starts, len(relevant)))
    counts = np.add.reduceat(relevant, starts)
    before = np.cumsum(counts) - counts
    cut = len(relevant) if top is None else min(top, len(relevant))
    last = int(np.searchsorted(starts, cut)) - 1
    head = _sum_whole(starts[:last], sizes[:last], counts[:last], before[:last])
    taken = cut - int(starts[last])
    return _expect_cut(head, int(before[last]), cut, taken, _spread_ties(int(sizes[last]), int(counts[last]), taken))


def mean_average_precision(distances_QN: FloatArray, relevant_QN: BoolArray, *, top: int | None = None) -> float:
    """Give the mean over the queries of `average_precision`; a query that finds nothing relevant counts as 0.

    Shapes: distances_QN (Q, N), relevant_QN (Q, N) bool.

    Raises:
        BadInput: `top` is below 1.
        DataError: the shapes differ, there is no query, or a distance is NaN.
    """
    if np.ndim(distances_QN) != 2 or np.shape(distances_QN) != np.shape(relevant_QN) or not np.size(distances_QN):
        shapes = (np.shape(distances_QN), np.shape(relevant_QN))
        raise DataError("distances, relevant", shapes, "both must be (queries, items), and not empty")
    pairs = zip(distances_QN, relevant_QN, strict=True)
    return float(np.mean([average_precision(distances, relevant, top=top) for distances, relevant in pairs]))


def evaluate_map(
    hits: Hits,
    query_labels: IntArray,
    item_labels_by_id: tuple[IntArray, IntArray],
    *,
    top: int | None = None,
    query_ids: IntArray | None = None,
) -> float:
    """Give the mean average precision of an answer: an item is relevant if it bears the query's label.

    The hits rank the whole database, so as many columns as it has items are wanted, or `top` of them. With exactly
    `top` columns, ties that the last one cuts are counted as if the rest of them were not there.

    Args:
        hits: what a search answered; ids -1 are left out.
        query_labels: the label of each query.
        item_labels_by_id: the database: ids in ascending order, and their labels.
        top: R, how many of the first answers count; all of them when None.
        query_ids: ids of the queries, to make sure that none of them is in the database.

    Shapes: hits (Q, k), query_labels (Q,), ids (N,), labels (N,), query_ids (Q,).

    Raises:
        BadInput: `top` is below 1.
        DataError: a partial or too short answer, an id without a label, a query that is in the database.
    """
    item_ids, item_labels = (np.asarray(array) for array in item_labels_by_id)
    query_labels = np.asarray(query_labels)
    _check_labels(item_ids, item_labels, query_ids)
    _check_answer(hits, query_labels, len(item_ids), top)
    scores = []
    for ids, distances, label in zip(hits.ids, hits.distances, query_labels, strict=True):
        found = ids != NO_ID
        relevant = _look_up(ids[found], item_ids, item_labels) == label
        scores.append(average_precision(distances[found], relevant, top=top))
    return float(np.mean(scores))


def recall_at(
    found_ids: IntArray,
    true_ids: IntArray,
    at: int,
    *,
    found_distances: FloatArray | None = None,
    true_distances: FloatArray | None = None,
) -> float:
    """Give k-recall@R: the share of a query's k true nearest that are among its first R answers, meaned over queries.

    k is the width of `true_ids`, R is `at`; k = R = 10 is what "recall@10" means here. With both distances, ties in the
    truth count: an answer no farther than the k-th true neighbour is as good as a true one (at most k of them). Found
    distances must then be exact and computed as the true ones were, not estimated from codes.

    Shapes: found_ids, found_distances (Q, k') with k' >= R; true_ids, true_distances (Q, k); id -1 stands for none.

    Raises:
        BadInput: `at` is below 1 or above k'.
        DataError: the shapes do not fit, or a query has no true neighbour.
    """
    _check_recall(found_ids, true_ids, at)
    wanted = np.sum(true_ids != NO_ID, axis=1)
    if np.any(wanted == 0):
        raise DataError("true_ids", int(np.argmin(wanted)), "this query has no true neighbour to find")
    if found_distances is None or true_distances is None:
        pairs = zip(true_ids, found_ids[:, :at], strict=True)
        hit = np.array([np.sum(np.isin(true, found) & (true != NO_ID)) for true, found in pairs])
    else:
        _check_same_shape(found_ids, found_distances, true_ids, true_distances)
        farthest = np.take_along_axis(true_distances, wanted[:, None] - 1, axis=1)
        near = (found_distances[:, :at] <= farthest) & (found_ids[:, :at] != NO_ID)
        hit = np.minimum(near.sum(axis=1), wanted)
    return float(np.mean(hit / wanted))


def first_recall_at(found_ids: IntArray, true_ids: IntArray, at: int) -> float:
    """Give 1-recall@R: the share of queries whose single nearest item is among their first R answers.

    Shapes: found_ids (Q, k') with k' >= R; true_ids (Q, any), nearest first.

    Raises:
        BadInput: `at` is below 1 or above k'.
        DataError: the shapes do not fit, or a query has no true neighbour.
    """
    return recall_at(found_ids, true_ids[:, :1], at)


def quantization_error(vectors_ND: FloatArray, decoded_ND: FloatArray) -> float:
    r"""Give the mean squared error of the decoded vectors over the total variance of the vectors.

    \sum_n |x_n - y_n|^2 / \sum_n |x_n - mean(x)|^2: 0 is lossless, 1 is what a single codeword at the mean reaches.

    Shapes: vectors_ND (N, D), decoded_ND (N, D).

    Raises:
        DataError: the shapes differ, or all vectors are the same.
    """
    _check_table("vectors", vectors_ND)
    if vectors_ND.shape != np.shape(decoded_ND):
        raise DataError("decoded", np.shape(decoded_ND), f"it must have the shape of the vectors, {vectors_ND.shape}")
    # In float64: sums over many rows in float32 lose the digits that tell two methods apart.
    vectors = np.asarray(vectors_ND, dtype=np.float64)
    variance = float(np.square(vectors - vectors.mean(axis=0)).sum())
    if variance == 0:
        raise DataError("vectors", vectors.shape, "they must not all be the same, since the error is over the variance")
    return float(np.square(vectors - decoded_ND).sum()) / variance


def _sum_whole(starts: IntArray, sizes: IntArray, counts: IntArray, before: IntArray) -> float:
    """Sum the expected rel_i P_i over ties that no cut touches; one entry of each array is one set of ties."""
    chance, others = counts / sizes, (counts - 1) / np.maximum(sizes - 1, 1)
    group = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(group))
    earlier = before[group] + 1 + (places - starts[group]) * others[group]
    return float((chance[group] * earlier / (places + 1)).sum())


def _spread_ties(size: int, count: int, taken: int) -> tuple[IntArray, FloatArray]:
    """Give how many relevant ones may be among `taken` of `size` ties, and the chance of each number."""
    numbers = np.arange(max(0, taken - (size - count)), min(count, taken) + 1)
    x = numbers[:-1]
    # Each chance from the one before it, as logarithms: the binomials themselves overflow.
    steps = np.log((count - x) * (taken - x)) - np.log((x + 1) * (size - count - taken + x + 1))
    weights = np.append(0.0, np.cumsum(steps))
    chances = np.exp(weights - weights.max())
    return numbers, chances / chances.sum()


def _expect_cut(head: float, before: int, cut: int, taken: int, spread: tuple[IntArray, FloatArray]) -> float:
    """Finish average precision with the ties that hold place R = `cut`, `taken` of which are among the first R."""
    x, chances = spread
    earlier = np.arange(taken)
    places = cut - taken + 1 + earlier
    once, pairs = (1 / places).sum(), (earlier / places).sum()
    tail = x / taken * ((before + 1) * once + (x - 1) / max(taken - 1, 1) * pairs)
    found = before + x
    return float((chances * np.where(found > 0, (head + tail) / np.maximum(found, 1), 0.0)).sum())


def _look_up(ids: IntArray, item_ids: IntArray, item_labels: IntArray) -> IntArray:
    rows = np.minimum(np.searchsorted(item_ids, ids), len(item_ids) - 1)
    strange = item_ids[rows] != ids
    if np.any(strange):
        raise DataError("hits.ids", int(ids[strange][0]), "every id must be in the table of labels")
    return item_labels[rows]


def _check_table(name: str, table_ND: FloatArray, width: int | None = None) -> None:
    if np.ndim(table_ND) != 2 or not np.size(table_ND) or (width is not None and table_ND.shape[1] != width):
        columns = "dims" if width is None else str(width)
        raise DataError(name, np.shape(table_ND), f"it must be a table (rows, {columns}), and not empty")


def _check_ranking(distances_N: FloatArray, relevant_N: BoolArray, top: int | None) -> None:
    if top is not None and top < 1:
        raise BadInput("top", top, "it must be at least 1, or None for the whole ranking")
    if np.ndim(distances_N) != 1 or np.shape(distances_N) != np.shape(relevant_N):
        shapes = (np.shape(distances_N), np.shape(relevant_N))
        raise DataError("distances, relevant", shapes, "both must hold one value for each ranked item")
    if np.any(np.isnan(distances_N)):
        raise DataError("distances", "NaN", "every distance must be a number, since NaN has no rank")


def _check_labels(item_ids: IntArray, item_labels: IntArray, query_ids: IntArray | None) -> None:
    if item_ids.ndim != 1 or item_ids.shape != item_labels.shape or not item_ids.size:
        raise DataError("item_labels_by_id", (item_ids.shape, item_labels.shape), "give one label for each id")
    if np.any(item_ids[1:] <= item_ids[:-1]):
        raise DataError("item_labels_by_id", item_ids, "the ids must be in ascending order, each of them once")
    if query_ids is not None:
        shared = np.intersect1d(query_ids, item_ids)
        if shared.size:
            raise DataError("query_ids", int(shared[0]), "query images must not be in the database")


def _check_answer(hits: Hits, query_labels: IntArray, items: int, top: int | None) -> None:
    if query_labels.shape != (len(hits),) or not len(hits):
        raise DataError("query_labels", query_labels.shape, f"it must hold one label for each of {len(hits)} queries")
    if hits.is_partial:
        answered = f"{hits.shards_answered} of {hits.shards_total} shards"
        raise DataError("hits", answered, "a partial answer does not rank the database")
    wanted = items if top is None else min(top, items)
    if hits.ids.shape[1] < wanted:
        raise DataError(
            "hits", hits.ids.shape, f"each query must rank {wanted} items, with ids -1 where it found fewer"
        )


def _check_recall(found_ids: IntArray, true_ids: IntArray, at: int) -> None:
    if np.ndim(found_ids) != 2 or np.ndim(true_ids) != 2 or len(found_ids) != len(true_ids) or not np.size(true_ids):
        shapes = (np.shape(found_ids), np.shape(true_ids))
        raise DataError("found_ids, true_ids", shapes, "both must be tables with one row for each query, and not empty")
    if not 1 <= at <= found_ids.shape[1]:
        raise BadInput("at", at, f"it must lie between 1 and the answers given for each query, {found_ids.shape[1]}")


def _check_same_shape(
    found_ids: IntArray, found_distances: FloatArray, true_ids: IntArray, true_distances: FloatArray
) -> None:
    for name, ids, distances in (("found", found_ids, found_distances), ("true", true_ids, true_distances)):
        if ids.shape != np.shape(distances):
            raise DataError(f"{name}_distances", np.shape(distances), f"it must have the shape of the ids, {ids.shape}")
