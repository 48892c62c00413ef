"""Similarity losses on a batch of representations and labels, from pytorch-metric-learning.

`triplet` mines the hardest pairs of the batch and falls silent once they are satisfied; `proxy` classifies by the
nearest of learned class proxies and never does; `pairwise` pulls equal labels together and pushes others past a
margin. A snapped network needs a loss that keeps speaking: where the gradient is zero, nothing is pulled.

All three see directions only: rows are scaled to length 1 first, whether or not the encoder does so. Distances are
Euclidean, not squared, so they lie between 0 and 2, and margins are in those units. Means of `triplet` and `pairwise`
are over the terms above 0.

Every loss is called with the whole batch of all workers, so that mining sees the same pairs however many there are.
"""

# Shapes: N rows, D dims

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from gsl_dist.config import Strict


class TripletConfig(Strict):
    """The farthest positive p and the nearest negative n of each row a in the batch: max(0, |a-p| - |a-n| + margin).

    Distances are not squared and between rows of length 1; the mean is over the triplets above 0.
    """

    kind: Literal["triplet"]
    margin: float = Field(default=0.2, gt=0)


class ProxyConfig(Strict):
    """Softmax over cosines to one learned proxy a class, divided by `temperature`; the mean is over all rows."""

    kind: Literal["proxy"]
    temperature: float = Field(default=0.1, gt=0)


class PairwiseConfig(Strict):
    """Contrastive: equal labels at distance 0, others at least a margin away: |a-p| and max(0, margin - |a-n|).

    Distances are not squared and between rows of length 1; each of the two is its mean over the pairs above 0.
    """

    kind: Literal["pairwise"]
    margin: float = Field(default=0.8, gt=0)


LossConfig = Annotated[TripletConfig | ProxyConfig | PairwiseConfig, Field(discriminator="kind")]


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


def make_loss(config: LossConfig, *, classes: int, dim: int) -> SimilarityLoss:
    """Give the loss that a config describes, for `classes` labels and representations of `dim` numbers."""
    if isinstance(config, TripletConfig):
        return SimilarityLoss(losses.TripletMarginLoss(margin=config.margin), miners.BatchHardMiner())
    if isinstance(config, ProxyConfig):
        return SimilarityLoss(losses.NormalizedSoftmaxLoss(classes, dim, temperature=config.temperature))
    return SimilarityLoss(losses.ContrastiveLoss(pos_margin=0.0, neg_margin=config.margin))
