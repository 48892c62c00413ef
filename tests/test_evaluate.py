"""Measures of a ranking against hand-computed cases and against every order of the ties."""

from __future__ import annotations

import time

import numpy as np
import pytest
from reference import average_precision_in_order, average_precision_over_permutations

from gsl_dist.errors import BadInput, DataError
from gsl_dist.evaluate import (
    average_precision,
    evaluate_map,
    first_recall_at,
    mean_average_precision,
    quantization_error,
    rank_exact,
    recall_at,
)
from gsl_dist.hits import FAR, Hits


def make_hits(ids, distances=None, answered=1):
    ids = np.asarray(ids, dtype=np.int64)
    if distances is None:
        distances = np.broadcast_to(np.arange(ids.shape[1], dtype=np.float32), ids.shape)
    return Hits(ids, np.asarray(distances, dtype=np.float32), answered, 1)


def test_rank_exact_equals_sorting_all_distances():
    rng = np.random.default_rng(0)
    queries, items = rng.normal(size=(30, 8)), rng.normal(size=(50, 8))
    plain = np.square(queries[:, None] - items[None]).sum(axis=2)
    hits = rank_exact(queries, items, k=50)
    assert np.array_equal(hits.ids, np.argsort(plain, axis=1))
    assert np.allclose(hits.distances, np.sort(plain, axis=1), atol=1e-5)
    assert hits.distances.dtype == np.float32 and not hits.is_partial


@pytest.mark.parametrize("k", [0, 4])
def test_rank_exact_refuses_k_outside_the_items(k):
    with pytest.raises(BadInput, match="between 1 and the number of items, 3"):
        rank_exact(np.zeros((1, 2)), np.zeros((3, 2)), k)


def test_rank_exact_refuses_other_widths():
    with pytest.raises(DataError, match="queries"):
        rank_exact(np.zeros((1, 2)), np.zeros((3, 4)), 1)


def test_average_precision_by_hand():
    distances = np.array([1.0, 2.0, 3.0, 4.0])
    # Relevant at places 1 and 3: (1/1 + 2/3) / 2.
    assert average_precision(distances, np.array([True, False, True, False])) == pytest.approx(5 / 6)
    # Within the first 2 only the one at place 1 is found, and only it divides: 1/1.
    assert average_precision(distances, np.array([True, False, True, False]), top=2) == pytest.approx(1.0)
    # Places 2 and 4: (1/2 + 2/4) / 2.
    assert average_precision(distances, np.array([False, True, False, True])) == pytest.approx(0.5)


def test_average_precision_of_ties_by_hand():
    # One of two ties is relevant: at place 1 (AP 1) or at place 2 (AP 1/2).
    assert average_precision(np.zeros(2), np.array([True, False])) == pytest.approx(0.75)
    # The same, and only one answer looked at: AP 1 or 0.
    assert average_precision(np.zeros(2), np.array([True, False]), top=1) == pytest.approx(0.5)
    # Two of three ties: orders RRN, RNR, NRR give 1, 5/6 and 7/12; their mean is 29/36.
    assert average_precision(np.zeros(3), np.array([True, True, False])) == pytest.approx(29 / 36)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("top", [None, 1, 3, 4, 6, 99])
def test_tied_average_precision_is_the_mean_over_all_permutations(seed, top):
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 3, size=7).astype(np.float32)
    relevant = rng.random(7) < rng.uniform(0.1, 0.9)
    expected = average_precision_over_permutations(distances.tolist(), relevant.tolist(), top)
    assert average_precision(distances, relevant, top=top) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("top", [None, 1, 50, 200])
def test_untied_average_precision_equals_the_plain_loop(top):
    rng = np.random.default_rng(5)
    distances, relevant = rng.permutation(200).astype(np.float32), rng.random(200) < 0.2
    expected = average_precision_in_order(relevant[np.argsort(distances)].tolist(), top)
    assert average_precision(distances, relevant, top=top) == pytest.approx(expected)


@pytest.mark.parametrize("top", [None, 40])
def test_shuffling_the_database_changes_nothing(top):
    rng = np.random.default_rng(6)
    distances, relevant = rng.integers(0, 9, size=(4, 300)), rng.random((4, 300)) < 0.3
    order = rng.permutation(300)
    once = mean_average_precision(distances, relevant, top=top)
    assert mean_average_precision(distances[:, order], relevant[:, order], top=top) == pytest.approx(once, abs=1e-12)


def test_large_ties_cut_by_top_stay_finite():
    relevant = np.arange(100_000) % 4 == 0
    # Nearly a quarter of any prefix is relevant, so precision is about 1/4 at every place that counts.
    assert average_precision(np.zeros(100_000), relevant, top=50_000) == pytest.approx(0.25, abs=1e-3)


def test_a_query_without_relevant_items_counts_as_zero():
    distances = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert mean_average_precision(distances, np.array([[True, False], [False, False]])) == pytest.approx(0.5)


def test_a_thousand_rankings_of_seven_thousand_take_seconds():
    rng = np.random.default_rng(7)
    distances, relevant = rng.random((100, 7000), dtype=np.float32), rng.random((100, 7000)) < 0.1
    start = time.process_time()
    mean_average_precision(distances, relevant)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("distances", "relevant", "top", "error", "match"),
    [
        (np.zeros((1, 3)), np.zeros((1, 3), bool), 0, BadInput, "top"),
        (np.zeros((1, 3)), np.zeros((1, 4), bool), None, DataError, "relevant"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), None, DataError, "not empty"),
        (np.full((1, 3), np.nan), np.ones((1, 3), bool), None, DataError, "NaN"),
    ],
)
def test_mean_average_precision_refuses_bad_input(distances, relevant, top, error, match):
    with pytest.raises(error, match=match):
        mean_average_precision(distances, relevant, top=top)


