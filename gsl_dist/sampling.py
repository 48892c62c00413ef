"""Which rows meet in which step: the same plan for any number of workers.

The plan of an epoch depends on the seed and the epoch alone. Every worker makes the same plan and takes its own slice
of each step, in the order of the ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gsl_dist.errors import ConfigError

Rows = NDArray[np.int64]


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


def check_batches(rows: int, classes: int, *, batch_size: int, samples_per_class: int | None, workers: int) -> None:
    """Refuse a plan that cannot be carried out, before any work starts.

    Raises:
        ConfigError: too few rows for one step, or a step that does not divide over workers or classes.
    """
    if rows < batch_size:
        raise ConfigError("fit.batch_size", batch_size, f"the corpus has {rows} rows; a step needs that many at most")
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


def _draw_step(members: list[Rows], batch_size: int, samples: int, rng: np.random.Generator) -> Rows:
    chosen = rng.choice(len(members), batch_size // samples, replace=False)
    drawn = [rng.choice(members[c], samples, replace=len(members[c]) < samples) for c in chosen]
    return np.concatenate(drawn)
