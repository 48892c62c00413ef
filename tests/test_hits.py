import numpy as np
import pytest
from reference import merge_by_sorting

from gsl_dist.hits import FAR, NO_ID, Hits, merge_topk


def make_answers(splits, *, queries=6, k=5, items=40, seed=0, distinct=4):
    """The k nearest of each part of a split, with many equal distances."""
    rng = np.random.default_rng(seed)
    all_distances = rng.integers(distinct, size=(queries, items)).astype(np.float32)
    answers = []
    for part in np.array_split(rng.permutation(items), splits):
        ids, distances = np.full((queries, k), NO_ID), np.full((queries, k), FAR, np.float32)
        for query in range(queries):
            best = sorted((all_distances[query, item], item) for item in part)[:k]
            for place, (distance, item) in enumerate(best):
                ids[query, place], distances[query, place] = item, distance
        answers.append(Hits(ids, distances, 1, splits, "v1"))
    return answers


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_merging_equals_sorting_everything(splits, k):
    answers = make_answers(splits)
    merged = merge_topk(answers, k)
    pairs = [
        list(zip(distances, ids, strict=True))
        for ids, distances in zip(merged.ids.tolist(), merged.distances.tolist(), strict=True)
    ]
    assert pairs == merge_by_sorting(answers, k)
    assert merged.ids.dtype == np.int64 and merged.distances.dtype == np.float32


@pytest.mark.parametrize("distinct", [1, 4, 1000])
def test_the_result_does_not_depend_on_the_split(distinct):
    one = merge_topk(make_answers(1, distinct=distinct), 5)
    for splits in (2, 3, 7, 40):
        answers = make_answers(splits, distinct=distinct)
        for order in (answers, answers[::-1]):
            merged = merge_topk(order, 5)
            assert np.array_equal(merged.ids, one.ids) and np.array_equal(merged.distances, one.distances)


def test_merging_of_merged_equals_merging_at_once():
    answers = make_answers(7)
    nested = merge_topk([merge_topk(answers[:3], 5), merge_topk(answers[3:], 5)], 5)
    at_once = merge_topk(answers, 5)
    assert np.array_equal(nested.ids, at_once.ids) and nested.shards_answered == at_once.shards_answered == 7


def test_empty_places_come_last_even_behind_the_farthest_hit():
    some = Hits(np.array([[-1, -1]]), np.array([[FAR, FAR]], np.float32), 1, 2)
    other = Hits(np.array([[3, -1]]), np.array([[FAR, FAR]], np.float32), 1, 2)
    for answers in ([some, other], [other, some]):
        assert merge_topk(answers, 3).ids.tolist() == [[3, -1, -1]]


def test_fewer_hits_than_asked_for_are_filled_up():
    merged = merge_topk(make_answers(2, k=2), 9)
    assert merged.ids.shape == merged.distances.shape == (6, 9)
    assert (merged.ids[:, 4:] == NO_ID).all() and (merged.distances[:, 4:] == FAR).all()
    assert (merged.ids[:, :4] != NO_ID).all()


def test_no_queries_merge_to_no_rows():
    empty = Hits(np.empty((0, 3), np.int64), np.empty((0, 3), np.float32), 1, 1)
    assert merge_topk([empty, empty], 3).ids.shape == (0, 3)


@pytest.mark.parametrize("answered, total, partial", [(2, 3, True), (3, 3, False), (0, 3, True)])
def test_an_answer_says_whether_it_is_partial(answered, total, partial):
    answers = make_answers(3)
    hits = Hits(answers[0].ids, answers[0].distances, answered, total)
    assert hits.is_partial is partial


def test_merging_counts_the_shards_that_answered():
    answers = make_answers(4)
    merged = merge_topk(answers[:3], 5)
    assert (merged.shards_answered, merged.shards_total, merged.is_partial, merged.version) == (3, 4, True, "v1")
    assert not merge_topk(answers, 5).is_partial


def test_hits_unpack_like_the_pair_that_faiss_gives():
    hits = make_answers(1)[0]
    distances, ids = hits
    assert distances is hits.distances and ids is hits.ids and len(hits) == 6
