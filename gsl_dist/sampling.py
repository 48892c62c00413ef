"""Which rows meet in which step: the same plan for any number of workers.

The plan of an epoch depends on the seed and the epoch alone. Every worker makes the same plan and takes its own slice
of each step, in the order of the ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gsl_dist.errors import ConfigError
from gsl_dist.ranked import draw_batch

Rows = NDArray[np.int64]

_MEETING = 64


def plan_epoch(labels: Rows, batch_size: int, *, seed: int, epoch: int, samples_per_class: int | None = None) -> Rows:
    """Give the row numbers of every step of an epoch; rows that do not fill a last step wait for the next epoch.

    With `samples_per_class`, a step holds that many rows of each of its classes, drawn again where a class has fewer:
    for losses that need positives where classes are many.

    Shapes: labels (N,) int64 -> (steps, batch_size) int64.
    """
    rng = np.random.default_rng((seed, epoch))
    steps = len(labels) // batch_size
    if samples_per_class is None:
        return rng.permutation(len(labels))[: steps * batch_size].reshape(steps, batch_size)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.stack([_draw_step(members, batch_size, samples_per_class, rng) for _ in range(steps)])


def plan_neighbours(near_Nk: Tensor, batch_size: int, *, seed: int, epoch: int) -> Rows:
    """Give the row numbers of every step of an epoch in which rows meet their neighbours.

    A step holds some rows at random, each with its nearest and some of its near misses, and is filled up at random; no
    row is in it twice. An epoch has as many steps as would show every row once.

    Shapes: near_Nk (N, k) int64, the neighbours of each row -> (steps, batch_size) int64.
    """
    rng = np.random.default_rng((seed, epoch))
    return np.stack([_draw_meeting(near_Nk, batch_size, rng) for _ in range(len(near_Nk) // batch_size)])


def check_batches(rows: int, classes: int, *, batch_size: int, samples_per_class: int | None, workers: int) -> None:
    """Refuse a plan that cannot be carried out, before any work starts.

    Raises:
        ConfigError: too few rows for one step, or a step that does not divide over workers or classes.
    """
    if rows < batch_size:
        raise ConfigError("fit.batch_size", batch_size, f"there are {rows} rows to train on, a step has no more")
    if batch_size % workers:
        raise ConfigError("fit.batch_size", batch_size, f"it must divide over resources.workers, {workers}")
    if samples_per_class is None:
        return
    if batch_size % samples_per_class:
        raise ConfigError("fit.samples_per_class", samples_per_class, f"it must divide fit.batch_size, {batch_size}")
    if batch_size // samples_per_class > classes:
        least = -(-batch_size // classes)
        raise ConfigError(
            "fit.samples_per_class", samples_per_class, f"with {classes} classes it must be {least} or more"
        )


def check_meetings(rows: int, *, batch_size: int, samples_per_class: int | None, workers: int) -> None:
    """Refuse a plan of neighbours that cannot be carried out, before any work starts.

    Raises:
        ConfigError: as for `check_batches`, or a step has no place for one row and its neighbours.
    """
    if samples_per_class is not None:
        raise ConfigError("fit.samples_per_class", samples_per_class, "a loss of neighbours knows no classes")
    if batch_size < _MEETING:
        raise ConfigError("fit.batch_size", batch_size, f"a row and its neighbours take {_MEETING} rows of a step")
    check_batches(rows, 0, batch_size=batch_size, samples_per_class=None, workers=workers)


def _draw_step(members: list[Rows], batch_size: int, samples: int, rng: np.random.Generator) -> Rows:
    chosen = rng.choice(len(members), batch_size // samples, replace=False)
    drawn = [rng.choice(members[c], samples, replace=len(members[c]) < samples) for c in chosen]
    return np.concatenate(drawn)


def _draw_meeting(near_Nk: Tensor, batch_size: int, rng: np.random.Generator) -> Rows:
    drawn = draw_batch(near_Nk, batch_size, rng).numpy()
    others = np.setdiff1d(np.arange(len(near_Nk)), drawn, assume_unique=True)
    return np.concatenate([drawn, rng.choice(others, batch_size - len(drawn), replace=False)])
