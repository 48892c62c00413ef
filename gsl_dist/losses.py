"""Similarity losses on a batch of representations: three that ask for labels, and one that asks for none.

With labels, from pytorch-metric-learning: `triplet` asks for a margin between positives and negatives of the batch and
falls silent once it is there; `proxy` classifies by the nearest of learned class proxies and never does; `pairwise`
pulls equal labels together and pushes others past a margin. A snapped network needs a loss that keeps speaking: where
the gradient is zero, nothing is pulled.

These three see directions only: rows are scaled to length 1 first, whether or not the encoder does so. Distances are
Euclidean, not squared, so they lie between 0 and 2, and margins are in those units. Means of `triplet` and `pairwise`
are over the terms above 0.

Without labels, `neighbours` asks that what is near among the vectors of the corpus stays near among representations.
In place of its label each row bears its number among the vectors, which the loss holds.

Every loss is called with the whole batch of all workers, so that mining sees the same pairs however many there are.
"""

# Shapes: N rows, D dims; B rows of a batch, k neighbours

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gsl_dist.config import Strict
from gsl_dist.ranked import POSITIVES, Mined, rank_in_batch


class TripletConfig(Strict):
    """A row a of the batch, a positive p and a negative n: max(0, |a-p| - |a-n| + margin).

    Distances are not squared and between rows of length 1; the mean is over the triplets above 0. The farthest p and
    the nearest n alone can gather all rows in one point before they part them; all triplets never do.
    """

    kind: Literal["triplet"]
    margin: float = Field(default=0.2, gt=0, description="how much farther off a negative should be")
    mining: Literal["hardest", "all"] = Field(
        default="hardest", description="of each row the farthest positive with the nearest negative, or every triplet"
    )


class ProxyConfig(Strict):
    """Softmax over cosines to one learned proxy a class, divided by `temperature`; the mean is over all rows."""

    kind: Literal["proxy"]
    temperature: float = Field(default=0.1, gt=0, description="of the softmax over cosines")


class PairwiseConfig(Strict):
    """Contrastive: equal labels at distance 0, others at least a margin away: |a-p| and max(0, margin - |a-n|).

    Distances are not squared and between rows of length 1; each of the two is its mean over the pairs above 0.
    """

    kind: Literal["pairwise"]
    margin: float = Field(default=0.8, gt=0, description="how far off other labels should be")


class NeighbourConfig(Strict):
    """Every row asks for its true neighbours among the others of the batch, by a softmax over squared distances.

    An item counts as a neighbour by its squared distance in the corpus, from 1 to 0 about that of the row's tenth
    neighbour there. It scores -|y - y'|^2 / (2 T |y|^2), with |y|^2 the mean squared length of the batch's rows once
    their mean is taken off, and T `temperature` times the mean squared distance of tenth neighbours in the corpus,
    where lengths are measured so too. No size of vectors matters, and where neighbours are nearer T is lower.
    """

    kind: Literal["neighbours"]
    temperature: float = Field(default=0.1, gt=0, description="of the softmax, in the distance of true neighbours")
    softness: float = Field(default=0.1, gt=0, description="width of the border of true neighbours, in their distance")
    neighbours: int = Field(default=200, ge=POSITIVES, description="nearest rows mined for each row")
    sample_rows: int = Field(default=65_536, ge=1, description="rows to learn from, at most; mining looks at all pairs")

    @model_validator(mode="after")
    def _sample_has_neighbours(self) -> NeighbourConfig:
        if self.sample_rows <= self.neighbours:
            raise ValueError(f"sample_rows ({self.sample_rows}) must be more than neighbours ({self.neighbours})")
        return self


LossConfig = Annotated[TripletConfig | ProxyConfig | PairwiseConfig | NeighbourConfig, Field(discriminator="kind")]


class SimilarityLoss(nn.Module):
    """A loss and, where it has one, its miner.

    Source: Musgrave, Belongie, Lim, PyTorch Metric Learning, arXiv 2008.09164; the triplet with batch-hard mining is
    Hermans, Beyer, Leibe, arXiv 1703.07737; proxies by normalized softmax are Zhai and Wu, arXiv 1811.12649.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, y_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Give the scalar loss of a batch.

        Shapes: y_ND (N, D), labels_N (N,) int64 from 0 -> ().
        """
        if self.miner is None:
            value: Tensor = self.loss(y_ND, labels_N)
        else:
            value = self.loss(y_ND, labels_N, self.miner(y_ND, labels_N))
        return value


class NeighbourLoss(nn.Module):
    """The listwise loss of `NeighbourConfig`; holds the vectors of the corpus that are learned from.

    Args:
        config: the numbers of the loss.
        mined: those vectors, level, and their neighbours.
    """

    x_ND: Tensor
    reach_N: Tensor

    def __init__(self, config: NeighbourConfig, mined: Mined) -> None:
        super().__init__()
        reach_N = mined.reach(torch.arange(len(mined.x_ND)))
        self.temperature, self.softness = config.temperature * float(reach_N.mean()), config.softness
        # They come from the corpus, not from training: no checkpoint needs to carry them.
        self.register_buffer("x_ND", mined.x_ND, persistent=False)
        self.register_buffer("reach_N", reach_N, persistent=False)

    def forward(self, y_BD: Tensor, rows_B: Tensor) -> Tensor:
        """Give the scalar loss of a batch.

        Shapes: y_BD (B, D); rows_B (B,) int64, the number of each among the vectors -> ().
        """
        y_BD = y_BD - y_BD.mean(0)
        half_B = y_BD.square().sum(1) / 2
        # A row's own length is the same for all of its items: the softmax does not see it.
        scores_BB = (y_BD @ y_BD.T - half_B) / (self.temperature * 2 * half_B.mean())
        return rank_in_batch(self.x_ND[rows_B], scores_BB, self.reach_N[rows_B], self.softness)


def make_loss(config: LossConfig, *, classes: int, dim: int, mined: Mined | None = None) -> SimilarityLoss:
    """Give the loss that a config describes.

    Args:
        config: which loss, and its numbers.
        classes: how many labels there are.
        dim: D, the length of a representation.
        mined: the vectors to learn from, level, and their neighbours, for the loss that asks for them.
    """
    if isinstance(config, NeighbourConfig):
        assert mined is not None, "a loss of neighbours needs them"
        return SimilarityLoss(NeighbourLoss(config, mined))
    # Here, since it brings SciPy: encoding and fitting come through this module too, in many processes.
    from pytorch_metric_learning import losses, miners

    if isinstance(config, TripletConfig):
        miner = miners.BatchHardMiner() if config.mining == "hardest" else None
        return SimilarityLoss(losses.TripletMarginLoss(margin=config.margin), miner)
    if isinstance(config, ProxyConfig):
        return SimilarityLoss(losses.NormalizedSoftmaxLoss(classes, dim, temperature=config.temperature))
    return SimilarityLoss(losses.ContrastiveLoss(pos_margin=0.0, neg_margin=config.margin))


def level_rows(x_ND: Tensor) -> Tensor:
    """Give rows with a mean of zero and a mean squared length of 1: who is near to whom stays.

    Shapes: (N, D) -> (N, D).
    """
    rest_ND = x_ND - x_ND.mean(0)
    return rest_ND / rest_ND.square().sum(1).mean().sqrt()
