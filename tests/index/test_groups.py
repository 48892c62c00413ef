import itertools

import numpy as np
import pytest
from reference import connect_in_loops

from gsl_dist.index.groups import find_groups, gather_ids


def stream_in_pieces(pairs, size):
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    return lambda: ((pairs[at : at + size, 0], pairs[at : at + size, 1]) for at in range(0, len(pairs), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("count", [0, 1, 40, 150, 600])
def test_groups_are_what_a_walk_over_all_pairs_connects(count, size):
    rng = np.random.default_rng(count)
    pairs = rng.integers(300, size=(count, 2)) * 10**15
    ids, groups = find_groups(stream_in_pieces(pairs, size))
    assert dict(zip(ids.tolist(), groups.tolist(), strict=True)) == connect_in_loops(pairs.tolist())
    assert ids.tolist() == sorted(set(pairs.ravel().tolist()))


def test_the_order_of_pairs_changes_nothing():
    rng = np.random.default_rng(0)
    pairs = rng.integers(200, size=(150, 2))
    first = find_groups(stream_in_pieces(pairs, 10))
    for _ in range(5):
        shuffled = rng.permutation(np.where(rng.random((150, 1)) < 0.5, pairs, pairs[:, ::-1]))
        for one, other in zip(first, find_groups(stream_in_pieces(shuffled, 13)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("way", ["rising", "falling", "shuffled"])
def test_a_long_chain_is_one_group_and_takes_no_time(way):
    chain = np.array(list(itertools.pairwise(range(200_000))))
    order = {"rising": slice(None), "falling": slice(None, None, -1)}
    pairs = chain[order[way]] if way in order else np.random.default_rng(0).permutation(chain)
    ids, groups = find_groups(stream_in_pieces(pairs, 5_000))
    assert len(ids) == 200_000 and not groups.any()


def test_ids_are_gathered_once_each_from_many_pieces():
    rng = np.random.default_rng(0)
    pairs = rng.integers(10_000, size=(5_000, 2))
    np.testing.assert_array_equal(gather_ids(stream_in_pieces(pairs, 11)()), np.unique(pairs))
