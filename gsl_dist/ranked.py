"""Codewords that learn to rank, of a codebook that was fitted to lower the quantization error.

They follow the gradient of a listwise loss on the very distances that the index will compute, between a query as it is
and what an item's code stands for. What a query wants is one of two:

    Mined    vectors that somebody's model gave, without labels: the rows that are nearest by squared L2, mined once
    Viewed   what a network gives, with labels: the rows of its class. Rows that a network learned from are better
             placed than others will be, so both query and item are seen as training sees them, with dropout

Two steps take turns:

    learn    codes fixed, codewords lower  listwise + misfit: a row as query tells what it wants from the rest of the
             batch, near misses among it, by the softmax of score / temperature
    encode   codes are searched for anew, as the quantizer does

and at the end codewords are learned without the second term. What scores are is a choice:

    exact    -|q - x^|^2 / 2, the misfit is |x - x^|^2. Kind, index and search stay what they were.
    tables   the codebook becomes a composite one (`gsl_dist.quantizers.composite`): score and misfit J are as told
             there. Additive codes are then searched as fast as product codes.

Cells are left as they are. The codewords before the last learning stay in the codebook as its `landing`: codes are
found by them, whatever the row, and stand for the codewords that were learned last. This module knows neither files nor
how many machines there are.
"""

# Shapes: N rows, D dims, M books, K codewords, B rows of a batch, k neighbours

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.errors import BadInput
from gsl_dist.quantizers import find_anchors, open_quantizer, rotate
from gsl_dist.quantizers.composite import compose, measure_misfit

POSITIVES = 10
_CHUNK_FLOATS = 1 << 23
_NEAR, _FAR = 31, 32
_PACE, _MEASURED = 1e-3, 16_384


class RankedConfig(Strict):
    """How codewords learn to rank."""

    scores: Literal["exact", "tables"] = Field(
        default="exact",
        description="distances to decoded vectors, or look-ups alone",
    )
    rounds: int = Field(default=2, ge=0, description="turns of learning and encoding")
    steps: int = Field(default=80, ge=1, description="gradient steps of a turn")
    last_steps: int = Field(default=300, ge=0, description="gradient steps at the end, codes fixed for good")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="for vectors of mean squared length 1; None: a thousandth of the root mean squared misfit",
    )
    batch_rows: int = Field(default=1024, ge=64, description="rows that meet in a step, about")
    fidelity: float = Field(default=1.0, ge=0, description="weight of the quantization error in a turn")
    temperature: float = Field(default=0.03, gt=0, description="of the softmax at first; it is learned")
    softness: float = Field(default=0.1, gt=0, description="width of the border of true neighbours, in their distance")
    neighbours: int = Field(default=200, ge=POSITIVES, description="nearest rows mined for each row")
    sample_rows: int = Field(default=65_536, ge=1, description="rows to learn from, at most; mining looks at all pairs")
    held_rows: int = Field(default=1000, ge=1, description="rows kept apart, as queries to measure the gain with")


class Lesson(NamedTuple):
    """A batch to learn from.

    Args:
        asked_BD: the queries.
        rows_B: the numbers of the items.
        wanted_BB: how much each query wants each item; nothing of the item that it is itself.

    Shapes: asked (B, D) float32, rows (B,) int64, wanted (B, B) float32.
    """

    asked_BD: Tensor
    rows_B: Tensor
    wanted_BB: Tensor


@dataclass(frozen=True)
class Mined:
    """Rows and who is nearest to each, nearest first, without the row itself.

    Shapes: x_ND (N, D) float32; near_Nk (N, k) int64.
    """

    x_ND: Tensor
    near_Nk: Tensor

    @cached_property
    def energy(self) -> float:
        """Give the mean squared length of the rows: rates and temperatures are meant for 1."""
        return float(self.x_ND.square().sum(1).mean())

    def draw(self, config: RankedConfig, rng: np.random.Generator) -> Lesson:
        """Give a batch of rows, each as query and as item."""
        rows_B = draw_batch(self.near_Nk, config.batch_rows, rng)
        x_BD = self.x_ND[rows_B]
        return Lesson(x_BD, rows_B, want_neighbours(x_BD, self.reach(rows_B), config.softness))

    def reach(self, rows_B: Tensor) -> Tensor:
        """Give the squared distance of rows to their tenth neighbour: how far a true neighbour may be."""
        tenth_BD = self.x_ND[self.near_Nk[rows_B, POSITIVES - 1]]
        return (self.x_ND[rows_B] - tenth_BD).square().sum(1).clamp_min(1e-6)


