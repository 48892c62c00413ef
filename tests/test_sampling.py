"""Plans of an epoch: the same steps for any number of workers, and what cannot be carried out is refused."""

import numpy as np
import pytest

from gsl_dist.errors import ConfigError
from gsl_dist.sampling import check_batches, plan_epoch

LABELS = np.random.default_rng(0).integers(10, size=205)


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