def test_evaluate_map_by_hand():
    database = (np.array([10, 20, 30]), np.array([0, 1, 0]))
    # Labels in order: query 0 sees 0, 1, 0 and wants 0: 5/6. Query 1 sees 0, 0, 1 and wants 1: 1/3.
    hits = make_hits([[10, 20, 30], [10, 30, 20]])
    score = evaluate_map(hits, np.array([0, 1]), database, query_ids=np.array([1, 2]))
    assert score == pytest.approx((5 / 6 + 1 / 3) / 2)
    assert evaluate_map(hits, np.array([0, 1]), database, top=2) == pytest.approx(0.5)


def test_evaluate_map_leaves_out_empty_places():
    database = (np.array([10, 20, 30]), np.array([0, 1, 0]))
    hits = make_hits([[20, 10, -1], [-1, -1, -1]], [[1, 2, FAR], [FAR, FAR, FAR]])
    # The first query finds its one relevant item at place 2; the second finds nothing.
    assert evaluate_map(hits, np.array([0, 0]), database) == pytest.approx((1 / 2 + 0) / 2)


def test_evaluate_map_equals_mean_average_precision_of_the_exact_ranking():
    rng = np.random.default_rng(8)
    queries, items = rng.normal(size=(10, 4)), rng.normal(size=(60, 4))
    query_labels, item_labels = rng.integers(0, 3, 10), rng.integers(0, 3, 60)
    plain = np.square(queries[:, None] - items[None]).sum(axis=2)
    expected = mean_average_precision(plain, query_labels[:, None] == item_labels[None])
    score = evaluate_map(rank_exact(queries, items, 60), query_labels, (np.arange(60), item_labels))
    assert score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"hits": make_hits([[10, 99]])}, "hits.ids: got 99"),
        ({"hits": make_hits([[10]])}, "must rank 2 items"),
        ({"hits": make_hits([[10, 20]], answered=0)}, "0 of 1 shards"),
        ({"query_labels": np.array([0, 1])}, "query_labels"),
        ({"item_labels_by_id": (np.array([20, 10]), np.array([0, 0]))}, "ascending"),
        ({"item_labels_by_id": (np.array([10, 20]), np.array([0]))}, "one label for each id"),
        ({"query_ids": np.array([20])}, "query images must not be in the database"),
    ],
)
def test_evaluate_map_refuses_what_would_give_a_wrong_figure(changed, match):
    given = {
        "hits": make_hits([[10, 20]]),
        "query_labels": np.array([0]),
        "item_labels_by_id": (np.array([10, 20]), np.array([0, 1])),
    }
    with pytest.raises(DataError, match=match):
        evaluate_map(**(given | changed))


def test_recall_by_hand():
    found = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    true = np.array([[4, 1], [9, 8]])
    # First answers 2: query 0 has found 1 of {4, 1}, query 1 none. First 4: two of two, one of two.
    assert recall_at(found, true, 2) == pytest.approx((1 / 2 + 0) / 2)
    assert recall_at(found, true, 4) == pytest.approx((1 + 1 / 2) / 2)
    # The single nearest are 4 and 9.
    assert first_recall_at(found, true, 3) == 0.0
    assert first_recall_at(found, true, 4) == pytest.approx(0.5)


def test_recall_ignores_empty_places():
    # The second query has one true neighbour only, and it is found; -1 never matches -1.
    assert recall_at(np.array([[1, -1], [3, -1]]), np.array([[1, 2], [3, -1]]), 2) == pytest.approx((1 / 2 + 1) / 2)


def test_recall_counts_ties_with_the_last_true_neighbour():
    found, true = np.array([[1, 3, 4]]), np.array([[1, 2]])
    found_distances, true_distances = np.array([[0.5, 0.7, 0.7]]), np.array([[0.5, 0.7]])
    assert recall_at(found, true, 3) == pytest.approx(0.5)
    tied = recall_at(found, true, 3, found_distances=found_distances, true_distances=true_distances)
    assert tied == pytest.approx(1.0)


@pytest.mark.parametrize("at", [0, 3])
def test_recall_refuses_more_answers_than_given(at):
    with pytest.raises(BadInput, match="at: got"):
        recall_at(np.array([[1, 2]]), np.array([[1]]), at)


def test_recall_refuses_tables_that_do_not_fit():
    with pytest.raises(DataError, match="one row for each query"):
        recall_at(np.array([[1, 2]]), np.array([[1], [2]]), 1)
    with pytest.raises(DataError, match="no true neighbour"):
        recall_at(np.array([[1, 2]]), np.array([[-1]]), 1)
    with pytest.raises(DataError, match="found_distances"):
        recall_at(
            np.array([[1]]), np.array([[1]]), 1, found_distances=np.zeros((1, 2)), true_distances=np.zeros((1, 1))
        )


def test_quantization_error_by_hand():
    vectors = np.array([[0.0, 0.0], [2.0, 4.0]])
    # The mean is (1, 2), so the variance adds up to 2 * (1 + 4) = 10; the error is 1 + 0.
    assert quantization_error(vectors, np.array([[0.0, 1.0], [2.0, 4.0]])) == pytest.approx(0.1)
    assert quantization_error(vectors, vectors) == 0.0
    assert quantization_error(vectors, np.array([[1.0, 2.0], [1.0, 2.0]])) == pytest.approx(1.0)


def test_quantization_error_refuses_what_has_no_variance():
    with pytest.raises(DataError, match="must not all be the same"):
        quantization_error(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(DataError, match="decoded"):
        quantization_error(np.ones((3, 2)), np.ones((2, 2)))