@dataclass(frozen=True)
class Viewed:
    """Rows as training sees them, several times over, and their labels.

    Shapes: views_VND (V, N, D) float32; labels_N (N,) integers.
    """

    views_VND: Tensor
    labels_N: Tensor

    @property
    def x_ND(self) -> Tensor:  # noqa: N802 - the name says the shape
        """Give all views, one after another, (V x N, D)."""
        return self.views_VND.flatten(0, 1)

    @cached_property
    def energy(self) -> float:
        """Give the mean squared length of the rows: rates and temperatures are meant for 1."""
        return float(self.x_ND.square().sum(1).mean())

    def draw(self, config: RankedConfig, rng: np.random.Generator) -> Lesson:
        """Give a batch of rows drawn at random, in one view as query and in another as item."""
        views, rows, _ = self.views_VND.shape
        rows_B = torch.from_numpy(rng.choice(rows, min(rows, config.batch_rows), replace=False))
        asked_B, item_B = torch.from_numpy(rng.integers(views, size=(2, len(rows_B))))
        labels_B = self.labels_N[rows_B]
        wanted_BB = (labels_B[:, None] == labels_B).float().fill_diagonal_(0)
        return Lesson(self.views_VND[asked_B, rows_B], item_B * rows + rows_B, wanted_BB)


def find_neighbours(x_ND: Tensor, k: int, *, queries_QD: Tensor | None = None) -> Tensor:
    """Give the k nearest rows by squared L2, nearest first; of a row itself, without that row.

    Shapes: x_ND (N, D), queries (Q, D) -> (Q, k) int64, or (N, k) where no queries are given.
    """
    asked_QD = x_ND if queries_QD is None else queries_QD
    half_N, rows = x_ND.square().sum(1) / 2, max(1, _CHUNK_FLOATS // len(x_ND))
    found_Qk = torch.empty(len(asked_QD), k, dtype=torch.long, device=x_ND.device)
    # Both are made once. Held as they come, small results would lie between large scores that come and go, in places
    # where the next scores no longer fit: the heap would grow by all scores that there ever were.
    room_RN = x_ND.new_empty(min(rows, len(asked_QD)), len(x_ND))
    for start in range(0, len(asked_QD), rows):
        some_BD = asked_QD[start : start + rows]
        scores_BN = torch.mm(some_BD, x_ND.T, out=room_RN[: len(some_BD)]).sub_(half_N)
        if queries_QD is None:
            own = torch.arange(len(scores_BN))
            scores_BN[own, start + own] = -torch.inf
        found_Qk[start : start + rows] = scores_BN.topk(k, dim=1).indices
    return found_Qk


def mine_neighbours(x_ND: Tensor, config: RankedConfig) -> Mined:
    """Find the true neighbours of every row among the others.

    Raises:
        BadInput: there are too few rows.
    """
    if len(x_ND) <= config.neighbours:
        raise BadInput("training rows", len(x_ND), f"to mine {config.neighbours} neighbours of each, more are needed")
    return Mined(x_ND, find_neighbours(x_ND, config.neighbours))


def learn_ranked(
    taught: Mined | Viewed,
    start: Codebook,
    config: RankedConfig,
    *,
    seed: int,
    on_round: Callable[[int, Codebook], None] = lambda number, codebook: None,
) -> Codebook:
    """Teach the codewords of a fitted codebook to rank.

    Args:
        taught: rows to learn from, and what they want.
        start: the codebook; its cells stay.
        config: how.
        seed: decides which rows meet.
        on_round: called after every turn.
    """
    rng, codebook = np.random.default_rng(seed), score_by(start.landed, taught.x_ND, config)
    temperature = math.log(config.temperature * taught.energy)
    for number in range(config.rounds + 1):
        last = number == config.rounds
        cells_N, codes_NM = open_quantizer(codebook, hasty=not last).encode(taught.x_ND, codebook)
        words = _Words(codebook, cells_N, codes_NM.long(), temperature)
        _descend(words, taught, config, rng, last=last)
        before, (codebook, temperature) = codebook, words.settle()
        if last:
            codebook = replace(codebook, landing=before.books, landing_bias=before.bias)
        on_round(number, codebook)
    return codebook


def score_by(codebook: Codebook, x_ND: Tensor, config: RankedConfig) -> Codebook:
    """Give the codebook as it is, or the composite one made of it, if scores are to be look-ups alone.

    Shapes: x_ND (N, D), rows to fit biases to.
    """
    if config.scores == "exact" or codebook.kind == "cq":
        return codebook
    return compose(codebook, x_ND, open_quantizer(codebook).encode(x_ND, codebook)[1])


@dataclass(frozen=True)
class Gain:
    """The better of two codebooks, and the recall@10 of both on rows that were not learned from.

    Where scores are to be look-ups, `before` is that of the composite codebook as it was made, before it learned.
    """

    codebook: Codebook
    before: float
    after: float


def earn_ranked(x_ND: Tensor, start: Codebook, config: RankedConfig, *, seed: int) -> Gain:
    """Teach a codebook to rank, and keep what was learned only if rows kept apart find more of their neighbours.

    Shapes: x_ND (N, D) float32.
    Raises:
        BadInput: there are too few rows.
    """
    order_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(x_ND)))
    held_QD, kept_ND = x_ND[order_N[: config.held_rows]], x_ND[order_N[config.held_rows :][: config.sample_rows]]
    start = score_by(start, kept_ND, config)
    learned = learn_ranked(mine_neighbours(kept_ND, config), start, config, seed=seed)
    truth_Qk = find_neighbours(kept_ND, POSITIVES, queries_QD=held_QD)
    before, after = (measure_recall(kept_ND, held_QD, truth_Qk, codebook) for codebook in (start, learned))
    return Gain(learned if after > before else start, before, after)


