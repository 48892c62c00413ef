"""How one coordinator trains a codebook over rows that others hold.

The coordinator is a generator: it yields an `Ask` (the codebook so far, and what it wants to know), receives one
answer from each worker in the order of their ranks, and returns the trained codebook. It sees statistics and a bounded
sample, never the rows. The same generator runs in this process (`train_codebook`), behind a Ray actor between the
epochs of a training, and over a whole corpus: who carries the messages is not known here.

In each iteration the codebook goes to every worker and statistics come back: 8 bytes for each number of the codewords,
and in the phase of the cells `measure_cells` says how much. The sample has 16 rows for each centroid, and two where
there are many. With mini-batches a part of the rows answers for the cells in each iteration, another one every time,
until all have had their turn; a row's number says which part it belongs to, so that it does not matter who holds it.
Answers can be joined on their way, so that one place need not take in those of all workers.
"""

# Shapes: N rows of one worker, D dims, C cells, W workers

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gsl_dist.codebook import Codebook, FloatArray, IdArray
from gsl_dist.errors import DataError
from gsl_dist.quantizers.base import LloydConfig, Quantizer
from gsl_dist.quantizers.kmeans import MANY, Stats, add_stats, join_stats, revive_dead

_SEEDS_PER_CENTROID, _SEEDS_OF_MANY, _MIN_SEEDS, _MOST_CODEWORDS = 16, 2, 8192, 256
_SUM_ROWS, _SHAKE, _STRIDE = 1 << 16, 0.3, 1.8

Asked = Literal["sample", "stats", "moments"]
"""What workers are asked for."""


@dataclass(frozen=True)
class Turn:
    """One iteration of a phase.

    Args:
        number: which it is, from 0.
        of: how many there are.
        error: the mean squared error before it, relative to the variance; None where it is not known.
    """

    number: int
    of: int
    error: float | None


