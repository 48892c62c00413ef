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
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray
from gsl_dist.errors import DataError
from gsl_dist.quantizers.base import LloydConfig, Quantizer

_SEEDS_PER_CENTROID, _MIN_SEEDS = 32, 4096


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


@dataclass
class Rows:
    """The rows that one worker answers for: `x_ND` is `[start, start + N)` of `total` rows.

    Args:
        prepared: what the quantizer made of them for the phase that is being trained, and that phase.
    """

    x_ND: Tensor
    start: int
    total: int
    prepared: tuple[str, Any] | None = None


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
    phase = ""
    for phase, iterations in quantizer.plan(lloyd, refine=start is not None):
        if start is None:
            samples = torch.from_numpy(np.concatenate((yield Ask("sample", codebook, phase))))
            codebook = quantizer.seed(codebook, phase, quantizer.prepare(samples, codebook, phase), rng)
        for iteration in range(iterations):
            answers = yield Ask("stats", codebook, phase)
            codebook = quantizer.update(codebook, phase, functools.reduce(operator.add, answers))
            if phase == "anneal":
                codebook = shake_books(codebook, 1 - (iteration + 1) / iterations, rng)
    answers = yield Ask("stats", codebook, phase)
    return Trained(codebook, functools.reduce(operator.add, answers).mean_error / variance)


def shake_books(codebook: Codebook, left: float, rng: np.random.Generator) -> Codebook:
    """Move codewords at random, by less and less as the iterations that are `left` go from 1 to 0.

    With M books that add up to rows of a deviation s, codewords deviate by s / sqrt(M); noise of s / M is theirs over
    sqrt(M) again.

    Source: Martinez et al., LSQ++, ECCV 2018 (SR-D); the scale from the codewords themselves is ours.
    """
    deviation_D = codebook.books.std(axis=(0, 1)) * np.sqrt(left / codebook.sub_vectors)
    noise = rng.standard_normal(codebook.books.shape, dtype=np.float32) * deviation_D
    return replace(codebook, books=codebook.books + noise)


def answer(ask: Ask, rows: Rows, quantizer: Quantizer) -> Any:
    """Answer the coordinator for the rows of one worker."""
    if ask.what == "stats":
        if rows.prepared is None or rows.prepared[0] != ask.phase:
            rows.prepared = (ask.phase, quantizer.prepare(rows.x_ND, ask.codebook, ask.phase))
        return quantizer.assign(rows.prepared[1], ask.codebook, ask.phase)
    rows.prepared = None
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