def measure_recall(x_ND: Tensor, queries_QD: Tensor, truth_Qk: Tensor, codebook: Codebook) -> float:
    """Give the share of the k true neighbours of queries that are among the k nearest by codes, all cells looked at.

    Shapes: x_ND (N, D), queries (Q, D), truth (Q, k).
    """
    found_Qk = find_coded(x_ND, queries_QD, codebook, truth_Qk.shape[1])
    return float((found_Qk[:, :, None] == truth_Qk[:, None]).any(2).double().mean())


def find_coded(x_ND: Tensor, queries_QD: Tensor, codebook: Codebook, k: int) -> Tensor:
    """Give the k rows that are nearest to each query by their codes, nearest first.

    Shapes: x_ND (N, D), queries (Q, D) -> (Q, k) int64.
    """
    quantizer = open_quantizer(codebook)
    cells_N, codes_NM = quantizer.encode(x_ND, codebook)
    found_Qk = torch.empty(len(queries_QD), k, dtype=torch.long, device=x_ND.device)
    rows = max(1, _CHUNK_FLOATS // len(x_ND))
    for start in range(0, len(queries_QD), rows):
        far_BN = quantizer.measure_distances(queries_QD[start : start + rows], cells_N, codes_NM, codebook)
        found_Qk[start : start + rows] = far_BN.topk(k, largest=False).indices
    return found_Qk


def draw_batch(near_Nk: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Give the rows of a step: some at random, each with its nearest and some of its near misses.

    Shapes: near_Nk (N, k) -> (B,) int64, about `size`, each once.
    """
    seeds = rng.choice(len(near_Nk), min(len(near_Nk), max(1, size // (1 + _NEAR + _FAR))), replace=False)
    misses = near_Nk.shape[1] - _NEAR
    chosen = [near_Nk[seeds, :_NEAR].flatten()]
    if misses > 0:
        chosen += [near_Nk[row, _NEAR + rng.permutation(misses)[:_FAR]] for row in seeds]
    return torch.cat([torch.from_numpy(seeds), *chosen]).unique()


def rank_in_batch(x_BD: Tensor, scores_BB: Tensor, reach_B: Tensor, softness: float) -> Tensor:
    """Give the listwise loss of a batch: every row asks for its true neighbours among the codes of the others.

    Shapes: x_BD (B, D); scores_BB, of each row as query and each as item, larger is nearer; reach_B (B,) -> ().
    """
    return rank_listwise(scores_BB, want_neighbours(x_BD, reach_B, softness))


def want_neighbours(x_BD: Tensor, reach_B: Tensor, softness: float) -> Tensor:
    """Give how much each row wants each: from 1 down to 0 about the distance that `reach_B` gives; 0 of itself.

    Shapes: x_BD (B, D), reach_B (B,) -> (B, B).
    """
    distances_BB = torch.cdist(x_BD, x_BD).square()
    wanted_BB = torch.sigmoid((reach_B[:, None] - distances_BB) / (softness * reach_B[:, None]))
    return wanted_BB.fill_diagonal_(0)


def rank_listwise(scores_BB: Tensor, wanted_BB: Tensor) -> Tensor:
    """Give the mean over queries of what the softmax of scores misses of the items wanted; none is asked for itself.

    Queries that want next to nothing in the batch do not ask.

    Shapes: (B, B), (B, B) -> ().
    """
    weight_B = wanted_BB.sum(1)
    asks_B = (weight_B > 0.5).float()
    own_BB = torch.eye(len(scores_BB), dtype=torch.bool, device=scores_BB.device)
    logs_BB = F.log_softmax(scores_BB.masked_fill(own_BB, -1e4), dim=1)
    each_B = -(wanted_BB * logs_BB).sum(1) / weight_B.clamp_min(1e-6)
    return (each_B * asks_B).sum() / asks_B.sum().clamp_min(1)


class _Words:
    """What gradients move, codewords, biases and the logarithm of the temperature, and the codes that hold still."""

    def __init__(self, codebook: Codebook, cells_N: Tensor, codes_NM: Tensor, temperature: float) -> None:
        self.codebook, self.cells_N, self.codes_NM = codebook, cells_N, codes_NM
        self.books_MKd = torch.tensor(codebook.books).requires_grad_()
        self.bias_MK = None if codebook.bias is None else torch.tensor(codebook.bias).requires_grad_()
        self.temperature = torch.tensor(temperature).requires_grad_()

    @property
    def moving(self) -> list[Tensor]:
        """Give the codewords, and the biases if there are any."""
        return [self.books_MKd] if self.bias_MK is None else [self.books_MKd, self.bias_MK]

    def score(self, asked_BD: Tensor, x_BD: Tensor, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Give the score of each query and item, and the misfit of each item with its code.

        Shapes: asked (B, D), x (B, D), the items, both in the codewords' frame; rows_B (B,) -> (B, B), (B,).
        """
        found_BD = self._decode(rows_B)
        if self.bias_MK is None:
            return asked_BD @ found_BD.T - found_BD.square().sum(1) / 2, (x_BD - found_BD).square().sum(1)
        bias_B = self.bias_MK[torch.arange(len(self.bias_MK)), self.codes_NM[rows_B]].sum(1)
        return asked_BD @ found_BD.T + bias_B, measure_misfit(x_BD, found_BD, bias_B, self.books_MKd)

    def settle(self) -> tuple[Codebook, float]:
        """Give the codebook as it now is, and the logarithm of the temperature."""
        bias = None if self.bias_MK is None else self.bias_MK.detach().numpy()
        learned = replace(self.codebook, books=self.books_MKd.detach().numpy(), bias=bias)
        return learned, float(self.temperature.detach())

    def _decode(self, rows_B: Tensor) -> Tensor:
        codes_BM = self.codes_NM[rows_B]
        choices = codes_BM.T[: len(self.books_MKd)]
        parts = [words_Kd[code_B] for words_Kd, code_B in zip(self.books_MKd, choices, strict=True)]
        whole_BD = torch.stack(parts).sum(0) if self.codebook.additive else torch.cat(parts, dim=1)
        if not self.codebook.residual:
            return whole_BD
        return whole_BD + find_anchors(self.cells_N[rows_B], codes_BM, self.codebook, whole_BD.detach())


def _descend(
    words: _Words, taught: Mined | Viewed, config: RankedConfig, rng: np.random.Generator, *, last: bool
) -> None:
    steps = config.last_steps if last else config.steps
    groups = [{"params": words.moving, "lr": _pick_rate(words, taught, config)}]
    groups += [{"params": [words.temperature], "lr": 5e-3}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (0.51 + 0.5 * math.cos(math.pi * step / max(1, steps)))
    )
    x_ND = taught.x_ND
    for _ in range(steps):
        lesson = taught.draw(config, rng)
        asked_BD, items_BD = (rotate(x_BD, words.codebook) for x_BD in (lesson.asked_BD, x_ND[lesson.rows_B]))
        scores_BB, misfit_B = words.score(asked_BD, items_BD, lesson.rows_B)
        loss = rank_listwise(scores_BB / words.temperature.exp(), lesson.wanted_BB)
        if not last:
            loss = loss + config.fidelity / taught.energy * misfit_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pace.step()


def _pick_rate(words: _Words, taught: Mined | Viewed, config: RankedConfig) -> float:
    """Give how far a codeword may move in a step: the closer they fit, the more care they want."""
    if config.learning_rate is not None:
        return config.learning_rate * math.sqrt(taught.energy)
    x_ND = rotate(taught.x_ND[:_MEASURED], words.codebook)
    with torch.no_grad():
        misfit_N = words.score(x_ND[:0], x_ND, torch.arange(len(x_ND)))[1]
    return _PACE * math.sqrt(float(misfit_N.mean()))