@dataclass(frozen=True)
class Ask:
    """One question of the coordinator to every worker.

    Args:
        what: `sample` wants rows to start from, `stats` an assignment, `moments` the spread of the rows.
        codebook: the codebook so far.
        phase: the part of it that is being trained.
        lloyd: how it is trained.
        turn: the iteration; None where all rows are meant.
    """

    what: Asked
    codebook: Codebook
    phase: str
    lloyd: LloydConfig
    turn: Turn | None = None


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
        numbers_N: the numbers of the rows, ascending, where some of `[start, ...)` are missing.
    """

    x_ND: Tensor
    start: int
    total: int
    prepared: tuple[str, Any] | None = None
    numbers_N: IdArray | None = None

    def __post_init__(self) -> None:
        if self.numbers_N is None:
            self.numbers_N = np.arange(self.start, self.start + len(self.x_ND))


Coordination = Generator[Ask, list[Any], Trained]


def coordinate(quantizer: Quantizer, lloyd: LloydConfig, *, seed: int, start: Codebook | None = None) -> Coordination:
    """Train a codebook by asking; a `start` codebook is refined, otherwise one is begun from a sample.

    Raises:
        DataError: the workers hold too few rows, or rows without any spread.
    """
    codebook = quantizer.blank() if start is None else start
    rng = np.random.default_rng(seed)
    moments = yield Ask("moments", codebook, "", lloyd)
    variance = _measure_variance(moments, quantizer.min_rows)
    phase = ""
    for phase, iterations in quantizer.plan(lloyd, refine=start is not None):
        if start is None:
            samples = torch.from_numpy(np.concatenate((yield Ask("sample", codebook, phase, lloyd))))
            codebook = quantizer.seed(codebook, phase, quantizer.prepare(samples, codebook, phase), rng)
        running, error = Running(codebook, count_batches(lloyd, phase)), None
        for number in range(iterations):
            answers = yield Ask("stats", codebook, phase, lloyd, Turn(number, iterations, error))
            stats = running.add(add_stats(answers))
            error = stats.mean_error / variance
            hastens = start is None and number + 1 < iterations and count_batches(lloyd, phase) == 1
            codebook = quantizer.update(codebook, phase, stats, _STRIDE if hastens else 1.0)
            if phase == "anneal":
                codebook = shake_books(codebook, 1 - (number + 1) / iterations, rng)
    answers = yield Ask("stats", codebook, phase, lloyd)
    return Trained(codebook, add_stats(answers).mean_error / variance)


class Running:
    """The statistics of cells over the last mini-batches, older ones fading away.

    With B batches, what was counted before keeps (B - 1) / B of its weight, so that all batches together weigh as much
    as the rows that there are. A cell is given up, and takes half of a full one's place, when less is left of its rows
    than of a single one that was counted while all had their turn. With one batch nothing is kept, and these are
    Lloyd's iterations.
    """

    def __init__(self, codebook: Codebook, batches: int) -> None:
        self._batches, self._kept = batches, None
        if batches > 1:
            # A starting centroid weighs as much as one row that lies there.
            self._kept = Stats(np.ones((1, codebook.cells)), codebook.coarse[None].astype(np.float64), 0.0, 0)

    def add(self, batch: Stats) -> Stats:
        """Give the statistics to update with, and go on from them."""
        if self._kept is None:
            return batch
        keep = 1 - 1 / self._batches
        counts = keep * self._kept.counts_GK + batch.counts_GK
        counts[counts < keep ** (self._batches - 0.5)] = 0
        sums = keep * self._kept.sums_GKd + batch.sums_GKd
        self._kept = revive_dead(Stats(counts, sums, batch.error, batch.rows))
        return self._kept


def count_batches(lloyd: LloydConfig, phase: str) -> int:
    """Give the number of iterations that it takes until every row had its turn."""
    return round(1 / lloyd.batch_share) if phase == "cells" else 1


def shake_books(codebook: Codebook, left: float, rng: np.random.Generator) -> Codebook:
    """Move codewords at random, by less and less as the iterations that are `left` go from 1 to 0.

    With M books that add up to rows of a deviation s, codewords deviate by s / sqrt(M); noise of s / M is theirs over
    sqrt(M) again. Books that begin as those of residual quantization are shaken by `_SHAKE` of it: by all of it, they
    lost what they began with.

    Source: Martinez et al., LSQ++, ECCV 2018 (SR-D); the scale from the codewords themselves is ours.
    """
    deviation_D = _SHAKE * codebook.books.std(axis=(0, 1)) * np.sqrt(left / codebook.sub_vectors)
    noise = rng.standard_normal(codebook.books.shape, dtype=np.float32) * deviation_D
    return replace(codebook, books=codebook.books + noise)


def answer(ask: Ask, rows: Rows, quantizer: Quantizer) -> Any:
    """Answer the coordinator for the rows of one worker."""
    if ask.what == "stats":
        if rows.prepared is None or rows.prepared[0] != ask.phase:
            rows.prepared = (ask.phase, quantizer.prepare(rows.x_ND, ask.codebook, ask.phase))
        batches = count_batches(ask.lloyd, ask.phase)
        prepared = rows.prepared[1]
        if ask.turn and batches > 1:
            prepared = prepared[:, _draw_batch(rows, ask.turn.number % batches, batches)]
        return quantizer.assign(prepared, ask.codebook, ask.phase, ask.lloyd.cell_search)
    rows.prepared = None
    if ask.what == "sample":
        return _take_sample(rows, _count_seeds(quantizer.min_rows, ask.phase))
    return _sum_moments(rows.x_ND)


def join_answers(what: Asked, answers: Sequence[Any]) -> Any:
    """Make one answer of those of several workers in the order of their ranks: it tells the coordinator the same."""
    if what == "stats":
        return join_stats(answers)
    if what == "sample":
        return np.concatenate(answers)
    counts, sums, squares = zip(*answers, strict=True)
    return sum(counts), np.sum(sums, axis=0), sum(squares)


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


def _count_seeds(centroids: int, phase: str) -> int:
    if phase != "cells":
        centroids = min(centroids, _MOST_CODEWORDS)
    return max(_MIN_SEEDS, (_SEEDS_PER_CENTROID if centroids <= MANY else _SEEDS_OF_MANY) * centroids)


def _take_sample(rows: Rows, count: int) -> FloatArray:
    # The sample is a fixed set of global row numbers, of which each worker gives those it has: the same set however
    # the rows are divided.
    assert rows.numbers_N is not None
    chosen = np.unique(np.linspace(0, rows.total - 1, min(rows.total, count)).astype(np.int64))
    held = chosen[np.isin(chosen, rows.numbers_N)]
    sample: FloatArray = rows.x_ND[np.searchsorted(rows.numbers_N, held)].cpu().numpy()
    return sample


def _draw_batch(rows: Rows, batch: int, batches: int) -> IdArray:
    # Multiplied by 2^64 over the golden ratio, numbers in a row fall into the batches as evenly as can be.
    assert rows.numbers_N is not None
    scattered = (rows.numbers_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return np.flatnonzero(scattered % np.uint64(batches) == batch)


def _sum_moments(x_ND: Tensor) -> tuple[int, FloatArray, float]:
    sums_D, squares = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device), 0.0
    for part in x_ND.split(_SUM_ROWS):
        sums_D += part.double().sum(0)
        squares += float(part.double().square().sum())
    return len(x_ND), sums_D.cpu().numpy(), squares


def _measure_variance(moments: list[tuple[int, Any, float]], min_rows: int) -> float:
    counts, sums, squares = zip(*moments, strict=True)
    count, mean = sum(counts), np.sum(sums, axis=0) / max(1, sum(counts))
    if count < min_rows:
        raise DataError("training rows", count, f"a codebook with {min_rows} centroids needs at least as many rows")
    variance = sum(squares) / count - float(mean @ mean)
    if not np.isfinite(variance) or variance <= 1e-12 * max(1.0, float(mean @ mean)):
        raise DataError("training rows", f"variance {variance:.3g}", "rows must be finite and differ from one another")
    return variance
