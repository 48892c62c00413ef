"""Plans of an epoch: the same steps for any number of workers, and what cannot be carried out is refused."""

import numpy as np
import pytest
import torch

from gsl_dist.errors import ConfigError
from gsl_dist.ranked import find_neighbours
from gsl_dist.sampling import check_batches, check_meetings, plan_epoch, plan_neighbours

LABELS = np.random.default_rng(0).integers(10, size=205)
NEAR = find_neighbours(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)), 100)


def plan(labels=LABELS, batch_size=24, seed=0, epoch=0, samples_per_class=None):
    return plan_epoch(labels, batch_size, seed=seed, epoch=epoch, samples_per_class=samples_per_class)


def check(rows=100, classes=10, **settings):
    check_batches(rows, classes, **{"batch_size": 20, "samples_per_class": None, "workers": 1} | settings)


@pytest.mark.parametrize("samples_per_class", [None, 4])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 8, 12, 24])
def test_slices_of_any_number_of_workers_make_up_the_same_steps(workers, samples_per_class):
    slices = [np.split(plan(samples_per_class=samples_per_class), workers, axis=1)[rank] for rank in range(workers)]
    assert np.array_equal(np.concatenate(slices, axis=1), plan(samples_per_class=samples_per_class))


def test_an_epoch_meets_no_row_twice_and_leaves_out_less_than_a_step():
    steps = plan()
    assert steps.shape == (8, 24) and steps.dtype == np.int64
    assert len(np.unique(steps)) == 192 and steps.min() >= 0 and steps.max() < 205


def test_one_step_of_all_rows_is_a_permutation():
    assert np.array_equal(np.sort(plan(batch_size=205)[0]), np.arange(205))


@pytest.mark.parametrize("samples_per_class", [None, 4])
def test_seed_and_epoch_alone_decide_the_plan(samples_per_class):
    first = plan(seed=1, epoch=2, samples_per_class=samples_per_class)
    assert np.array_equal(first, plan(seed=1, epoch=2, samples_per_class=samples_per_class))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(first, plan(seed=seed, epoch=epoch, samples_per_class=samples_per_class))


@pytest.mark.parametrize("samples_per_class", [3, 4, 8, 24])
def test_every_step_holds_that_many_rows_of_each_of_its_classes(samples_per_class):
    steps = plan(samples_per_class=samples_per_class)
    assert steps.shape == (8, 24)
    for step in steps:
        _, counts = np.unique(LABELS[step], return_counts=True)
        assert counts.tolist() == [samples_per_class] * (24 // samples_per_class)
        assert len(np.unique(step)) == 24 or samples_per_class == 24


def test_a_class_with_too_few_rows_is_drawn_again():
    labels = np.array([0] * 2 + [7] * 30)
    steps = plan(labels, batch_size=16, samples_per_class=8)
    for step in steps:
        assert np.bincount(labels[step], minlength=8)[[0, 7]].tolist() == [8, 8]
        assert len(np.unique(step[labels[step] == 7])) == 8


@pytest.mark.parametrize("batch_size", [64, 100, 256, 1000])
def test_steps_of_neighbours_hold_as_many_rows_as_asked_for_each_once(batch_size):
    steps = plan_neighbours(NEAR, batch_size, seed=0, epoch=0)
    assert steps.shape == (1000 // batch_size, batch_size) and steps.dtype == np.int64
    assert steps.min() >= 0 and steps.max() < 1000
    assert all(len(np.unique(step)) == batch_size for step in steps)


def test_rows_meet_their_nearest_and_near_misses_far_more_often_than_by_chance():
    for step in plan_neighbours(NEAR, 128, seed=0, epoch=0):
        met = np.isin(NEAR.numpy(), step)[step]
        seeds = met[:, :31].all(1)
        assert seeds.sum() >= 2 and met[seeds, 31:].sum(1).min() >= 32
        assert met[:, :10].mean() > 2 * 128 / 1000


def test_seed_and_epoch_alone_decide_a_plan_of_neighbours():
    first, *others = (plan_neighbours(NEAR, 128, seed=seed, epoch=epoch) for seed, epoch in ((1, 2), (1, 3), (2, 2)))
    assert np.array_equal(first, plan_neighbours(NEAR, 128, seed=1, epoch=2))
    assert not any(np.array_equal(first, other) for other in others)


def test_an_epoch_of_neighbours_shows_most_rows():
    assert len(np.unique(plan_neighbours(NEAR, 128, seed=0, epoch=0))) > 500


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rows": 99}, "fit.batch_size"),
        ({"batch_size": 63}, "fit.batch_size"),
        ({"workers": 3}, "fit.batch_size"),
        ({"samples_per_class": 4}, "fit.samples_per_class"),
    ],
)
def test_a_plan_of_neighbours_that_cannot_be_carried_out_is_refused_by_its_field(settings, field):
    asked = {"rows": 100, "batch_size": 100, "samples_per_class": None, "workers": 1}
    check_meetings(**asked)
    with pytest.raises(ConfigError) as error:
        check_meetings(**asked | settings)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rows": 19}, "fit.batch_size"),
        ({"workers": 3}, "fit.batch_size"),
        ({"samples_per_class": 3}, "fit.samples_per_class"),
        ({"samples_per_class": 4, "classes": 4}, "fit.samples_per_class"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_by_its_field(settings, field):
    with pytest.raises(ConfigError) as error:
        check(**settings)
    assert error.value.field == field


def test_a_refusal_names_the_least_samples_per_class():
    with pytest.raises(ConfigError, match="with 4 classes it must be 5 or more"):
        check(samples_per_class=2, classes=4)
    check(samples_per_class=5, classes=4)


@pytest.mark.parametrize("settings", [{}, {"rows": 20}, {"workers": 4}, {"samples_per_class": 2}])
def test_a_plan_that_can_be_carried_out_is_not_refused(settings):
    check(**settings)
