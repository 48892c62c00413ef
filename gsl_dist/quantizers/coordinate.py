"""How one coordinator trains a codebook over rows that others hold.

The coordinator is a generator: it yields an `Ask` (the codebook so far, and what it wants to know), receives one
answer from each worker in the order of their ranks, and returns the trained codebook. It sees statistics and a bounded
sample, never the rows. The same generator runs in this process (`train_codebook`), behind a Ray actor between the
epochs of a training, and over a whole corpus: who carries the messages is not known here.
"""

# Shapes: N rows of one worker, D dims

from __future__ import annotations

import functools
import operator
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray
from gsl_dist.config import Strict
from gsl_dist.errors import DataError
from gsl_dist.quantizers.base import Quantizer

_SEEDS_PER_CENTROID, _MIN_SEEDS = 32, 4096


class LloydConfig(Strict):
    """How a codebook is fitted."""

    iterations: int = Field(default=20, ge=1, description="Lloyd's iterations for each part of a new codebook")
    refresh_iterations: int = Field(default=5, ge=1, description="the same, when it starts from an older codebook")
    sample_rows: int = Field(default=262_144, ge=1, description="rows of the corpus that take part, at most")


@dataclass(frozen=True)
class Ask:
    """One question of the coordinator to every worker.

    Args:
        what: `sample` wants rows to start from, `stats` an assignment, `moments` the spread of the rows.
        codebook: the codebook so far.
        phase: the part of it that is being trained.
    """

    what: Literal["sample", "stats", "moments"]
    codebook: Codebook
    phase: str


@dataclass(frozen=True)
class Trained:
    """A trained codebook and its mean squared error relative to the variance of the rows."""

    codebook: Codebook
    relative_error: float


@dataclass(frozen=True)
class Rows:
    """The rows that one worker answers for: `x_ND` is `[start, start + N)` of `total` rows."""

    x_ND: Tensor
    start: int
    total: int


Coordination = Generator[Ask, list[Any], Trained]


def coordinate(quantizer: Quantizer, lloyd: LloydConfig, *, seed: int, start: Codebook | None = None) -> Coordination:
    """Train a codebook by asking; a `start` codebook is refined, otherwise one is begun from a sample.

    Raises:
        DataError: the workers hold too few rows, or rows without any spread.
    """
    codebook = quantizer.blank() if start is None else start
    rng = np.random.default_rng(seed)
    moments = yield Ask("moments", codebook, "")
    variance = _measure_variance(moments, quantizer.min_rows)
    for phase in quantizer.phases:
        if start is None:
            samples = yield Ask("sample", codebook, phase)
            codebook = quantizer.seed(codebook, phase, np.concatenate(samples), rng)
        for _ in range(lloyd.iterations if start is None else lloyd.refresh_iterations):
            answers = yield Ask("stats", codebook, phase)
            codebook = quantizer.update(codebook, phase, functools.reduce(operator.add, answers))
    answers = yield Ask("stats", codebook, "books")
    return Trained(codebook, functools.reduce(operator.add, answers).mean_error / variance)


def answer(ask: Ask, rows: Rows, quantizer: Quantizer) -> Any:
    """Answer the coordinator for the rows of one worker."""
    if ask.what == "stats":
        return quantizer.assign(rows.x_ND, ask.codebook, ask.phase)
    if ask.what == "sample":
        return _take_sample(rows, quantizer.min_rows)
    x_ND = rows.x_ND.double()
    return len(x_ND), x_ND.sum(0).cpu().numpy(), float(x_ND.square().sum())


def train_codebook(
    x_ND: Tensor, quantizer: Quantizer, lloyd: LloydConfig, *, seed: int = 0, start: Codebook | None = None
) -> Trained:
    """Train a codebook over rows that are all here.

    Shapes: x_ND (N, D) float32.
    """
    rows = Rows(x_ND, 0, len(x_ND))
    coordination = coordinate(quantizer, lloyd, seed=seed, start=start)
    ask = next(coordination)
    while True:
        try:
            ask = coordination.send([answer(ask, rows, quantizer)])
        except StopIteration as end:
            trained: Trained = end.value
            return trained


def _take_sample(rows: Rows, centroids: int) -> FloatArray:
    # The sample is a fixed set of global row numbers, of which each worker gives those it has: the same set however
    # the rows are divided.
    count = min(rows.total, max(_MIN_SEEDS, _SEEDS_PER_CENTROID * centroids))
    chosen = np.unique(np.linspace(0, rows.total - 1, count).astype(np.int64)) - rows.start
    sample: FloatArray = rows.x_ND[chosen[(chosen >= 0) & (chosen < len(rows.x_ND))]].cpu().numpy()
    return sample


def _measure_variance(moments: list[tuple[int, Any, float]], min_rows: int) -> float:
    counts, sums, squares = zip(*moments, strict=True)
    count, mean = sum(counts), np.sum(sums, axis=0) / max(1, sum(counts))
    if count < min_rows:
        raise DataError("training rows", count, f"a codebook with {min_rows} centroids needs at least as many rows")
    variance = sum(squares) / count - float(mean @ mean)
    if not np.isfinite(variance) or variance <= 1e-12 * max(1.0, float(mean @ mean)):
        raise DataError("training rows", f"variance {variance:.3g}", "rows must be finite and differ from one another")
    return variance
