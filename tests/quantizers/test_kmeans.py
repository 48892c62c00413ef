"""Lloyd's iterations by statistics that add, against loops."""

import itertools

import numpy as np
import pytest
import torch
from reference import lloyd_in_loops

from gsl_dist.quantizers import kmeans
from gsl_dist.quantizers.kmeans import Stats, find_nearest, measure_stats, seed_centroids, update_centroids


def make_rows(*, groups=2, rows=60, words=5, dims=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(groups, rows, dims, generator=draw), torch.randn(groups, words, dims, generator=draw)


def assert_equal_stats(one, other):
    assert np.array_equal(one.counts_GK, other.counts_GK) and one.rows == other.rows
    np.testing.assert_allclose(one.sums_GKd, other.sums_GKd, atol=1e-12)
    assert one.error == pytest.approx(other.error, rel=1e-6)


@pytest.mark.parametrize("sizes", [[60], [30, 30], [1, 59], [0, 60], [10, 7, 23, 20], [1] * 60])
def test_shard_stats_sum_to_whole(sizes):
    x, centroids = make_rows()
    first, *others = [measure_stats(part, centroids) for part in x.split(sizes, dim=1)]
    assert_equal_stats(sum(others, start=first), measure_stats(x, centroids))


def test_stats_add_in_any_order():
    x, centroids = make_rows()
    a, b, c = (measure_stats(part, centroids) for part in x.split(20, dim=1))
    assert_equal_stats(a + (b + c), (c + a) + b)


def test_stats_and_update_equal_a_loop_lloyd_step():
    x, centroids = make_rows()
    stats = measure_stats(x, centroids)
    moved, errors = update_centroids(centroids.numpy(), stats), 0.0
    for group in range(2):
        slow, labels, distances = lloyd_in_loops(x[group].tolist(), centroids[group].tolist())
        assert None not in slow
        np.testing.assert_allclose(moved[group], slow, atol=1e-6)
        assert stats.counts_GK[group].tolist() == [labels.count(word) for word in range(5)]
        errors += sum(distances)
    assert stats.error == pytest.approx(errors, rel=1e-5)
    assert stats.mean_error == pytest.approx(errors / 60, rel=1e-5)
    assert moved.dtype == np.float32


def test_nearest_equals_brute_force_and_ties_go_to_the_lowest_index():
    x, centroids = make_rows(rows=200, words=16)
    centroids[:, 9] = centroids[:, 4]
    labels, distances = find_nearest(x, centroids)
    plain = (x[:, :, None] - centroids[:, None]).square().sum(-1)
    assert torch.equal(labels, plain.argmin(-1)) and not (labels == 9).any() and (labels == 4).any()
    torch.testing.assert_close(distances, plain.min(-1).values, atol=1e-5, rtol=1e-4)


def test_nearest_in_chunks_equals_nearest_at_once(monkeypatch):
    x, centroids = make_rows(rows=100)
    labels, distances = find_nearest(x, centroids)
    monkeypatch.setattr(kmeans, "_CHUNK_FLOATS", 70)
    in_chunks = find_nearest(x, centroids)
    assert torch.equal(in_chunks[0], labels)
    torch.testing.assert_close(in_chunks[1], distances)


def test_distances_are_never_negative():
    x = torch.full((1, 50, 8), 1000.0) + torch.rand(1, 50, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert (find_nearest(x, x[:, :5])[1] >= 0).all()


def test_a_step_without_dead_centroids_never_raises_the_error():
    x, centroids = make_rows(rows=300, words=8)
    errors = []
    for _ in range(12):
        stats = measure_stats(x, centroids)
        assert (stats.counts_GK > 0).all()
        errors.append(stats.error)
        centroids = torch.tensor(update_centroids(centroids.numpy(), stats))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_a_dead_centroid_is_revived_beside_the_fullest():
    x, centroids = make_rows(rows=300, words=8)
    centroids[:, 2] = 1e3
    stats = measure_stats(x, centroids)
    moved = update_centroids(centroids.numpy(), stats)
    revived = measure_stats(x, torch.tensor(moved))
    assert (stats.counts_GK[:, 2] == 0).all() and (revived.counts_GK > 0).all()
    for group in range(2):
        slow, _, _ = lloyd_in_loops(x[group].tolist(), centroids[group].tolist())
        fullest = int(stats.counts_GK[group].argmax())
        for word in (2, fullest):
            np.testing.assert_allclose(moved[group, word], slow[fullest], rtol=2e-3)
        others = [word for word in range(8) if word not in (2, fullest)]
        np.testing.assert_allclose(moved[group, others], [slow[word] for word in others], atol=1e-6)


@pytest.mark.parametrize("dead", [3, 6, 7])
def test_every_step_leaves_fewer_dead_centroids_until_none_are_left(dead):
    x, centroids = make_rows(rows=300, words=8)
    centroids[:, :dead] = 1e3
    lost = [np.array([dead, dead])]
    for _ in range(4):
        centroids = torch.tensor(update_centroids(centroids.numpy(), measure_stats(x, centroids)))
        lost.append((measure_stats(x, centroids).counts_GK == 0).sum(axis=1))
        assert ((lost[-1] < lost[-2]) | (lost[-1] == 0)).all()
    assert not lost[-1].any()


@pytest.mark.parametrize("dead", [1, 3, 6])
def test_reviving_raises_the_error_by_no_more_than_the_nudge(dead):
    x, centroids = make_rows(rows=300, words=8)
    centroids[:, :dead] = 1e3
    before = measure_stats(x, centroids)
    # A row is as near to one of c + nudge and c - nudge as to c, up to |nudge|^2; `dead` splits may nest.
    nudge = dead * 300 * np.square(centroids[:, dead:].numpy() / 1000).sum()
    after = measure_stats(x, torch.tensor(update_centroids(centroids.numpy(), before)))
    assert after.error <= before.error + nudge


def test_a_centroid_of_one_row_is_not_split():
    centroids = np.array([[[0.0, 1.0], [5.0, 5.0], [9.0, 9.0]]], dtype=np.float32)
    stats = measure_stats(torch.tensor([[[0.0, 2.0], [5.0, 6.0]]]), torch.tensor(centroids))
    assert update_centroids(centroids, stats).tolist() == [[[0, 2], [5, 6], [9, 9]]]


def test_update_leaves_its_arguments_alone():
    x, centroids = make_rows()
    centroids[:, 0] = 1e3
    stats, before = measure_stats(x, centroids), centroids.clone()
    counts, sums = stats.counts_GK.copy(), stats.sums_GKd.copy()
    update_centroids(centroids.numpy(), stats)
    assert torch.equal(centroids, before)
    assert np.array_equal(stats.counts_GK, counts) and np.array_equal(stats.sums_GKd, sums)


def test_no_rows_give_stats_of_nothing():
    _, centroids = make_rows()
    stats = measure_stats(torch.zeros(2, 0, 3), centroids)
    assert_equal_stats(stats, Stats(np.zeros((2, 5)), np.zeros((2, 5, 3)), 0.0, 0))
    assert stats.mean_error == 0


def test_seeds_are_distinct_sample_rows_and_depend_on_the_generator_alone():
    sample = make_rows(rows=50)[0].numpy()
    seeds = seed_centroids(sample, 20, np.random.default_rng(3))
    for group in range(2):
        rows = {row.tobytes() for row in sample[group]}
        chosen = {row.tobytes() for row in seeds[group]}
        assert len(chosen) == 20 and chosen <= rows
    assert np.array_equal(seeds, seed_centroids(sample, 20, np.random.default_rng(3)))
    assert not np.array_equal(seeds, seed_centroids(sample, 20, np.random.default_rng(4)))


def test_seeds_reach_every_far_cluster():
    rng = np.random.default_rng(0)
    centres = np.arange(8)[:, None] * np.array([100.0, -100.0])
    sample = (centres[:, None] + rng.normal(size=(8, 20, 2))).reshape(1, 160, 2).astype(np.float32)
    seeds = seed_centroids(sample, 8, rng)
    assert sorted(np.round(seeds[0, :, 0] / 100).astype(int)) == list(range(8))


def test_fewer_distinct_rows_than_centroids_still_seed():
    sample = np.repeat(np.eye(3, dtype=np.float32)[None], 4, axis=1)
    seeds = seed_centroids(sample, 8, np.random.default_rng(0))
    assert seeds.shape == (1, 8, 3) and {tuple(row) for row in seeds[0]} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
